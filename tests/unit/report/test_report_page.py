"""The page holds what it must, loads nothing, and cannot be broken by what a model wrote."""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from heterodox.core.errors import CheckpointError
from heterodox.report import write_markdown, write_report
from tests.unit.report.synthetic_study import FINAL, write_run, write_study


class Outline(HTMLParser):
    """Tags with their attributes, texts by tag, ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def data_of(outline: Outline) -> dict:
    scripts = outline.text["script"]
    return json.loads(next(text for text in scripts if text.startswith("{")))


def test_the_page_says_what_was_compared(page: str, outline: Outline):
    assert outline.text["title"] == ["5 recipes on stdlib · heterodox"]
    assert outline.of("html") == [{"lang": "en"}]
    for fact in ("9.81\u202fMB", "sha256 7c3f7c3f7c3f", "torch 2.13.0", "2026-01-15 09:30 UTC", "0, 1, 2"):
        assert fact in page
    assert "heterodox compare --seeds 3 --out study" in outline.text["code"]
    assert "direct_feedback closes 14\u202f%" in page
    assert [a["id"] for a in outline.of("section")] == [
        "results", "curves", "alignment", "origins", "samples", "recipes",
    ]  # fmt: skip


def test_the_table_has_every_recipe_and_the_references(page: str):
    table = page.split('<table class="results">')[1].split("</table>")[0]
    names = [re.sub("<.*?>", "", cell).strip() for cell in re.findall('<th scope="row">(.*?)</th>', table, re.S)]
    assert names == ["entropy floor", *FINAL, "unigram entropy"]
    assert "1 failed" in table
    assert "± 0.0" in table
    assert "3.28\u202fT" in table


def test_failures_are_listed_with_their_diagnosis(page: str):
    assert "The loss became NaN at step 1240; the gradient norm had grown to 4.1e6." in page


def test_charts_and_data_are_inlined_once(outline: Outline, page: str):
    data = data_of(outline)
    assert {f"loss/{c}/{s}" for c in ("tokens", "flops", "seconds") for s in ("linear", "log")} < set(data["charts"])
    assert len(data["data"]["means"]) == 5 * 41
    assert list(data["alignment"]) == ["backprop", "sign_symmetry", "feedback_alignment", "direct_feedback"]
    assert page.count("window.vegaEmbed=") == 1
    assert "$schema" not in json.dumps(data)
    assert len(page) < 1_500_000


def test_nothing_is_loaded_from_anywhere(page: str, outline: Outline):
    for tag, attributes in outline.tags:
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert not outline.of("iframe") + outline.of("img") + outline.of("object") + outline.of("base")
    styles = "".join(outline.text["style"])
    assert "@import" not in styles
    assert "url(" not in styles
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # the library names its editor and XML's name spaces
    assert not re.search(r"https?://|//[a-z]+\.", own)
    policy = outline.of("meta")[1]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_hostile_samples_stay_text(page: str, outline: Outline):
    assert len(outline.of("script")) == 3
    assert not any(text.strip() == "alert(1)" for text in outline.text["script"])
    shown = unescape(page)
    assert "</script><script>alert(1)</script><!-- <b>&amp; \\x00\\x1b[31m\ufffd" in shown
    assert "\x00" not in page
    assert "def " in outline.text["mark"]


def test_hostile_names_and_messages_stay_text(tmp_path: Path):
    write_study(tmp_path, ("backprop",), (0,))
    results = json.loads((tmp_path / "results.json").read_text())
    evil = "</script><script>alert(2)</script>{{ 7 * 7 }}"
    results["runs"][0] |= {"recipe": evil, "status": "failed", "message": evil}
    results |= {"command": evil, "baseline": evil, "recipes": [{"name": evil, "description": evil}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    outline = Outline(write_report([tmp_path], tmp_path / "page.html").read_text())
    assert len(outline.of("script")) == 3
    assert data_of(outline)["recipes"] == [evil]


def test_infinities_do_not_break_the_data(tmp_path: Path):
    summary = write_run(tmp_path / "run", "backprop", 0)
    rows = [
        {"kind": "eval", "step": s, "tokens": s, "flops": math.nan, "seconds": None, "val_loss": 3.0} for s in (0, 1)
    ]
    rows.append({"kind": "eval", "step": 2, "tokens": 2, "flops": 1, "seconds": 1, "val_loss": math.inf})
    rows.append({"kind": "probe", "step": 0, "alignment": {"head.weight": {"cosine": math.nan, "norm_ratio": 0.0}}})
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run/summary.json").write_text(json.dumps(summary | {"val_loss": math.inf}))
    outline = Outline(write_report([tmp_path / "run"], tmp_path / "page.html").read_text())
    assert [row["flops"] for row in data_of(outline)["data"]["seeds"]] == [None, None]


def test_a_bare_run_says_what_it_lacks(tmp_path: Path):
    write_run(tmp_path / "run", "backprop", 0)
    for name in ("metrics.jsonl", "manifest.json", "samples.json", "recipe.yaml"):
        (tmp_path / "run" / name).unlink()
    text = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    for line in (
        "No evaluation was logged.",
        "No run measured its alignment.",
        "No run left a manifest.",
        "No run wrote",
    ):
        assert line in text


def test_different_corpora_are_a_warning(tmp_path: Path):
    for seed, sha in ((0, "a" * 64), (1, "b" * 64)):
        summary = write_run(tmp_path / f"seed-{seed}", "backprop", seed)
        (tmp_path / f"seed-{seed}/summary.json").write_text(json.dumps(summary | {"corpus_sha256": sha}))
    text = write_report([tmp_path / "seed-0", tmp_path / "seed-1"], tmp_path / "page.html").read_text()
    assert "The runs are on 2 different corpora (aaaaaaaa, bbbbbbbb): their losses cannot be compared." in text


def test_the_page_is_replaced_in_one_step(folder: Path, tmp_path: Path):
    out = tmp_path / "deep/er/report.html"
    assert write_report([folder], out) == out
    page = out.read_text()
    out.write_text(page.replace("<h1>", "<h1>old "))
    write_report([folder], out)
    assert out.read_text() == page
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("write", [write_report, write_markdown], ids=["page", "tables"])
def test_what_is_no_report_is_not_replaced(write, folder: Path, tmp_path: Path):
    out = tmp_path / "notes.md"
    out.write_text("my notes")
    with pytest.raises(CheckpointError, match=r"notes.md is there already and is no report"):
        write(folder, out)
    assert out.read_text() == "my notes"


def test_an_unwritable_place_is_one_line(folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write") as error:
        write_report([folder], tmp_path / "file/report.html")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="cannot write"):
        write_report([folder], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
