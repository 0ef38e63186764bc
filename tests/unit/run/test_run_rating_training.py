"""A rater that is trained before a run's first step: stopped anywhere, it goes on to the same bits."""

import os
import signal
from pathlib import Path

import pytest

from heterodox.app.train import train
from heterodox.meta.training import RaterTraining
from heterodox.training.checkpoint import Checkpoints
from heterodox.training.metrics import read_rows
from tests.saved import assert_same_bits, tensors, timeless
from tests.tiny_rater import SMALL, user_recipe

TRAIN = {
    "rater": SMALL, "rounds": 3, "population": 2, "lifetime": 6, "inner_steps": 3, "backprop_steps": 2, "batch_size": 4,
    "val_batches": 1, "val_batch_size": 4,
}  # fmt: skip
STEPS = 6  # a plain step and a window in each of three rounds
RECIPE = user_recipe({"train": TRAIN})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(RECIPE, folder).summary["status"] == "finished"
    return folder


class Killed(BaseException):
    """What no `except` of ours catches: the process is gone."""


def disturb(at: int, monkeypatch: pytest.MonkeyPatch, act) -> None:
    """Call `act` in step number `at` of the rater's training, counted from 1."""
    step, taken = RaterTraining.step, []

    def disturbed(self: RaterTraining) -> None:
        step(self)
        taken.append(1)
        if len(taken) == at:
            act()

    monkeypatch.setattr(RaterTraining, "step", disturbed)


def assert_the_same_run(folder: Path, whole: Path) -> None:
    assert_same_bits(tensors(folder), tensors(whole))
    assert timeless(folder) == timeless(whole)


@pytest.mark.parametrize("at", range(1, STEPS + 1))
def test_a_kill_in_any_step_costs_at_most_a_round(at, whole, tmp_path, monkeypatch):
    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        disturb(at, patch, kill)
        with pytest.raises(Killed):
            train(RECIPE, tmp_path / "run")
    taken = []
    with monkeypatch.context() as patch:
        disturb(0, patch, kill)
        step = RaterTraining.step
        patch.setattr(RaterTraining, "step", lambda self: (taken.append(1), step(self))[1])
        assert train(RECIPE, tmp_path / "run", resume=True).summary["status"] == "finished"
    assert len(taken) == STEPS - (at - 1) // 2 * 2, "rounds that were over are not trained again"
    assert_the_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_signal_stops_within_a_step_and_loses_nothing(at, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disturb(at, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run = train(RECIPE, tmp_path / "run")
    assert (run.summary["status"], run.summary["steps"], run.signal) == ("interrupted", 0, signal.SIGTERM)
    assert Checkpoints(tmp_path / "run" / "checkpoints").names() == ["step-00000000"]
    assert train(RECIPE, tmp_path / "run", resume=True).summary["status"] == "finished"
    assert_the_same_run(tmp_path / "run", whole)


def test_the_training_is_charged_once(whole):
    first, second = (row for row in read_rows(whole / "metrics.jsonl", "train"))
    assert first["meta_tokens"] > 0
    assert second["meta_tokens"] - first["meta_tokens"] < first["meta_tokens"] / 5  # of what was drawn and dropped
    assert first["flops"] > 2 * (second["flops"] - first["flops"])
