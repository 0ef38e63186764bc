"""Sweeps: every rule gets the same trials, the best becomes a recipe, and what failed is never the best."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from heterodox.comparison.sweep import Sweep, combinations, parse_search
from heterodox.core.errors import RecipeError
from heterodox.log.console import sweep_summary
from heterodox.recipe import Recipe, load_recipe
from tests.command import heterodox, refused
from tests.tiny import tiny_recipe

RATES = {"update.lr": [1e-3, 1e-2, 1e9]}
RUN = {"budget": {"steps": 8}, "eval_every": 8, "log_every": 1}
RULES = ["backprop", "direct_feedback"]


def rule(name: str) -> Recipe:
    return tiny_recipe(name=name, credit=name, update={"name": "sgd", "lr": 0.1}, learner={"clip": None}, run=RUN)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    Sweep([rule(name) for name in RULES], RATES, out, overrides=["run.budget.steps=6"]).run()
    return out


def found(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["recipe"]: entry for entry in json.loads((out / "sweep.json").read_text())["rules"]}


def test_every_rule_has_every_trial_and_the_lowest_validation_loss_is_the_best(swept):
    for name in RULES:
        entry = found(swept)[name]
        losses = {trial["settings"]["update.lr"]: trial["val_loss"] for trial in entry["trials"]}
        assert list(losses) == RATES["update.lr"]
        assert losses[1e9] is None, "it diverged"
        assert [trial["failed"] for trial in entry["trials"]] == [0, 0, 1]
        assert losses[1e-2]["mean"] < losses[1e-3]["mean"]
        assert entry["best"] == {"update.lr": 1e-2}
        assert entry["at_the_end"] == [], "what was tried beyond it failed"
        summary = swept / "runs" / f"{name}-lr-0.01" / "seed-0" / "summary.json"
        assert json.loads(summary.read_text())["val_loss"] == losses[1e-2]["mean"]
        assert json.loads(summary.read_text())["steps"] == 6


def test_the_best_is_a_recipe_that_says_how_it_was_found(swept):
    for name in RULES:
        best = load_recipe(swept / "best" / f"{name}.yaml")
        assert best.tuning is not None
        assert (best.tuning.trials, best.tuning.seeds, best.tuning.searched) == (3, 1, RATES)
        assert "val loss (seed 0, run.budget.steps=6) at update.lr=0.001: " in best.tuning.note
        assert best.tuning.note.endswith("update.lr=1e+09: none (1 failed)")
        assert best.update.lr == 1e-2
        plain = load_recipe(rule(name), ["update.lr=1e-2"])
        assert best.model_copy(update={"tuning": None}) == plain, "the shorter budget was the search's alone"


def test_a_finished_sweep_is_kept_and_more_values_are_added_to_it(swept):
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("metrics.jsonl")}
    assert len(before) == 6
    wider = {"update.lr": [*RATES["update.lr"], 3e-2]}
    again = Sweep([rule(name) for name in RULES], wider, swept, overrides=["run.budget.steps=6"]).run()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [len(entry["trials"]) for entry in again["rules"]] == [4, 4]


def test_a_best_at_the_end_of_what_was_tried_is_told(tmp_path):
    answer = heterodox(
        "sweep", written(tmp_path, "backprop"), "--search", "update.lr=1e-4,1e-2", "--search", "learner.clip=null",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert answer.code == 0
    assert "backprop: the best update.lr lies at the end of what was tried; try one more beyond it" in answer.out
    assert "clip lies at the end" not in answer.out, "nothing else was tried"
    assert f"best: {tmp_path / 'out' / 'best' / 'backprop.yaml'}" in answer.out
    names = sorted(path.name for path in (tmp_path / "out" / "runs").iterdir())
    assert names == ["backprop-lr-0.0001-clip-null", "backprop-lr-0.01-clip-null"]
    assert "searched" in yaml.safe_load((tmp_path / "out" / "best" / "backprop.yaml").read_text())["tuning"]


def test_where_nothing_finishes_there_is_no_best(tmp_path):
    answer = heterodox("sweep", written(tmp_path, "backprop"), "--search", "update.lr=1e9", "--out", tmp_path / "out")
    assert answer.code == 1
    assert "backprop: no trial finished at every seed" in answer.out
    assert not (tmp_path / "out" / "best").exists()


def test_an_interrupted_sweep_names_no_best(swept, tmp_path):
    sweep = Sweep([rule("backprop")], {"update.lr": [1e-2]}, tmp_path)
    done = json.loads((swept / "results.json").read_text())
    rows = [row | {"recipe": "backprop-lr-0.01"} for row in done["runs"] if row["recipe"] == "backprop-lr-0.01"]
    assert rows[0]["status"] == "finished"
    sweep.study.run = lambda watch=None: done | {"runs": rows, "interrupted": 2}  # type: ignore[method-assign]
    stopped = sweep.run()
    assert stopped["rules"][0]["trials"][0]["val_loss"] is not None
    assert stopped["rules"][0]["best"] is None
    assert not (tmp_path / "best").exists()
    assert "the same command goes on from here" in sweep_summary(stopped, tmp_path).renderables  # type: ignore


def test_some_of_the_combinations_are_the_same_for_all_and_at_every_call():
    search = {"a": [1, 2, 3], "b": ["x", "y"]}
    grid = combinations(search, None)
    assert len(grid) == 6
    assert grid[0] == {"a": 1, "b": "x"}
    some = combinations(search, 4)
    assert some == combinations(search, 4)
    assert len(some) == 4
    assert [choice for choice in grid if choice in some] == some
    assert combinations(search, 60) == grid


def test_values_are_read_as_in_a_recipe():
    search = parse_search(["update.lr=1e-3, 3e-3", "credit.feedback=gaussian,orthogonal", "learner.clip=null,1.0"])
    assert search == {
        "update.lr": [1e-3, 3e-3], "credit.feedback": ["gaussian", "orthogonal"], "learner.clip": [None, 1.0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("search", "phrase"),
    [
        ({}, "nothing to search: give --search KEY=VALUE,VALUE"),
        ({"update.lr": []}, "update.lr: no values to try"),
        ({"update.lr": [1e-3, 2e-3, 1e-3]}, "update.lr: 0.001 is there twice"),
        ({"update.lrr": [1e-3]}, "unknown key 'update.lrr'; did you mean 'lr'?"),
        ({"update.lr": [-1]}, "update.lr: found -1"),
        ({"seed": [0, 1]}, "seed is no setting of a rule"),
        ({"run.budget.steps": [5, 10]}, "run.budget.steps is searched and overridden; drop one"),
        ({"model.context": [4, 8]}, "would be evaluated on different windows"),
    ],
)
def test_what_cannot_be_searched_is_refused(search, phrase, tmp_path):
    with pytest.raises(RecipeError) as caught:
        Sweep([rule("backprop")], search, tmp_path / "out", overrides=["run.budget.steps=6"])
    assert phrase in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_is_missing(tmp_path):
    recipe = written(tmp_path, "backprop")
    refused(heterodox("sweep", recipe), "missing option '--search'")
    refused(heterodox("sweep", "--search", "update.lr=1e-3"), "issing argument")
    refused(heterodox("sweep", "update.lr=1e-3", "--search", "update.lr=1e-3"), "give at least one recipe")
    refused(heterodox("sweep", recipe, "--search", "update.lr"), "'update.lr' is not of the form KEY=VALUE,VALUE")
    refused(heterodox("sweep", recipe, "--search", "update.lr=[1"), "the values are not YAML")
    refused(heterodox("sweep", recipe, recipe, "--search", "update.lr=1e-3"), "two recipes have the same name")
    twice = ["--search", "update.lr=1e-3", "--search", "update.lr=1e-2"]
    refused(heterodox("sweep", recipe, *twice), "update.lr is there twice; give all its values at once")


def written(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(rule(name).to_yaml())
    return path
