"""Budgets stop where they should, and the learning rate has the right values at the ends of its schedule."""

import math

import pytest

from heterodox.app.train import train
from heterodox.core.types import Cost
from heterodox.training.config import Budget, RunConfig
from heterodox.training.loop import Progress, lr_scale
from tests.tiny import tiny_recipe

TOKENS = 8 * 16  # in a step of the tiny recipe


@pytest.fixture(scope="module")
def flops(tmp_path_factory) -> int:
    """Of one step."""
    run = train(
        tiny_recipe(run={"budget": {"steps": 1}, "sampling": {"tokens": 0}}), tmp_path_factory.mktemp("one") / "run"
    )
    assert run.summary["steps"] == 1
    return run.summary["flops"]


@pytest.mark.parametrize(
    ("tokens", "steps"), [(1, 1), (TOKENS, 1), (TOKENS + 1, 2), (5 * TOKENS, 5), (5 * TOKENS - 1, 5)]
)
def test_a_budget_of_tokens(tokens, steps, tmp_path):
    summary = train(tiny_recipe(run={"budget": {"tokens": tokens}}), tmp_path / "run").summary
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("finished", steps, steps * TOKENS)
    assert summary["val_step"] == steps


@pytest.mark.parametrize(("share", "steps"), [(0.5, 1), (3.0, 3), (3.01, 4)])
def test_a_budget_of_flops(share, steps, flops, tmp_path):
    summary = train(tiny_recipe(run={"budget": {"flops": share * flops}}), tmp_path / "run").summary
    assert (summary["status"], summary["steps"], summary["flops"]) == ("finished", steps, steps * flops)


def test_a_budget_of_seconds(tmp_path):
    summary = train(tiny_recipe(run={"budget": {"seconds": 0.3}}), tmp_path / "run").summary
    assert summary["status"] == "finished"
    assert 0.3 <= summary["seconds"] < 0.3 + 2 * summary["seconds"] / summary["steps"] + 0.2
    assert summary["wall_seconds"] > summary["seconds"]


def test_a_longer_budget_goes_on_where_the_shorter_one_ended(tmp_path):
    constant = {"schedule": "constant", "checkpoint_every": 7}
    train(tiny_recipe(run=constant | {"budget": {"steps": 20}}), tmp_path / "run")
    longer = train(tiny_recipe(run=constant | {"budget": {"tokens": 30 * TOKENS}}), tmp_path / "run", resume=True)
    whole = train(tiny_recipe(run=constant), tmp_path / "whole")
    assert longer.summary["steps"] == 30
    assert longer.summary["val_loss"] == whole.summary["val_loss"]


def test_progress_counts_all_ranks():
    progress = Progress()
    progress.advance(Cost(tokens=10, meta_tokens=3, flops=7), ranks=2)
    spent = {"step": 1, "tokens": 20, "meta_tokens": 6, "flops": 14, "sparse_flops": 14, "seconds": 0.0}
    assert progress.as_dict() == spent
    assert progress.spent(Budget(tokens=52)) == 0.5  # meta tokens are paid for
    assert progress.spent(Budget(flops=28.0)) == 0.5
    assert progress.spent(Budget(steps=4)) == 0.25


def at(config: RunConfig, step: int, tokens: int = 0) -> float:
    return lr_scale(config, Progress(step=step, tokens=tokens))


def test_warm_up_and_cosine_at_their_ends():
    config = RunConfig(budget=Budget(steps=100), warmup_steps=10, final_lr=0.1)
    assert at(config, 0) == pytest.approx(0.1)
    assert at(config, 9) == pytest.approx(1.0)
    assert at(config, 10) == pytest.approx(1.0)
    assert at(config, 55) == pytest.approx(0.55)
    assert at(config, 100) == pytest.approx(0.1)
    falling = [at(config, step) for step in range(10, 100)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.101


def test_without_warm_up_or_decay():
    assert at(RunConfig(budget=Budget(steps=100)), 0) == 1.0
    constant = RunConfig(budget=Budget(steps=100), schedule="constant", warmup_steps=4)
    assert [at(constant, step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert at(RunConfig(budget=Budget(steps=1), final_lr=0.0), 0) == 1.0


def test_the_cosine_follows_whatever_the_budget_counts():
    config = RunConfig(budget=Budget(tokens=1000), final_lr=0.2)
    assert at(config, 3, tokens=0) == pytest.approx(1.0)
    assert at(config, 3, tokens=250) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5)))
    assert at(config, 3, tokens=1000) == pytest.approx(0.2)
    assert at(config, 3, tokens=2000) == pytest.approx(0.2)
