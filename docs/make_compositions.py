"""Runs every pair of parts for two steps; writes which work, and why others do not: python docs/make_compositions.py"""

import datetime
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from heterodox.core.errors import RecipeError  # noqa: E402
from tests.conformance.compositions import compose, parts, two_steps  # noqa: E402

PAGE = ROOT / "docs" / "compositions.md"
PAIRS = [
    ("credit", "update"), ("credit", "rating"), ("credit", "objective"), ("credit", "learner"),
    ("update", "rating"), ("update", "objective"), ("rating", "objective"),
]  # fmt: skip
HEAD = """# Compositions

Which parts go together. Every pair was run for two steps on the tiny recipe of the tests: a GPT of two blocks, or the
equilibrium model for the three rules that are at home there; everything else at its defaults. ✓: the losses are finite,
and there is a signal. A number: the recipe is refused, for the reason below. *sparse NAME* is the update `sparse` with
that topology. A property test draws combinations of all slots at once (`tests/property/test_compositions.py`).

"""


def main() -> None:
    reasons: list[str] = []
    tables = "\n".join(line for rows, columns in PAIRS for line in table(rows, columns, reasons))
    refusals = "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))
    made = f"Made by `python docs/make_compositions.py` on {datetime.date.today()}.\n\n"
    PAGE.write_text(HEAD + made + tables + "\n## Why not\n\n" + (refusals or "Nothing is refused.\n"), encoding="utf-8")


def table(rows: str, columns: str, reasons: list[str]) -> Iterator[str]:
    """`rows` × `columns`, each pair run; reasons for refusals are added to `reasons`."""
    yield f"## {rows} × {columns}\n"
    yield f"| | {' | '.join(map(shown, parts(columns)))} |"
    yield "|---|" + ":-:|" * len(parts(columns))
    for row in parts(rows):
        cells = [cell({rows: row, columns: column}, reasons) for column in parts(columns)]
        yield f"| {shown(row)} | {' | '.join(cells)} |"
    yield ""


def shown(part: str) -> str:
    return "sparse rigl" if part == "sparse" else part


def cell(chosen: dict[str, str], reasons: list[str]) -> str:
    """✓ for a pair that runs, or the number of the reason for which it does not."""
    try:
        recipe = compose(**chosen)
    except RecipeError as refusal:
        reason = str(refusal)
        if reason not in reasons:
            reasons.append(reason)
        return str(reasons.index(reason) + 1)
    reports = two_steps(recipe)
    assert all(report.loss.isfinite() and report.grad_norm > 0 for report in reports), chosen
    return "✓"


if __name__ == "__main__":
    main()
