"""The page of identities has every identity test there is, and no other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "identities.md"


def test_every_identity_test_is_in_the_table():
    page = PAGE.read_text(encoding="utf-8")
    there = {line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")}
    there.discard("what holds")
    wanted = set()
    for path in (ROOT / "tests" / "identity").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                wanted.add(node.name.removeprefix("test_").replace("_", " "))
    assert len(wanted) > 100
    assert there == wanted, "docs/identities.md is out of date: python docs/make_identities.py"
