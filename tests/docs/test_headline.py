"""The README's first table is that of the results."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_that_of_the_results():
    made = runpy.run_path(str(ROOT / "docs" / "make_headline.py"))
    (table,) = made["TABLE"].findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert table.count("\n| `") >= 10
    assert table == made["headline"](), "README.md is out of date: python docs/make_headline.py"
