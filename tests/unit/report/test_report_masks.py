"""The section on masks: from metrics rows to the page."""

import json
import shutil

import pytest

from heterodox.report import write_report
from heterodox.report.data import read_study
from heterodox.report.drawings import density_cells, drawings
from heterodox.report.statistics import table
from heterodox.report.tables import mask_courses, mask_table, masks

LAYERS = ("blocks.1.mlp.fc.weight", "blocks.0.attn.q.weight")


def mask_row(step: int, event: int, **more) -> dict:
    layers = {
        name: {"active": 20 + 10 * place + event, "size": 100, "dead_outputs": place, "dead_inputs": 0}
        for place, name in enumerate(LAYERS)
    }
    row = {"kind": "mask", "step": step, "event": event, "active": 50 + 2 * event, "size": 200, "layers": layers}
    return row | {"explored": 0.25 + 0.1 * event, "overlap": 1 - 0.1 * event, "grown": 1, "dropped": 1} | more


def candidate(step: int, number: int, loss: float | None, won: bool) -> dict:
    return {"kind": "candidate", "step": step, "candidate": number, "ce": loss, "won": won, "reset": number == 2}


@pytest.fixture
def sparse_study(folder, tmp_path):
    """The synthetic study, one of whose runs is sparse and has searched."""
    copy = tmp_path / "study"
    shutil.copytree(folder, copy)
    results = json.loads((copy / "results.json").read_text())
    run = next(row for row in results["runs"] if row["recipe"] == "backprop" and row["seed"] == 0)
    run |= {"search_seconds": 0.04 * run["seconds"], "sparse_flops": 1_500_000_000}
    (copy / "results.json").write_text(json.dumps(results))
    rows = [mask_row(1, 0), mask_row(100, 1, child_wins=1.0), mask_row(100, 1, child_wins=1.0), mask_row(200, 2)]
    rows[-1] |= {"child_wins": 0.5, "below_parent": 0.25, "upsets": 0.125}
    rows += [candidate(100, 0, 2.0, False), candidate(100, 1, 1.9, True), candidate(100, 2, None, False)]
    rows += [candidate(200, 0, 1.8, True), candidate(200, 1, 1.85, False), candidate(200, 2, 2.8, False)]
    with (copy / run["run"] / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return copy


def test_densities_courses_and_decisions(sparse_study):
    study = read_study([sparse_study])
    assert list(found := masks(study)) == ["backprop"]
    assert found["backprop"]["steps"] == [1, 100, 200]
    assert found["backprop"]["layers"] == [LAYERS[1], LAYERS[0]]  # from the input to the output
    assert found["backprop"]["density"] == [[0.3, 0.31, 0.32], [0.2, 0.21, 0.22]]
    courses = mask_courses(study)
    assert [row["explored"] for row in courses["courses"]] == pytest.approx([0.25, 0.35, 0.45])
    assert [row["density"] for row in courses["courses"]] == pytest.approx([0.25, 0.26, 0.27])
    assert [row["dead"] for row in courses["courses"]] == [1, 1, 1]
    told = [(row["step"], round(row["change"], 6), row["won"], row["what"]) for row in courses["decisions"]]
    assert told == [(100, -0.1, True, "swap"), (200, 0.05, False, "swap"), (200, 1.0, False, "reset")]


def test_the_table_has_means_of_what_is_known(sparse_study):
    (line,) = mask_table(read_study([sparse_study]))
    assert (line["connections"], line["dead"], line["events"], line["child_wins"]) == (54, 1, 2, 0.5)
    assert (line["below_parent"], line["upsets"]) == (0.25, 0.125)
    assert line["gain"] == pytest.approx(-0.1)
    assert line["search"] == pytest.approx(0.04)
    assert line["overlap"] == pytest.approx(0.85)


def test_the_page_shows_masks_only_where_there_are_any(sparse_study, page, tmp_path):
    shown = write_report([sparse_study], tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="masks"' in shown
    assert "chart-decisions" in shown
    assert "4.0 %" in shown
    assert 'id="masks"' not in page


def test_the_density_of_layers_and_that_of_the_whole_are_two_charts(sparse_study):
    study = read_study([sparse_study])
    drawn = drawings(study, table([run.summary for run in study.runs], study.baseline))
    assert drawn.charts["masks/layers"]["mark"]["type"] == "rect"
    assert drawn.charts["masks/density"]["mark"]["type"] == "line"
    cells = density_cells(drawn.masks["backprop"])
    assert len(cells) == 2 * 3
    assert cells[3] == {"layer": LAYERS[0], "row": 1, "step": 1, "density": 0.2}


def test_a_run_that_was_killed_early_has_no_holes_in_its_table(sparse_study):
    metrics = sparse_study / "runs" / "backprop" / "seed-0" / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines() if '"kind": "mask"' not in line]
    metrics.write_text("\n".join([*lines, json.dumps(mask_row(1, 0))]) + "\n")
    (line,) = mask_table(read_study([sparse_study]))
    assert line["overlap"] is None
    assert line["child_wins"] is None
