"""The page of identities has every identity test there is, no other, and what each compared."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "identities.md"
OUT_OF_DATE = "docs/identities.md is out of date: python docs/make_identities.py"
COMPARING = {
    "allclose", "approx", "assert_same", "exactly", "forward_mode_is_the_transpose", "gradcheck", "gradgradcheck",
    "is_exact", "is_of_order", "on_average", "same", "within",
}  # fmt: skip


def rows() -> dict[str, list[str]]:
    """The cells of each test's row but the first."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: rest for name, *rest in cells if name != "what holds"}


def identity_tests() -> dict[str, list[ast.FunctionDef]]:
    """By the words of its row, the tests of that name."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for path in (ROOT / "tests" / "identity").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.setdefault(node.name.removeprefix("test_").replace("_", " "), []).append(node)
    return found


def calls(test: ast.AST) -> set[str]:
    """The names of the functions and methods that it calls."""
    functions = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
    return {getattr(function, "attr", getattr(function, "id", "")) for function in functions}


def test_every_identity_test_is_in_the_table():
    assert len(identity_tests()) > 100
    assert rows().keys() == identity_tests().keys(), OUT_OF_DATE


def test_every_comparison_of_numbers_is_in_the_table():
    tests = identity_tests()
    for name, (_, compared, error, _, apart) in rows().items():
        if not any(calls(test) & COMPARING for test in tests[name]):
            continue
        assert compared or apart, f"{name}: {OUT_OF_DATE}"
        assert bool(error) == bool(compared), f"{name}: {OUT_OF_DATE}"


def test_no_error_reads_as_a_failure():
    """A relative error where an absolute tolerance decided, or one that had to be large."""
    seen = 0
    for name, (_, _, errors, tolerances, _) in rows().items():
        for error, tolerance in zip(errors.split("; "), tolerances.split("; "), strict=True):
            if order := re.fullmatch(r"order (\S+)", error):
                expected, allowed = map(float, tolerance.split(" ± "))
                assert abs(float(order[1]) - expected) <= allowed, name
            elif error not in ("", "bits"):
                assert float(error) <= 1.05 * float(tolerance.split()[0]), name
                seen += 1
    assert seen > 50


def test_no_identity_test_asks_for_a_small_error_unheard():
    """`assert error < 1e-6` stands in no table: `assert within(error, 1e-6)` does."""
    for name, tests in identity_tests().items():
        asserts = [node for test in tests for node in ast.walk(test) if isinstance(node, ast.Assert)]
        for node in (node for stated in asserts for node in ast.walk(stated) if isinstance(node, ast.Compare)):
            for kind, bound in zip(node.ops, node.comparators, strict=True):
                small = isinstance(bound, ast.Constant) and isinstance(bound.value, float) and bound.value <= 1e-3
                assert not (small and isinstance(kind, ast.Lt | ast.LtE)), f"{name}: line {node.lineno}"
