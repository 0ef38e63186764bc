"""The Markdown form of a study's result."""

import json
from pathlib import Path

import pytest

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.report import write_markdown
from tests.unit.report.synthetic_study import write_study


def test_holds_the_command_the_table_and_the_failures(tmp_path: Path):
    folder = write_study(tmp_path / "study")
    results = json.loads((folder / "results.json").read_text())
    for entry in results["recipes"]:
        update = {"lr": 0.003}
        entry["resolved"] = {"update": {"around": update} if entry["name"] == "direct_feedback" else update}
    (folder / "results.json").write_text(json.dumps(results))
    text = write_markdown([folder], tmp_path / "deep" / "RESULTS.md").read_text()
    assert f"    heterodox report {folder} --out {tmp_path}/deep/RESULTS.md\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(results["recipes"])
    assert len({row.count("|") for row in rows}) == 1
    assert rows[0].startswith("| `backprop` |")
    assert all(" 0.003 |" in row for row in rows)
    assert "± " in rows[0]
    assert "*unigram entropy*" in text
    assert "diverged" in text


def test_refuses_a_folder_that_holds_nothing(tmp_path: Path):
    with pytest.raises(CheckpointError):
        write_markdown([tmp_path], tmp_path / "out.md")


def test_of_chosen_rules_only(tmp_path: Path):
    folder, out = write_study(tmp_path / "study"), tmp_path / "RESULTS.md"
    whole = write_markdown([folder], out).read_text()
    text = write_markdown([folder], out, ["head_only", "backprop"]).read_text()
    assert f"    heterodox report {folder} --rules head_only,backprop --out {out}\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["backprop", "head_only"]
    assert set(rows) < set(whole.splitlines()), "the figures are those of the whole study"
    assert "direct_feedback" in whole
    assert "direct_feedback" not in text
    without = write_markdown([folder], out, ["head_only", "direct_feedback"]).read_text()
    assert [line.split("|")[3].strip() for line in without.splitlines() if line.startswith("| `")] == ["–", "–"]
    assert "backprop" not in without, "another baseline than the study's would give other differences"
    with pytest.raises(RecipeError, match="no run of backprob; there are runs of backprop, "):
        write_markdown([folder], out, ["backprob"])
