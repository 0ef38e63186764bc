"""Studies: one run's failure is its own, what is finished is kept, what was stopped goes on."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from heterodox.app.folder import RunFolder
from heterodox.app.recipe import Recipe
from heterodox.app.train import train
from heterodox.cli.console import StudyProgress
from heterodox.core.errors import RecipeError
from heterodox.study.jobs import Job, run_jobs
from heterodox.study.study import Study
from heterodox.training.checkpoint import Checkpoints
from tests.command import heterodox, refused
from tests.saved import assert_same_bits, tensors, timeless
from tests.tiny import tiny_recipe

QUICK = {"budget": {"steps": 8}, "eval_every": 4, "log_every": 1}
RECIPES = {
    "backprop": tiny_recipe(name="backprop", run=QUICK),
    "boom": tiny_recipe(name="boom", update={"name": "sgd", "lr": 1e9}, learner={"clip": None}, run=QUICK),
    "long": tiny_recipe(name="long", credit="head_only", run=QUICK | {"budget": {"steps": 300}}),
}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's content and the time at which it was written."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def disturbed(out: Path, disturb: Any) -> dict[str, Any]:
    """The study of all recipes, with `disturb(job)` called once, when the long run writes checkpoints."""
    before = Checkpoints(out / "runs" / "long" / "seed-0" / "checkpoints").names()
    done: list[Job] = []

    def watch(jobs, seconds):
        (job,) = (job for job in jobs if job.recipe.name == "long")
        names = job.folder.checkpoints.names()
        if not done and job.process is not None and len(names) == 2 and names != before:
            done.append(job)
            disturb(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heterodox.study.study.run_jobs", partial(run_jobs, interval=0.02))
        patch.setattr("heterodox.study.study.write_report", lambda *_: None)
        return Study(list(RECIPES.values()), out, num_seeds=1, jobs=2).run(watch)


def by_name(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["recipe"]: row for row in results["runs"]}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A study whose long run is killed, then interrupted with the whole study, then left alone."""
    out = tmp_path_factory.mktemp("story") / "study"
    killed = disturbed(out, lambda job: os.kill(job.process.pid, signal.SIGKILL))
    kept = {name: snapshot(out / "runs" / name) for name in ("backprop", "boom")}
    stopped = disturbed(out, lambda job: os.kill(os.getpid(), signal.SIGINT))
    step = int(Checkpoints(out / "runs" / "long" / "seed-0" / "checkpoints").names()[-1].removeprefix("step-"))
    written = json.loads((out / "results.json").read_text())
    ended = disturbed(out, lambda job: None)
    return {
        "out": out,
        "killed": killed,
        "kept": kept,
        "stopped": stopped,
        "step": step,
        "written": written,
        "ended": ended,
    }


def test_a_diverged_and_a_killed_run_do_not_take_the_others_down(story):
    rows = by_name(story["killed"])
    assert {name: row["status"] for name, row in rows.items()} == {
        "backprop": "finished", "boom": "diverged", "long": "failed",
    }  # fmt: skip
    assert "it said nothing (killed by SIGKILL; see" in rows["long"]["message"]
    assert "The last good checkpoint is" in rows["boom"]["message"]
    assert rows["backprop"]["val_loss"] > 0
    assert rows["long"]["val_loss"] is None
    table = {row["recipe"]: row for row in story["killed"]["table"]}
    assert (table["backprop"]["seeds"], table["backprop"]["failed"]) == (1, 0)
    assert (table["long"]["seeds"], table["long"]["failed"]) == (0, 1)


def test_sigint_lets_the_children_checkpoint_and_writes_the_results(story):
    assert story["stopped"]["interrupted"] == signal.SIGINT
    long = by_name(story["stopped"])["long"]
    assert long["status"] == "interrupted"
    assert 0 < long["steps"] == story["step"] < 300
    assert by_name(story["written"])["long"]["status"] == "interrupted"


def test_the_rerun_goes_on_to_the_same_bits(story, tmp_path):
    long = by_name(story["ended"])["long"]
    assert (long["status"], long["steps"]) == ("finished", 300)
    train(RECIPES["long"], tmp_path / "alone")
    folder = story["out"] / long["run"]
    assert_same_bits(tensors(folder), tensors(tmp_path / "alone"))
    assert timeless(folder) == timeless(tmp_path / "alone")


def test_the_time_of_all_calls_is_told(story):
    assert 0 < story["killed"]["elapsed_seconds"] < story["stopped"]["elapsed_seconds"]
    assert story["stopped"]["elapsed_seconds"] < story["ended"]["elapsed_seconds"]


def test_finished_and_diverged_runs_are_kept_as_they_are(story):
    for name, before in story["kept"].items():
        assert snapshot(story["out"] / "runs" / name) == before


def test_the_results_hold_what_outsiders_rely_on(story):
    results = json.loads((story["out"] / "results.json").read_text())
    keys = {
        "recipe", "seed", "steps", "tokens", "meta_tokens", "flops", "seconds", "val_loss", "val_bits_per_byte",
        "test_loss", "activation_bytes", "peak_memory_bytes", "parameters", "active_parameters", "corpus_sha256",
        "status",
    }  # fmt: skip
    for row in results["runs"]:
        assert keys <= row.keys()
        summary = json.loads((story["out"] / row["run"] / "summary.json").read_text())
        assert {key: row[key] for key in keys} == {key: summary[key] for key in keys}
    assert results["interrupted"] is None
    assert results["seeds"] == [0]
    assert results["baseline"] == "backprop"
    assert len({row["corpus_sha256"] for row in results["runs"]}) == 1


def files(folder: Path, *recipes: Recipe) -> list[Path]:
    for recipe in recipes:
        (folder / f"{recipe.name}.yaml").write_text(recipe.to_yaml())
    return [folder / f"{recipe.name}.yaml" for recipe in recipes]


def test_the_command_shows_the_table_and_fails_where_a_run_did(story, tmp_path):
    answer = heterodox("compare", *files(tmp_path, *RECIPES.values()), "--out", story["out"])
    assert answer.code == 1
    header = answer.out.splitlines()[0]
    assert "− backprop" in header
    assert "boom seed 0 diverged: " in answer.out
    assert f"report: {story['out'] / 'report.html'}" in answer.out
    assert "boom seed 0: diverged" in answer.err
    assert "100% after" in answer.err
    assert (story["out"] / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_tells_the_signal_that_stopped_it(number, code, story, tmp_path, monkeypatch):
    monkeypatch.setattr(StudyProgress, "update", lambda *_: os.kill(os.getpid(), number))
    monkeypatch.setattr("heterodox.study.study.write_report", lambda *_: None)
    answer = heterodox("compare", *files(tmp_path, *RECIPES.values()), "--out", story["out"])
    assert answer.code == code
    assert "the same command goes on from here" in answer.out
    assert not answer.err


def test_a_study_does_not_replace_the_results_of_another(story, tmp_path):
    before = (story["out"] / "results.json").read_bytes()
    some = files(tmp_path, RECIPES["backprop"], RECIPES["long"])
    refused(
        heterodox("compare", *some, "--out", story["out"]), "holds a comparison with boom at seed 0", "another --out"
    )
    every = files(tmp_path, *RECIPES.values())
    answer = heterodox("compare", *every, "--out", story["out"], "update.weight_decay=0.5")
    refused(answer, "holds a run of another recipe: update.weight_decay is", "another --out")
    assert (story["out"] / "results.json").read_bytes() == before


def test_two_studies_do_not_share_a_folder(story, tmp_path):
    with RunFolder(story["out"]).lock():
        answer = heterodox("compare", *files(tmp_path, *RECIPES.values()), "--out", story["out"])
    refused(answer, f"another process is training in {story['out']}")


def test_recipes_that_cannot_be_compared(tmp_path):
    first, second = files(tmp_path, RECIPES["backprop"], RECIPES["boom"])
    refused(
        heterodox("compare", first, second, "name=same", "--out", tmp_path / "out"), "two recipes are called 'same'"
    )
    (other,) = files(tmp_path, tiny_recipe(name="other", data={"tokenizer": "byte"}))
    answer = heterodox("compare", first, other, "--out", tmp_path / "out")
    refused(answer, "backprop and other are not on the same tokens")
    (cut,) = files(tmp_path, tiny_recipe(name="cut", data={"separator": "  "}))
    answer = heterodox("compare", first, cut, "--out", tmp_path / "out")
    refused(answer, "backprop and cut are not on the same tokens")
    (tmp_path / "empty").mkdir()
    refused(heterodox("compare", tmp_path / "empty"), "holds no recipe (*.yaml)")
    refused(heterodox("compare", first, "--out", tmp_path / "out", "run.device=cuda:99"), "run.device is 'cuda:99'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"run": {"eval_batches": 2}}, "run.eval_batches × run.eval_batch_size 128 and 64"),
        ({"run": {"eval_batches": None}}, "run.eval_batches × run.eval_batch_size 128 and all"),
        ({"run": {"eval_batch_size": 16}}, "run.eval_batches × run.eval_batch_size 128 and 64"),
        ({"model": {"context": 8}}, "model.context 16 and 8"),
    ],
)
def test_recipes_that_would_be_evaluated_on_different_windows(sections, said, tmp_path):
    recipes = [RECIPES["backprop"], tiny_recipe(name="other", **sections)]
    answer = heterodox("compare", *files(tmp_path, *recipes), "--out", tmp_path / "out")
    refused(answer, "backprop and other would be evaluated on different windows", said)
    assert not (tmp_path / "out").exists()


def test_the_same_windows_in_other_batches_are_compared(tmp_path):
    other = tiny_recipe(name="other", run={"eval_batches": 8, "eval_batch_size": 16})
    assert len(Study([RECIPES["backprop"], other], tmp_path, num_seeds=1).jobs) == 2


@pytest.mark.parametrize("numbers", [{"num_seeds": 0}, {"num_seeds": 1, "jobs": 0}])
def test_a_study_of_nothing_is_refused(numbers, tmp_path):
    with pytest.raises(RecipeError, match="at least one seed and one job"):
        Study([tiny_recipe()], tmp_path, **numbers)


def test_seeds_and_threads_are_set_for_every_run(tmp_path):
    free = tiny_recipe(seed=5, run={"threads": None})
    study = Study([free], tmp_path, num_seeds=3, jobs=1)
    assert [job.recipe.seed for job in study.jobs] == [5, 6, 7]
    assert all(job.recipe.run.threads >= 1 for job in study.jobs)
    assert [job.folder.path.name for job in study.jobs] == ["seed-5", "seed-6", "seed-7"]
