"""SIGINT and SIGTERM: the step is finished, a checkpoint written, and --resume goes on to the same bits."""

import json
import os
import signal

import pytest
import torch

from heterodox.app.train import train
from heterodox.cli.console import TrainingProgress
from heterodox.training.checkpoint import Checkpoints
from heterodox.training.interrupt import PARENT, Interrupt
from tests.command import heterodox, recipe_file
from tests.saved import assert_same_bits, tensors, timeless
from tests.tiny import tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_file(tmp_path_factory.mktemp("recipe"), run={"log_every": 1}, model={"dropout": 0.1})


@pytest.fixture(scope="module")
def whole(recipe):
    out = recipe.parent / "whole"
    assert heterodox("train", recipe, "--out", out, "--quiet").code == 0
    return out


def signal_at(step: int, number: int, patch: pytest.MonkeyPatch, kind: str = "train") -> None:
    """Send this process the signal when the metrics of `step` are told."""

    def row(self, row):
        if (row["kind"], row["step"]) == (kind, step):
            os.kill(os.getpid(), number)

    patch.setattr(TrainingProgress, "row", row)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_step_is_finished_and_the_run_goes_on_to_the_same_bits(number, code, recipe, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(17, number, patch)
        answer = heterodox("train", recipe, "--out", out)
    assert answer.code == code
    assert "tiny seed 0: interrupted after 17 steps; --resume goes on from here" in answer.out
    assert not answer.err
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["val_step"]) == ("interrupted", 17, 10)
    assert summary["test_loss"] is None
    assert Checkpoints(out / "checkpoints").names()[-1] == "step-00000017"
    assert heterodox("train", recipe, "--out", out, "--resume", "--quiet").code == 0
    assert_same_bits(tensors(out), tensors(whole))
    assert timeless(out) == timeless(whole)
    ended, undisturbed = (json.loads((path / "summary.json").read_text()) for path in (out, whole))
    for key in ("status", "steps", "tokens", "flops", "val_loss", "test_loss", "activation_bytes"):
        assert ended[key] == undisturbed[key], key


def test_a_signal_during_the_first_evaluation_stops_after_the_first_step(recipe, tmp_path, monkeypatch):
    signal_at(0, signal.SIGTERM, monkeypatch, "eval")
    assert heterodox("train", recipe, "--out", tmp_path / "run", "--quiet").code == 143
    assert Checkpoints(tmp_path / "run" / "checkpoints").names() == ["step-00000000", "step-00000001"]


def test_a_signal_in_the_last_step_finds_the_run_finished(recipe, whole, tmp_path, monkeypatch):
    signal_at(30, signal.SIGINT, monkeypatch)
    assert heterodox("train", recipe, "--out", tmp_path / "run", "--quiet").code == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert_same_bits(tensors(tmp_path / "run"), tensors(whole))


def test_a_finished_run_is_evaluated_where_it_ended(recipe, tmp_path, monkeypatch):
    """Whether a signal came in its last step, or it was resumed with a budget that was already spent."""
    shorter = ("run.budget.steps=17", "run.schedule=constant")
    plain, signalled, lowered = (tmp_path / name for name in ("plain", "signalled", "lowered"))
    assert heterodox("train", recipe, *shorter, "--out", plain, "--quiet").code == 0
    for out, budget, code in ((signalled, shorter, 0), (lowered, ("run.schedule=constant",), 143)):
        with monkeypatch.context() as patch:
            signal_at(17, signal.SIGTERM, patch)
            assert heterodox("train", recipe, *budget, "--out", out).code == code
    again = ("train", recipe, *shorter, "--out", lowered, "--resume", "--quiet")
    assert [heterodox(*again).code for _ in range(2)] == [0, 0]
    wanted = json.loads((plain / "summary.json").read_text())
    assert (wanted["status"], wanted["val_step"]) == ("finished", 17)
    for out in (signalled, lowered):
        summary = json.loads((out / "summary.json").read_text())
        assert {key: summary[key] for key in ("status", "val_step", "val_loss", "test_loss")} == {
            key: wanted[key] for key in ("status", "val_step", "val_loss", "test_loss")
        }
        assert timeless(out) == timeless(plain)
        assert_same_bits(tensors(out), tensors(plain))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_training_nothing_is_written_or_said(number, code, recipe, tmp_path, monkeypatch):
    def opening(*_):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was ignored")

    monkeypatch.setattr("heterodox.app.train.open_session", opening)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        answer = heterodox("train", recipe, "--out", tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (answer.code, answer.out, answer.err) == (code, "", "")
    assert not (tmp_path / "run").exists()


def test_the_run_of_a_study_that_is_no_more_stops(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getppid()))
    with Interrupt() as interrupt:
        assert interrupt.received is None
    monkeypatch.setenv(PARENT, "1" if os.getppid() != 1 else "2")
    assert heterodox("train", recipe, "--out", tmp_path / "run", "--quiet").code == 143
    assert not (tmp_path / "run").exists(), "its parent had died before it began"


def test_a_second_signal_stops_at_once_but_an_echo_of_the_first_does_not(monkeypatch):
    now = 50.0
    monkeypatch.setattr("heterodox.training.interrupt.time.monotonic", lambda: now)
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert interrupt.received is None
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM
        now += 1
        signal.raise_signal(signal.SIGINT)  # what torchrun sends on
        assert interrupt.received == signal.SIGTERM
        now += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_resumed_run_goes_on_with_the_threads_that_it_began_with(tmp_path, monkeypatch):
    """Bits depend on them: a machine with more cores, or another number of jobs, must not change a run."""
    free = {"threads": None, "budget": {"steps": 4}, "sampling": {"tokens": 0}}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = train(tiny_recipe(run=free), tmp_path / "run").summary
        torch.set_num_threads(1)
        longer = tiny_recipe(run=free | {"budget": {"steps": 6}, "schedule": "cosine"})
        second = train(longer, tmp_path / "run", resume=True).summary
        assert (first["threads"], second["threads"], torch.get_num_threads()) == (2, 2, 2)
        third = train(tiny_recipe(run=free | {"threads": 1, "budget": {"steps": 8}}), tmp_path / "run", resume=True)
        assert "run.threads is 1 and the run began with 2: its bits will differ" in third.summary["warnings"][-2]
    finally:
        torch.set_num_threads(before)


def test_another_budget_says_what_becomes_of_the_learning_rate(tmp_path):
    def warnings(steps: int, **run: object) -> list[str]:
        recipe = tiny_recipe(run={"budget": {"steps": steps}, "sampling": {"tokens": 0}} | run)
        return train(recipe, tmp_path / str(run), resume=True).summary["warnings"]

    assert warnings(6) == []
    (said,) = warnings(12)
    assert said.startswith("step 6: the budget is 12 steps now, so the cosine of the learning rate is laid anew")
    assert "the next step is at 0.550 of the full rate, not at 0.100" in said
    assert warnings(12)[1:] == [], "nothing is left of the budget, and nothing is to be said"
    assert warnings(3)[1:] == ["step 12: the budget of 3 steps is spent already, at step 12: nothing more is trained"]
    assert warnings(6, schedule="constant") == warnings(12, schedule="constant") == []
