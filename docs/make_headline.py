"""Writes the README's first table from the studies of tiny Shakespeare: python docs/make_headline.py"""

import json
import re
from pathlib import Path
from typing import Any

from heterodox.core import units

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
STUDIES = ("shakespeare", "shakespeare_flops")
TABLE = re.compile(r"(?<=<!-- python docs/make_headline.py -->\n\n).*?(?=\n<!-- end -->)", re.DOTALL)


def main() -> None:
    README.write_text(TABLE.sub(lambda _: headline(), README.read_text(encoding="utf-8")), encoding="utf-8")


def headline() -> str:
    """A line per rule, the best first; the last column where the study at equal FLOPs is there."""
    results = [_read(study) for study in STUDIES]
    tokens, equal = results[0], {row["recipe"]: row for row in (results[1] or {}).get("table", [])}
    assert tokens is not None
    columns = ["validation loss", "to backprop", "gap closed", "FLOPs", "held", *["at equal FLOPs"] * bool(equal)]
    lines = [f"| rule | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for row in sorted(tokens["table"], key=lambda row: row["val_loss"]["mean"]):
        cells = [units.interval(row["val_loss"]), units.interval(row["difference"], sign=True)]
        cells += [units.percent(row["gap_closed"]), units.count(row["flops"]), units.size(row["activation_bytes"])]
        if equal:
            cells.append(units.interval(equal[row["recipe"]]["val_loss"]) if row["recipe"] in equal else "")
        lines.append(f"| `{row['recipe']}` | {' | '.join(cells)} |")
    unigram = next(run["unigram_loss"] for run in tokens["runs"])
    lines.append(f"| *unigram entropy* | {unigram:.3f} |" + " |" * (len(columns) - 1))
    return "\n".join(lines) + "\n"


def _read(study: str) -> dict[str, Any] | None:
    file = ROOT / "results" / study / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


if __name__ == "__main__":
    main()
