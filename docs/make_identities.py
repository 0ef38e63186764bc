"""Runs the identity tests and writes what they compared, and how exactly it agreed: python docs/make_identities.py

While a test runs, its comparisons through tests/measured.py are noted, and those through `torch.allclose`,
`torch.equal` and `pytest.approx`, which answer as ever.
"""

import ast
import datetime
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "identity"
PAGE = ROOT / "docs" / "identities.md"
PAGES = {  # of tests that are not called after the page of one rule
    "attention": "model", "elsewhere": "rules/feedback_alignment", "feedback": "rules/feedback_alignment",
    "grape": "rules/feedback_alignment", "meta_gradient": "rules/data_rater", "model_parts": "model",
    "switches": "model", "updates": "recipes",
}  # fmt: skip
HEAD = """# Identities

What each rule is held to in float64 before anything is tuned: equality with backpropagation at a special setting, with
finite differences, with a formula by hand, with PyTorch.

*Error* and *tolerance* are those of the one comparison, of all that a test makes, which came closest to failing:
relative to what is expected there unless *absolute*; *on average* if it is that of an estimate from random draws;
*bits* if no comparison found a difference at all. An *order* is the power of the step or nudge with which an error
falls; where it stands alone, the test compares errors at several steps, and no gradient directly. *Compared* counts
what had to agree; *apart* what had to differ, and did: the wrong sign, another seed, the rule outside of its special
setting.

A test with nothing compared checks something else: a refusal, what gets a gradient at all, how many entries there are
or which are the largest, that something falls or rises, what a pass costs.

"""


@dataclass
class Compared:
    """What the cases of one test compared."""

    cases: int = 0
    bits: int = 0
    apart: int = 0
    close: list[Any] = field(default_factory=list)
    """`Outcome`s with an error or an order."""


class Recorder:
    """A pytest plug-in that notes comparisons by file and test: those of tests/measured.py, and others' as its own."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Compared] = {}
        self.now = Compared()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        self.now = self.found.setdefault((item.path.stem, item.function.__name__), Compared())
        self.now.cases += 1
        self.measured = import_module("tests.measured")  # the one that the tests have
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.measured, "listener", self._hear)
            patch.setattr(torch, "allclose", self._allclose(torch.allclose))
            patch.setattr(torch, "equal", self._equal(torch.equal))
            patch.setattr(pytest, "approx", self._approx(pytest.approx))
            return (yield)

    def _hear(self, outcome: Any) -> None:
        if outcome.kind == "bits":
            self.now.bits += 1
        elif outcome.kind == "apart":
            self.now.apart += 1
        else:
            self.now.close.append(outcome)

    def _note(self, kind: str) -> None:
        self.measured.note(self.measured.Outcome(kind))

    def _allclose(self, original: Callable[..., bool]) -> Callable[..., bool]:
        def allclose(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
            answer, caller = original(a, b, rtol, atol, equal_nan), _caller()
            if answer and caller:
                self.measured.note_close(a, b, rtol, atol)
            elif caller == "test":
                self._note("apart")
            return answer

        return allclose

    def _equal(self, original: Callable[..., bool]) -> Callable[..., bool]:
        def equal(a: Tensor, b: Tensor) -> bool:
            answer = original(a, b)
            if _caller() == "test":
                self._note("bits" if answer else "apart")
            return answer

        return equal

    def _approx(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def approx(expected: Any, rel: float | None = None, abs: float | None = None) -> Any:
            plain = original(expected, rel=rel, abs=abs)
            rtol = rel or (1e-6 if abs is None else 0.0)
            atol = 1e-12 if abs is None else abs

            class Approx:
                def __eq__(other, actual: object) -> bool:
                    if answer := plain == actual:
                        tensors = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
                        self.measured.note_close(*tensors, rtol, atol)
                    return answer

            return Approx()

        return approx


def _caller() -> str | None:
    """Whether the comparison is a test's, gradcheck's, or (None) somebody else's."""
    name = sys._getframe(2).f_code.co_filename
    if name.startswith(str(ROOT / "tests")):
        return "test"
    return "gradcheck" if name.endswith("autograd/gradcheck.py") else None


def table(found: dict[tuple[str, str], Compared]) -> Iterator[str]:
    """A heading for each rule, a paragraph and a table for each file, a row for each test."""
    files = sorted({file for file, _ in found}, key=lambda file: (page_of(file), file))
    page = None
    for file in files:
        if page_of(file) != page:
            page = page_of(file)
            yield f"## [{page.removeprefix('rules/')}]({page}.md)\n"
        module = ast.parse((TESTS / f"{file}.py").read_text(encoding="utf-8"))
        doc = (ast.get_docstring(module) or "").split("\n")[0]
        yield f"{doc} ([`{file}.py`](../tests/identity/{file}.py))\n"
        yield "| what holds | cases | compared | error | tolerance | apart |\n|---|---:|---:|---:|---:|---:|"
        yield from (row(name, compared) for (stem, name), compared in found.items() if stem == file)
        yield ""


def row(name: str, compared: Compared) -> str:
    errors = [outcome for outcome in compared.close if outcome.kind != "order"]
    orders = [outcome for outcome in compared.close if outcome.kind == "order"]
    shown = [(f"{worst.found:.1e}", f"{worst.tolerance:.0e} {worst.kind}".strip()) for worst in _closest(errors)]
    if compared.bits and not compared.close:
        shown = [("bits", "")]
    for worst in _closest(orders):
        order = round(worst.found, 3) + 0.0  # no −0
        shown.append((f"order {order:.3f}", f"{worst.expected:g} ± {worst.tolerance:g}"))
    count = len(compared.close) + compared.bits
    cells = [*("; ".join(filter(None, column)) for column in zip(*shown, strict=True))] or ["", ""]
    return "| " + " | ".join(map(str, [words(name), compared.cases, count or "", *cells, compared.apart or ""])) + " |"


def _closest(outcomes: list[Any]) -> list[Any]:
    """The one that used most of its tolerance, if there is any."""
    return sorted(outcomes, key=lambda outcome: abs(outcome.found - outcome.expected) / outcome.tolerance)[-1:]


def words(name: str) -> str:
    """A test's name as a sentence."""
    return name.removeprefix("test_").replace("_", " ")


def page_of(file: str) -> str:
    """The page of the docs that a file's tests belong to."""
    subject = file.removeprefix("test_")
    rules = [path.stem for path in (ROOT / "docs" / "rules").glob("*.md") if subject.startswith(path.stem)]
    return PAGES.get(subject) or (f"rules/{max(rules, key=len)}" if rules else "how-it-works")


def main() -> None:
    recorder = Recorder()
    code = pytest.main(["-n", "0", "-q", "-p", "no:cacheprovider", str(TESTS)], plugins=[recorder])
    if code:
        sys.exit(f"not written: pytest ended with {code}")
    where = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    made = f"Measured by `python docs/make_identities.py` on {datetime.date.today()}, {where}.\n\n"
    PAGE.write_text(HEAD + made + "\n".join(table(recorder.found)), encoding="utf-8")


if __name__ == "__main__":
    main()
