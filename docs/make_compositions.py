"""Runs every pair of parts for two steps; writes which work, and why others do not: python docs/make_compositions.py"""

import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from heterodox.core import units  # noqa: E402
from heterodox.core.errors import RecipeError  # noqa: E402
from tests.conformance.compositions import compose, parts, two_steps  # noqa: E402

PAGE = ROOT / "docs" / "compositions.md"
PAIRS = [
    ("credit", "model"), ("credit", "update"), ("credit", "rating"), ("credit", "objective"), ("credit", "learner"),
    ("update", "rating"), ("update", "objective"), ("rating", "objective"),
    ("update", "learner"), ("rating", "learner"), ("objective", "learner"),
]  # fmt: skip
MEASURED = ROOT / "results" / "compositions" / "results.json"
RECIPES = """## As recipes

[recipes/compositions](../recipes/compositions) sets some of them beside their plain partners: a GPT of two layers of
width 64 (for `equilibrium*` one relaxing block of that width, a smaller model) on the standard library's sources, of
whose training windows 30 % are noise, so that a filter has something to do. Nothing is tuned; it shows that they
run and learn, not which is best. Five minutes of processor time:

    heterodox compare recipes/compositions --out runs/compositions

"""
HEAD = """# Compositions

Which parts go together. Every pair of the tables was run for two steps on the tiny recipe of the tests: a GPT of two
blocks, or the equilibrium model for the three rules that are at home there, unless the table names the model;
everything else at its defaults. ✓: the losses are finite, and there is a signal. A number: the recipe is refused, for
the reason below. *sparse NAME* is the update `sparse` with that topology. A property test draws combinations of all
slots at once (`tests/property/test_compositions.py`).

"""


def main() -> None:
    reasons: list[str] = []
    tables = "\n".join(line for rows, columns in PAIRS for line in table(rows, columns, reasons))
    refusals = "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))
    made = f"Made by `python docs/make_compositions.py` on {datetime.date.today()}.\n\n"
    why = "\n## Why not\n\n" + (refusals or "Nothing is refused.\n")
    PAGE.write_text(HEAD + made + tables + why + "\n" + RECIPES + measured(), encoding="utf-8")


def measured() -> str:
    """The table of the recipes' comparison, from its results."""
    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    lines = ["| recipe | validation loss | gap closed | FLOPs | held | seconds |", "|---|---:|---:|---:|---:|---:|"]
    for row in sorted(results["table"], key=lambda row: row["val_loss"]["mean"]):
        cells = [units.interval(row["val_loss"]), units.percent(row["gap_closed"]), units.count(row["flops"])]
        cells += [units.size(row["activation_bytes"]), units.number(row["seconds"], 0)]
        lines.append(f"| `{row['recipe']}` | {' | '.join(cells)} |")
    seeds, created = len(results["seeds"]), results["created"][:10]
    told = f"Nats per token, {seeds} seed{'s' * (seeds > 1)}, {created}; seconds on a machine that was busy."
    return "\n".join([told, "", *lines]) + "\n"


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
