"""Sweeps: every rule gets the same trials, the best becomes a recipe, and what failed is never the best."""

import datetime
import io
import itertools
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from heterodox.app.recipe import Recipe, load_recipe
from heterodox.cli.console import sweep_summary
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.study.sweep import Sweep, combinations, parse_search, trial_name, tried
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
        assert best.tuning.note.endswith("update.lr=1000000000.0: none (1 failed)")
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
    assert "backprop: the best update.lr lies at the end of what was tried; see whether it goes on beyond" in answer.out
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


def test_an_interrupted_sweep_names_no_best_and_goes_on(tmp_path):
    short = rule("backprop")
    Sweep([short], {"update.lr": [1e-3]}, tmp_path, jobs=1).run()
    assert (tmp_path / "best" / "backprop.yaml").exists()
    asked: list[int] = []

    def watch(jobs, seconds):
        if not asked and jobs[1].status == "finished":  # nothing is started before the next look for a signal
            asked.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    values = {"update.lr": [1e-3, 1e-2, 1e-4]}
    stopped = Sweep([short], values, tmp_path, jobs=1).run(watch)
    assert stopped["interrupted"] == signal.SIGINT
    (entry,) = stopped["rules"]
    assert [(trial["failed"], trial["unfinished"]) for trial in entry["trials"]] == [(0, 0), (0, 0), (0, 1)]
    assert (entry["best"], entry["file"]) == (None, None)
    assert not (tmp_path / "best" / "backprop.yaml").exists(), "the best of fewer trials is not left to be taken"
    assert {"1 unfinished", "the same command goes on from here"} <= shown(stopped, tmp_path)
    (entry,) = Sweep([short], values, tmp_path, jobs=1).run()["rules"]
    assert entry["best"] == {"update.lr": 1e-2}


def test_some_of_the_combinations_are_the_same_at_every_call_and_more_have_them_in():
    search = {"a": [*range(6)], "b": ["x", "y"], "c": [None, True, 0.5]}
    grid = combinations(search, None)
    assert len(grid) == 36
    assert grid[:2] == [{"a": 0, "b": "x", "c": None}, {"a": 0, "b": "x", "c": True}]
    draws = [combinations(search, trials) for trials in range(1, 40)]
    assert [len(draw) for draw in draws] == [*range(1, 36), 36, 36, 36, 36]
    for fewer, more in itertools.pairwise(draws):
        assert [choice for choice in more if choice in fewer] == fewer
    assert [choice for choice in grid if choice in draws[9]] == draws[9]
    huge = combinations({str(key): range(10) for key in range(12)}, 3)
    assert len(huge) == 3
    assert tried({"a": [1, 2, 3]}, [{"a": 3}, {"a": 1}]) == {"a": [1, 3]}


def test_a_name_is_no_other_trials_and_short_enough_for_a_folder():
    values = [1e-3, 1.0000001e-3, "a b", "a/b", None, "x" * 300, "x" * 301]
    names = {trial_name("rule", {"update.lr": value}) for value in values}
    assert len(names) == len(values)
    assert "rule-lr-0.001" in names
    assert all(len(name) <= 100 and re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


def best_of(swept: Sweep, lowest: str) -> Recipe:
    """The recipe that is written if the trial whose name has `lowest` in it won, without training."""
    runs = [
        {"recipe": t.recipe.name, "seed": 0, "status": "finished", "val_loss": 2.0 - (lowest in t.recipe.name)}
        | {"credit": "backprop", "flops": 1}
        for t in swept.trials
    ]
    kept = dict.fromkeys(("seeds", "corpus", "versions", "device", "created", "command", "interrupted"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swept.study, "run", lambda watch=None: kept | {"runs": runs, "elapsed_seconds": 1.0})
        (entry,) = swept.run()["rules"]
    return load_recipe(swept.out / entry["file"])


def test_a_part_that_is_searched_keeps_the_settings_that_are_searched_with_it(tmp_path):
    search = {"update.lr": [1e-3, 1e-2], "update.name": ["adamw", "sgd"]}
    best = best_of(Sweep([rule("backprop")], search, tmp_path), "lr-0.01-name-sgd")
    assert (best.update.name, best.update.lr) == ("sgd", 1e-2)


def test_the_trials_of_an_earlier_search_count(tmp_path):
    first = best_of(Sweep([rule("backprop")], {"update.lr": [1e-3, 1e-2]}, tmp_path / "1"), "0.01")
    best = best_of(Sweep([first], {"update.momentum": [0.0, 0.9], "update.lr": [1e-2, 3e-2]}, tmp_path / "2"), "0.9")
    assert best.tuning is not None
    assert best.tuning.trials == 2 + 4
    assert best.tuning.searched == {"update.momentum": [0.0, 0.9], "update.lr": [1e-3, 1e-2, 3e-2]}
    assert (
        "; before that, 2 trials: val loss (seed 0) at update.lr=0.001: 2.000; update.lr=0.01: 1.000"
        in best.tuning.note
    )


def test_only_what_was_drawn_was_searched(tmp_path):
    rates = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    sweep = Sweep([rule("backprop")], {"update.lr": rates}, tmp_path, trials=2)
    drawn = [trial.settings["update.lr"] for trial in sweep.trials]
    best = best_of(sweep, f"lr-{drawn[1]}")
    assert best.tuning is not None
    assert best.tuning.searched == {"update.lr": drawn}
    assert json.loads((tmp_path / "sweep.json").read_text())["rules"][0]["at_the_end"] == ["update.lr"]


def test_sources_and_values_of_other_kinds_are_written_and_read_back(tmp_path):
    plain = rule("backprop").dump() | {"name": "1e5", "description": "1e-3", "update": rule("backprop").update}
    sweep = Sweep([plain], {"update.lr": np.array([1e-3, 1e-2]), "update.momentum": (np.float64(0.5),)}, tmp_path)
    best = best_of(sweep, "0.01")
    assert (best.name, best.description, best.update.lr) == ("1e5", "1e-3", 1e-2)


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
        ({"update.momentum": [0.5, 1, 1.0]}, "1.0 is there twice"),
        ({"tuning.trials": [1, 2]}, "tuning.trials is no setting of a rule"),
        ({"credit.feedback": ["gaussian"]}, "backprop: unknown key 'credit.feedback'"),
        ({"update.lr": 1e-3}, "update.lr: found 0.001, expected a list of values to try"),
        ({"update.lr": [object()]}, "cannot stand in a recipe"),
        ({"update.lr": [datetime.date(2020, 1, 1)]}, "backprop: update.lr: found '2020-01-01'"),
    ],
)
def test_what_cannot_be_searched_is_refused(search, phrase, tmp_path):
    with pytest.raises(RecipeError) as caught:
        Sweep([rule("backprop")], search, tmp_path / "out", overrides=["run.budget.steps=6"])
    assert phrase in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_trials_that_come_to_the_same_are_refused(tmp_path):
    sparse = tiny_recipe(name="rigl", update={"name": "sparse", "topology": {"name": "set", "every": 5}})
    with pytest.raises(RecipeError, match=r"rigl: update.lr=0.001 and update.lr=0.1 come to the same recipe"):
        Sweep([sparse], {"update.lr": [1e-3, 1e-1]}, tmp_path, overrides=["update.around.lr=5e-3"])


def test_settings_that_fit_only_with_an_override_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(RecipeError, match=r"backprop: credit.feedback=gaussian fits only with the overrides"):
        Sweep([rule("backprop")], {"credit.feedback": ["gaussian"]}, tmp_path, overrides=["credit=feedback_alignment"])
    with pytest.raises(RecipeError, match="gives its trials names of its own; drop name="):
        Sweep([rule("backprop")], RATES, tmp_path, overrides=["name=mine"])
    with pytest.raises(RecipeError, match="at least one trial, found 0"):
        Sweep([rule("backprop")], RATES, tmp_path, trials=0)
    (tmp_path / "best").touch()
    with pytest.raises(CheckpointError, match="best is no folder"):
        Sweep([rule("backprop")], RATES, tmp_path).run()


def test_the_command_line_says_what_is_missing(tmp_path):
    recipe = written(tmp_path, "backprop")
    refused(heterodox("sweep", recipe), "missing option '--search'")
    refused(heterodox("sweep", "--search", "update.lr=1e-3"), "issing argument")
    refused(heterodox("sweep", "update.lr=1e-3", "--search", "update.lr=1e-3"), "give at least one recipe")
    refused(heterodox("sweep", recipe, "--search", "update.lr"), "'update.lr' is not of the form KEY=VALUE,VALUE")
    refused(heterodox("sweep", recipe, "--search", "update.lr=[1"), "the values are not YAML")
    refused(heterodox("sweep", recipe, recipe, "--search", "update.lr=1e-3"), "two recipes are called 'backprop'")
    twice = ["--search", "update.lr=1e-3", "--search", "update.lr=1e-2"]
    refused(heterodox("sweep", recipe, *twice), "update.lr is there twice; give all its values at once")


def shown(found: dict[str, Any], out: Path) -> set[str]:
    """Lines and cells of what the terminal says."""
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(sweep_summary(found, out))
    return {part.strip() for line in console.export_text().splitlines() for part in line.split("  ")}


def written(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(rule(name).to_yaml())
    return path
