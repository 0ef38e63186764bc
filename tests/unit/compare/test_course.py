"""What results.json keeps of each run's way, and a report without the run folders."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from heterodox.report.data import read_study
from heterodox.report.series import curves
from heterodox.study.study import course
from tests.unit.report.synthetic_study import write_study


def test_alignment_is_the_mean_over_the_second_half(tmp_path: Path):
    run = read_study([write_study(tmp_path, ("backprop", "feedback_alignment"), (0,))]).of("feedback_alignment")[0]
    kept = course(run)
    assert [row["val_loss"] for row in kept["evals"]] == [row["val_loss"] for row in run.evals]
    late = [row["alignment"] for row in run.probes if row["step"] > run.summary["steps"] / 2]
    assert 0 < len(late) < len(run.probes)
    name = "blocks.1.attn.v.weight"
    expected = sum(probe[name]["cosine"] for probe in late) / len(late)
    assert kept["alignment"][name]["cosine"] == pytest.approx(expected, abs=1e-4)
    assert "alignment" not in course(replace(run, probes=[]))


def test_a_study_without_its_runs_has_its_curves(tmp_path: Path):
    folder = write_study(tmp_path / "study", ("backprop", "head_only", "feedback_alignment"))
    whole = read_study([folder])
    results = json.loads((folder / "results.json").read_text())
    runs = {(run.recipe, run.seed): run for run in whole.runs}
    results["runs"] = [row | course(runs[row["recipe"], row["seed"]]) for row in results["runs"]]
    (folder / "results.json").write_text(json.dumps(results))
    before = curves(whole)
    shutil.rmtree(folder / "runs")
    alone = read_study([folder])
    assert curves(alone) == before
    assert before["means"]
    assert any("alignment and samples are not shown" in note and "curves" not in note for note in alone.notes)
