"""The report in a real browser: it draws, complains of nothing, fits the window and answers to its controls."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from heterodox.report import write_report
from tests.browser.chromium import BINARY, Page
from tests.unit.report.synthetic_study import write_run, write_study

pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium on this machine")

WIDTHS = (1400, 400)
OVERFLOWING = """[...document.body.querySelectorAll('*')].filter(element =>
    element.getBoundingClientRect().right > innerWidth + 1 && !element.closest('.scroll, .chart, svg, .skip')
).map(element => element.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def tab(browser: Page) -> Page:
    browser.errors.clear()
    browser.requests.clear()
    return browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_study(tmp_path_factory.mktemp("study"))
    return write_report([folder], folder / "report.html")


def marks(tab: Page, chart: str, kind: str) -> int:
    return tab.evaluate(f"document.querySelectorAll('#chart-{chart} .mark-{kind} path').length")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_draws_fits_and_is_silent(tab: Page, report: Path, width: int, scheme: str):
    tab.open(report, width, scheme=scheme)
    assert tab.errors == []
    assert tab.requests == [report.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate(OVERFLOWING) == []
    assert tab.evaluate("document.querySelector('#samples').textContent.includes('<script>alert(1)</script>')")
    assert marks(tab, "final", "symbol") == 5
    assert marks(tab, "pareto", "symbol") == 5
    assert marks(tab, "loss", "line") == 5 + 15
    assert tab.evaluate("document.querySelector('#chart-alignment canvas').height") > 300
    assert tab.evaluate("document.querySelector('#chart-loss svg').getBoundingClientRect().width") > width / 2


def test_controls_change_the_charts(tab: Page, report: Path):
    tab.open(report, 1000)
    titles = "[...document.querySelectorAll('#chart-loss text')].map(text => text.textContent)"
    assert "tokens consumed, meta tokens included" in tab.evaluate(titles)
    tab.evaluate("document.querySelector('#curves input[value=seconds]').click()")
    tab.wait(f"{titles}.includes('seconds of training')")
    tab.evaluate("document.querySelector('input[name=shown][value=head_only]').click()")
    tab.wait("document.querySelectorAll('#chart-loss .mark-line path').length === 16")
    tab.evaluate("document.querySelector('input[name=log]').click()")
    tab.evaluate("document.querySelector('input[name=zoom]').click()")
    tab.wait(f"!{titles}.includes('5.0')")
    assert marks(tab, "loss", "line") == 16
    tab.evaluate("document.querySelector('input[value=norm_ratio]').click()")
    tab.wait("document.querySelector('#chart-alignment').outerHTML.includes('norm ratio with the exact gradient')")
    assert tab.errors == []


def test_the_final_losses_are_set_against_each_cost(tab: Page, report: Path):
    tab.open(report, 1000)
    texts = "[...document.querySelectorAll('#chart-pareto text')].map(text => text.textContent)"
    assert "floating-point operations" in tab.evaluate(texts)
    assert "direct_feedback" in tab.evaluate(texts)
    tab.evaluate("document.querySelector('#pareto input[value=activation_bytes]').click()")
    tab.wait(f"{texts}.includes('bytes that a step holds for its backward half')")
    assert marks(tab, "pareto", "symbol") == 5
    assert tab.errors == []


def test_the_keyboard_reaches_and_moves_the_controls(tab: Page, report: Path):
    tab.open(report, 1000)
    tab.evaluate("document.querySelector('#curves input[value=tokens]').focus()")
    for kind in ("keyDown", "keyUp"):
        tab.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    assert tab.evaluate("document.activeElement.value") == "flops"
    tab.wait("document.querySelector('#chart-loss').textContent.includes('floating-point operations')")
    unreachable = """[...document.querySelectorAll('.scroll')].filter(
        element => element.scrollWidth > element.clientWidth && element.tabIndex < 0).length"""
    assert tab.evaluate(unreachable) == 0


def test_the_colour_scheme_may_change_while_reading(tab: Page, report: Path):
    tab.open(report, 1000)
    stroke = "document.querySelector('#chart-loss .mark-line path:last-child').getAttribute('stroke')"
    before = tab.evaluate(stroke)
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    tab.wait(f"{stroke} !== '{before}'")
    assert tab.errors == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_single_run_without_seeds_to_average(tab: Page, tmp_path: Path, width: int):
    write_run(tmp_path / "run", "direct_feedback", 0)
    tab.open(write_report([tmp_path / "run"], tmp_path / "report.html"), width)
    assert tab.errors == []
    assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_an_empty_run_draws_nothing_and_is_silent(tab: Page, tmp_path: Path):
    write_run(tmp_path / "run", "direct_feedback", 0)
    for name in ("summary.json", "metrics.jsonl", "samples.json"):
        (tmp_path / "run" / name).unlink()
    tab.open(write_report([tmp_path / "run"], tmp_path / "report.html"), 400)
    assert tab.errors == []
    assert tab.evaluate("document.querySelectorAll('svg.marks, canvas').length") == 0
