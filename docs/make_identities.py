"""Runs the identity tests and writes what they compared, and how exactly it agreed: python docs/make_identities.py

While a test runs, `torch.allclose`, `torch.equal` and `pytest.approx` note what they are asked, and answer as ever.
"""

import ast
import datetime
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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

*Error* is the largest that was measured, |a − b| over the largest |b|, and *tolerance* what the test allows there:
relative, or absolute where it says so; *bits*: no difference at all. *Apart* counts the comparisons that had to come
out different: the wrong sign, another seed, the rule outside of its special setting. A test without comparisons of
numbers checks something else: a refusal, what is in a checkpoint, which passes are made.

"""


@dataclass
class Compared:
    """What the cases of one test compared."""

    cases: int = 0
    bits: int = 0
    apart: int = 0
    close: list[tuple[float, float, str]] = field(default_factory=list)
    """Share of the tolerance that was used, error, tolerance in words."""


class Recorder:
    """A pytest plug-in that notes comparisons by file and test."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Compared] = {}
        self.now = Compared()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        self.now = self.found.setdefault((item.path.stem, item.function.__name__), Compared())
        self.now.cases += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "allclose", self._allclose(torch.allclose))
            patch.setattr(torch, "equal", self._equal(torch.equal))
            patch.setattr(pytest, "approx", self._approx(pytest.approx))
            return (yield)

    def _allclose(self, original: Callable[..., bool]) -> Callable[..., bool]:
        def allclose(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
            answer, caller = original(a, b, rtol, atol, equal_nan), _caller()
            if answer and caller:
                self._note_close(a.detach(), b.detach(), rtol, atol)
            elif caller == "test":
                self.now.apart += 1
            return answer

        return allclose

    def _equal(self, original: Callable[..., bool]) -> Callable[..., bool]:
        def equal(a: Tensor, b: Tensor) -> bool:
            answer = original(a, b)
            if _caller() == "test":
                self.now.bits += answer
                self.now.apart += not answer
            return answer

        return equal

    def _approx(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def approx(expected: Any, rel: float | None = None, abs: float | None = None) -> Any:
            plain = original(expected, rel=rel, abs=abs)
            if not isinstance(expected, int | float):
                return plain

            class Approx:
                def __eq__(other, actual: object) -> bool:
                    if plain == actual:
                        tolerances = (rel or (1e-6 if abs is None else 0.0), abs or 0.0)
                        self._note_close(torch.tensor(float(actual)), torch.tensor(float(expected)), *tolerances)
                    return plain == actual

            return Approx()

        return approx

    def _note_close(self, a: Tensor, b: Tensor, rtol: float, atol: float) -> None:
        if not b.numel():
            return
        apart, size = (a.double() - b.double()).abs(), b.double().abs()
        used = apart / (atol + rtol * size).clamp(min=1e-300)
        scale = float(size.max())
        error = float(apart.max()) / (scale or 1.0)
        words = f"{rtol:.0e}" if rtol and scale else f"{atol:.0e} absolute"
        self.now.close.append((float(used.max()), error, words))


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
    close = [comparison for comparison in compared.close if comparison[0] > 0]
    worst = max(close, default=None)
    count = len(compared.close) + compared.bits
    shown = ("", "") if not count else ("bits", "") if worst is None else (f"{worst[1]:.1e}", worst[2])
    cells = [words(name), compared.cases, count or "", *shown, compared.apart or ""]
    return "| " + " | ".join(map(str, cells)) + " |"


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
