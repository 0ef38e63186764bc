"""What rules report of themselves, in the report."""

import json
from pathlib import Path

from heterodox.report.data import read_study
from heterodox.report.page import render
from heterodox.report.tables import monitor
from tests.unit.report.synthetic_study import write_study


def with_metrics(study: Path, recipe: str) -> None:
    """Give each run of the recipe two rows with metrics of its own."""
    for seed, run in enumerate(sorted((study / "runs" / recipe).iterdir())):
        own = {"meta_gain/joint": None, "residual": 3.0, "sparse_flops": 7}
        rows = [{"kind": "train", "step": step, "meta_gain/block_0": seed + step} | own for step in (10, 20)]
        rows[1]["meta_gain/joint"] = 0.5
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        manifest = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps(manifest | {"remarks": ["123 meta-parameters"]}))


def test_each_quantity_is_a_chart_and_each_part_a_curve(tmp_path):
    folder = write_study(tmp_path / "study", ("backprop", "direct_feedback"))
    with_metrics(folder, "direct_feedback")
    study = read_study([folder])
    gain, residual = monitor(study)
    assert (gain["recipe"], gain["quantity"], gain["parts"]) == ("direct_feedback", "meta_gain", ["block_0", "joint"])
    assert gain["rows"] == [
        {"part": "block_0", "step": 10, "value": 11.0},
        {"part": "block_0", "step": 20, "value": 21.0},
        {"part": "joint", "step": 20, "value": 0.5},
    ]
    assert residual["quantity"] == "residual"
    page = render(study)
    assert '<section id="monitor"' in page
    assert "direct_feedback: meta gain" in page
    assert "direct_feedback: 123 meta-parameters." in page


def test_without_any_there_is_no_such_section(tmp_path):
    study = read_study([write_study(tmp_path / "study", ("backprop",))])
    assert monitor(study) == []
    assert '<section id="monitor"' not in render(study)
