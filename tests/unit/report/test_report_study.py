"""Reading and merging folders, whole and damaged."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from heterodox.core.errors import CheckpointError
from heterodox.report.data import Study, read_study
from tests.unit.report.synthetic_study import FINAL, write_run, write_study


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))


def test_a_study_is_read_whole(study: Study):
    assert study.recipes == list(FINAL)
    assert study.baseline == "backprop"
    assert len(study.runs) == 15
    assert study.notes == []
    run = study.of("direct_feedback")[1]
    assert (run.seed, run.finished, run.summary["credit"]) == (1, True, "direct_feedback")
    assert (len(run.evals), len(run.probes), len(run.samples)) == (41, 11, 2)
    assert [run.finished for run in study.of("sign_symmetry")] == [True, True, False]


def test_a_run_folder_alone(tmp_path: Path):
    write_run(tmp_path / "run", "direct_feedback", 4)
    study = read_study([tmp_path / "run"])
    assert (study.recipes, study.baseline, study.runs[0].seed) == (["direct_feedback"], None, 4)


def test_a_partial_last_line_is_ignored(tmp_path: Path):
    write_run(tmp_path / "run", "backprop", 0)
    whole = read_study([tmp_path / "run"]).runs[0].evals
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 20')
    study = read_study([tmp_path / "run"])
    assert study.runs[0].evals == whole
    assert study.notes == []


def test_a_damaged_line_in_the_middle_is_left_out_and_noted(tmp_path: Path):
    write_run(tmp_path / "run", "backprop", 0)
    path = tmp_path / "run/metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[5][:9], *lines[6:]]) + "\n")
    study = read_study([tmp_path / "run"])
    assert study.notes == [f"{tmp_path.name}/run: 1 damaged line of metrics.jsonl left out."]


def test_a_step_logged_twice_counts_once(tmp_path: Path):
    write_run(tmp_path / "run", "backprop", 0)
    again = {"kind": "eval", "step": 100, "tokens": 5, "flops": 5, "seconds": 1.0, "val_loss": 9.0}
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    evals = read_study([tmp_path / "run"]).runs[0].evals
    assert [row["step"] for row in evals] == list(range(0, 2001, 50))
    assert evals[2]["val_loss"] == 9.0


def test_meta_tokens_of_training_reach_the_evaluations(tmp_path: Path):
    write_run(tmp_path / "run", "backprop", 0)
    path = tmp_path / "run/metrics.jsonl"
    path.write_text(path.read_text().replace('"meta_tokens": 0', '"meta_tokens": 77'))
    assert {row["meta_tokens"] for row in read_study([tmp_path / "run"]).runs[0].evals} == {77}


def test_a_run_that_was_killed_has_no_summary(tmp_path: Path):
    folder = tmp_path / "runs/backprop/seed-3"
    write_run(folder, "backprop", 3)
    (folder / "summary.json").unlink()
    study = read_study([tmp_path])
    assert (study.runs[0].recipe, study.runs[0].seed, study.runs[0].finished) == ("backprop", 3, False)
    assert study.runs[0].summary["status"] == "interrupted"
    assert study.notes == [f"{tmp_path.name} has no results.json: the comparison did not end."]


def test_runs_of_one_recipe_merge_as_seeds(tmp_path: Path):
    for seed in (0, 1):
        write_run(tmp_path / f"seed-{seed}", "backprop", seed)
    study = read_study([tmp_path / "seed-0", tmp_path / "seed-1", tmp_path / "seed-0"])
    assert [(run.recipe, run.seed) for run in study.runs] == [("backprop", 0), ("backprop", 1)]
    assert study.baseline == "backprop"


def test_a_study_and_one_of_its_own_runs_are_not_counted_twice(folder: Path):
    assert len(read_study([folder, folder / "runs/backprop/seed-0"]).runs) == 15


def test_equal_seeds_of_two_folders_stay_apart(tmp_path: Path):
    for name in ("one", "two"):
        write_study(tmp_path / name, ("backprop", "head_only"), (0,))
    study = read_study([tmp_path / "one", tmp_path / "two"])
    assert study.recipes == ["backprop", "head_only", "backprop (two)", "head_only (two)"]
    assert study.descriptions["head_only (two)"] == "What head_only does, in a line."
    assert study.notes[0] == "“backprop (two)” stands beside another “backprop”."


def test_other_settings_under_one_name_stay_apart(tmp_path: Path):
    for seed in (0, 1):
        write_run(tmp_path / f"lr/seed-{seed}", "backprop", seed)
    path = tmp_path / "lr/seed-1/recipe.yaml"
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.1"))
    study = read_study([tmp_path / "lr/seed-0", tmp_path / "lr/seed-1"])
    assert study.recipes == ["backprop", "backprop (lr/seed-1)"]


def test_machine_settings_do_not_keep_seeds_apart(tmp_path: Path):
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        write_run(folder, "backprop", seed)
        config = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"run": {"threads": seed + 1}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    assert read_study([tmp_path / "seed-0", tmp_path / "seed-1"]).recipes == ["backprop"]


def test_a_run_that_never_began_needs_no_folder(tmp_path: Path):
    write_study(tmp_path, ("backprop",), (0, 1))
    results = json.loads((tmp_path / "results.json").read_text())
    shutil.rmtree(tmp_path / "runs/backprop/seed-1")
    results["runs"][1] |= {"status": "waiting", "val_loss": None}
    (tmp_path / "results.json").write_text(json.dumps(results))
    study = read_study([tmp_path])
    assert (len(study.runs), study.notes) == (2, [])


@pytest.mark.parametrize("name", ["empty", "absent", "file"])
def test_neither_study_nor_run(tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=f"{name} (neither|is no folder)") as error:
        read_study([tmp_path / name])
    assert "\n" not in str(error.value)


def test_no_folder_at_all():
    with pytest.raises(CheckpointError, match="at least one"):
        read_study([])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.json", "{", "cannot read"),
        ("results.json", "[]", "expected a dict"),
        ("results.json", '{"format": 2}', "has format 2; this version of heterodox reads 1"),
        ("results.json", '{"format": 1, "runs": [{"seed": 0}]}', "without recipe or seed"),
        ("results.json", '{"format": 1, "runs": []}', "nothing to report"),
        ("runs/backprop/seed-0/manifest.json", "{", "cannot read"),
        ("runs/backprop/seed-0/samples.json", "{}", "expected a list"),
        ("runs/backprop/seed-0/recipe.yaml", "a: [", "not YAML"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, text: str, message: str):
    write_study(tmp_path, ("backprop",), (0,))
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        read_study([tmp_path])
    assert "\n" not in str(error.value)
