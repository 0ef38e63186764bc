"""Charts as files: all that the page has, complete, in colours of their own, and drawn without a browser."""

import re
from pathlib import Path
from xml.etree import ElementTree

import altair as alt
import pytest
import vl_convert

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.report import write_figures
from heterodox.report.charts import pareto, scores_chart
from tests.unit.report.synthetic_study import COSINE, FINAL, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def drawn(study: Path) -> dict[str, Path]:
    return {path.stem: path for path in write_figures([study], study / "figures")}


def text_of(path: Path) -> list[str]:
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]


def test_every_chart_of_the_page_is_a_file(drawn: dict[str, Path]):
    wanted = {"final"} | {f"{kind}_{cost}" for kind in ("loss", "gap") for cost in ("tokens", "flops", "seconds")}
    wanted |= {f"pareto_{cost}" for cost in ("flops", "activation_bytes", "tokens", "seconds")} - {"pareto_tokens"}
    wanted |= {f"{measure}_{name}" for measure in ("cosine", "norm_ratio", "sign_agreement") for name in COSINE}
    assert set(drawn) - {"pareto_tokens"} == wanted
    assert all(path.suffix == ".svg" for path in drawn.values())


def test_a_figure_names_its_recipes_and_needs_nothing_else(drawn: dict[str, Path]):
    for name in ("loss_flops", "pareto_flops"):
        assert set(FINAL) <= set(text_of(drawn[name])), name
        page = drawn[name].read_text(encoding="utf-8")
        assert "var(" not in page
        assert not re.search(r"(href|src)=.(?!#)", page)
    colours = set(re.findall(r"#[0-9a-f]{6}", drawn["loss_flops"].read_text(encoding="utf-8")))
    assert {"#16181d", "#83878f", "#244c99"} <= colours, "baseline, head_only, the first hue"


def test_an_alignment_map_has_a_cell_for_each_probe(drawn: dict[str, Path]):
    page = drawn["cosine_direct_feedback"].read_text(encoding="utf-8")
    cells = page[page.index("mark-rect") :].count("<path")
    assert cells >= (2 + 4 * 6 + 1) * 11
    assert "tok_emb" in text_of(drawn["cosine_direct_feedback"])


def test_chosen_rules_alone_are_drawn(study: Path, tmp_path: Path):
    found = {path.stem: path for path in write_figures([study], tmp_path, rules=["backprop", "direct_feedback"])}
    assert "cosine_direct_feedback" in found
    assert "cosine_head_only" not in found
    assert {"backprop", "direct_feedback"} <= set(text_of(found["loss_flops"]))
    assert "head_only" not in found["loss_flops"].read_text(encoding="utf-8")


def test_png_and_svg_side_by_side(tmp_path: Path):
    small = write_study(tmp_path / "study", recipes=("head_only",), seeds=(0,))
    found = write_figures([small], tmp_path, ("svg", "png"))
    assert len(found) == len(set(found)) == 2 * len({path.stem for path in found})
    image = (tmp_path / "final.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert int.from_bytes(image[16:20], "big") > 1500, "wide enough for print"


def test_histograms_of_scores_stand_on_zero():
    bins = [{"low": number / 4, "high": (number + 1) / 4, "share": 0.25} for number in range(4)]
    rows = [{"recipe": "rater", "kind": kind} | row for kind in ("clean", "noise") for row in bins]
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    drawn = vl_convert.vegalite_to_svg(scores_chart() | {"datasets": {"scores": rows}}, vl_version=version)
    heights = [abs(float(found)) for found in re.findall(r'<path aria-label="low[^>]*v(-?[\d.]+)', drawn)]
    assert len(heights) == len(rows)
    assert min(heights) > 100, "of 180 pixels"


def test_what_cannot_be_drawn_is_said(study: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="svg or png, found pdf"):
        write_figures([study], tmp_path, ("svg", "pdf"))
    with pytest.raises(CheckpointError, match="neither holds results"):
        write_figures([tmp_path], tmp_path / "out")


def row(name: str, loss: float, flops: float, held: float) -> dict:
    value = {"mean": loss, "low": None, "high": None, "n": 1}
    costs = {"flops": flops, "activation_bytes": held, "tokens": 10, "meta_tokens": 5, "seconds": None}
    return {"recipe": name, "val_loss": value} | costs


def test_the_front_holds_what_no_other_beats_on_both():
    rows = pareto([
        row("best", 1.0, 30, 30), row("dearer", 1.0, 31, 30), row("worse", 1.5, 30, 20), row("cheap", 2.0, 10, 25),
        {"recipe": "failed", "val_loss": None} | dict.fromkeys(("flops", "activation_bytes", "tokens", "seconds")),
    ])  # fmt: skip
    assert [entry["recipe"] for entry in rows if entry["front_flops"]] == ["best", "cheap"]
    assert [entry["recipe"] for entry in rows if entry["front_activation_bytes"]] == ["best", "dearer", "worse"]
    assert {entry["tokens"] for entry in rows} == {15}, "meta tokens are charged"
    assert not any("front_seconds" in entry for entry in rows)
