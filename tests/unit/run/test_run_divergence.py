"""A run that breaks down stops, says where and why, and leaves a checkpoint with finite weights."""

import json
import math

import pytest
import torch

from heterodox.app.train import train
from heterodox.credit import Backprop
from heterodox.training.checkpoint import Checkpoints
from heterodox.training.loop import Trainer
from heterodox.training.metrics import read_rows
from tests.command import heterodox, recipe_file
from tests.tiny import tiny_batch, tiny_recipe
from tests.tiny_sparse import options, sparse_learner

topologies = pytest.mark.parametrize("topology", ["set", "rigl", "magnitude", "sparsae"])


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_learning_rate_far_too_large(rate, tmp_path):
    recipe = recipe_file(
        tmp_path,
        update={"name": "sgd", "lr": rate},
        learner={"clip": None},
        run={"checkpoint_every": 1, "log_every": 1},
    )
    answer = heterodox("train", recipe, "--out", tmp_path / "run")
    assert answer.code == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "diverged"
    diagnosis = summary["message"]
    assert answer.err.endswith(diagnosis + "\n")
    assert "\n" not in diagnosis
    assert f"step {summary['steps']}" in diagnosis
    kept = Checkpoints(tmp_path / "run" / "checkpoints")
    assert diagnosis.endswith(f"The last good checkpoint is {kept.names()[-1]}.")
    for name, weight in kept.load()[0].items():
        assert weight.isfinite().all(), name
    again = heterodox("train", recipe, "--out", tmp_path / "run", "--resume", "--quiet")
    assert again.code == 1


def test_the_diagnosis_tells_what_came_before(tmp_path):
    update = {"name": "sgd", "lr": 1e30}
    recipe = tiny_recipe(update=update, learner={"clip": None}, run={"log_every": 1, "schedule": "constant"})
    run = train(recipe, tmp_path / "run")
    message = run.summary["message"]
    assert "with a learning rate of 1e+30; one step earlier the loss was 2." in message
    assert "Likely remedies: a lower update.lr, more run.warmup_steps, a smaller learner.clip." in message
    assert run.summary["val_loss"] is not None  # that of the untrained model
    assert run.summary["test_loss"] is None


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path, monkeypatch):
    """The loss of a step can be finite though its update was not."""
    real = Trainer._step

    def step(self):
        real(self)
        if self.progress.step == 20:
            with torch.no_grad():
                self.session.model.head.weight[0, 0] = torch.inf

    monkeypatch.setattr(Trainer, "_step", step)
    run = train(tiny_recipe(run={"eval_every": 1000, "log_every": 1000}), tmp_path / "run")
    assert run.summary["status"] == "diverged"
    assert run.summary["message"].startswith("The weights are no longer finite after step 20.")
    assert run.summary["message"].endswith("The last good checkpoint is step-00000010.")


def test_a_validation_loss_that_is_not_finite(tmp_path, monkeypatch):
    losses = iter([2.0, math.nan])
    monkeypatch.setattr("heterodox.training.loop.evaluate", lambda *_: next(losses))
    run = train(tiny_recipe(), tmp_path / "run")
    assert run.summary["message"].startswith("The validation loss became nan at step 10.")
    assert run.summary["message"].endswith("The last good checkpoint is step-00000000.")
    assert run.summary["val_loss"] == 2.0


def test_a_rules_own_measure_may_be_undefined(tmp_path, monkeypatch):
    real = Backprop.signal

    def signal(self, *arguments):
        answer = real(self, *arguments)
        answer.metrics["ratio"] = torch.tensor(torch.nan)
        return answer

    monkeypatch.setattr(Backprop, "signal", signal)
    assert train(tiny_recipe(), tmp_path / "run").summary["status"] == "finished"
    assert [row["ratio"] for row in read_rows(tmp_path / "run" / "metrics.jsonl", "train")] == [None] * 7


@pytest.mark.parametrize("around", ["sgd", "adamw"])
@topologies
def test_a_sparse_run_that_diverges_between_two_looks_at_the_loss(topology, around, tmp_path):
    """Its events come before anybody sees that the weights are no numbers."""
    update = {"name": "sparse", "around": {"name": around, "lr": 1e30}, "topology": options(topology, every=10)}
    run = {"log_every": 1000, "eval_every": 1000, "checkpoint_every": 1000, "schedule": "constant"}
    summary = train(tiny_recipe(update=update, learner={"clip": None}, run=run), tmp_path / "run").summary
    assert summary["status"] == "diverged"
    assert summary["message"].startswith("The loss became nan at step 2,")
    assert summary["message"].endswith("The last good checkpoint is step-00000000.")


@topologies
def test_there_is_no_event_among_weights_that_are_no_numbers(topology):
    learner = sparse_learner(options(topology))
    learner.step(tiny_batch(seed=1))
    learner.step(tiny_batch(seed=2))
    before = learner.update.masks.flat.clone()
    with torch.no_grad():
        next(iter(learner.model.blocks.parameters())).fill_(torch.nan)
    assert learner.step(tiny_batch(seed=3)).events == []
    assert torch.equal(learner.update.masks.flat, before)
