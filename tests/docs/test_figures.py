"""Every rule's page has a figure, which is there, and the command that draws it."""

import re
from pathlib import Path

import pytest

from heterodox.report import write_figures

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "rules").glob("*.md"))
FROM_RESULTS = re.compile(r"`heterodox report (results/\S+)(?: --rules (\S+))? --figures (docs/figures/\S+)`")
COMMANDS = sorted({found for page in PAGES for found in FROM_RESULTS.findall(page.read_text(encoding="utf-8"))})
WITHOUT = {"self_distillation"}
"""An objective, whose effect is measured with the masks that it goes with."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_its_figure_and_how_to_draw_it(page: Path):
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\((\.\./figures/\S+\.svg)\)", text)
    assert bool(shown) == (page.stem not in WITHOUT)
    for link in shown:
        figure = (page.parent / link).resolve()
        assert figure.read_text(encoding="utf-8").startswith("<svg")
        assert re.search(rf"heterodox report \S+( --rules \S+)? --figures docs/figures/{figure.parent.name}`", text)


def test_commands_that_draw_from_results_are_found():
    assert len(COMMANDS) >= 5
    assert any(rules for _, rules, _ in COMMANDS)


@pytest.mark.parametrize(("study", "rules", "folder"), COMMANDS)
def test_the_figures_are_those_of_the_results(study: str, rules: str, folder: str, tmp_path: Path):
    written = write_figures([ROOT / study], tmp_path, rules=rules.split(",") if rules else ())
    drawn = {path.name: path.read_text() for path in written}
    kept = {path.name: path.read_text() for path in (ROOT / folder).iterdir()}
    assert drawn.keys() == kept.keys()
    assert {name for name in kept if _words(drawn[name]) != _words(kept[name])} == set(), "draw them again"


def _words(figure: str) -> list[str]:
    """What is written in a figure, with the accessible descriptions of its points, whatever the size of a font."""
    return re.findall(r'>([^<>]+)</text>|aria-label="([^"]+)"', figure)
