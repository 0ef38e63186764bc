"""Every rule's page has a figure, which is there, and the command that draws it."""

import re
from pathlib import Path

import pytest

from heterodox.report import write_figures

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "rules").glob("*.md"))
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
        study = figure.parent.name
        assert re.search(rf"heterodox report \S+/{study} --figures docs/figures/{study}`", text)


@pytest.mark.parametrize("study", ["shakespeare", "equilibrium", "meta_critic", "data_rater", "sparse", "sparse_90"])
def test_the_figures_are_those_of_the_results(study: str, tmp_path: Path):
    drawn = {path.name: path.read_text() for path in write_figures([ROOT / "results" / study], tmp_path)}
    kept = {path.name: path.read_text() for path in (ROOT / "docs" / "figures" / study).iterdir()}
    assert drawn.keys() == kept.keys()
    assert {name for name in kept if _words(drawn[name]) != _words(kept[name])} == set(), "draw them again"


def _words(figure: str) -> list[str]:
    """What is written in a figure, with the accessible descriptions of its points, whatever the size of a font."""
    return re.findall(r'>([^<>]+)</text>|aria-label="([^"]+)"', figure)
