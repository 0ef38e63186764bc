"""Meta-gradients, raters and scores that leave what a number can hold."""

import dataclasses
import math

import pytest
import torch

from heterodox.app.folder import open_run
from heterodox.app.plan import plan
from heterodox.app.session import open_session
from heterodox.app.train import score_histogram, train
from heterodox.app.use import score_run
from heterodox.core.comm import Solo
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.types import Diagnosis
from heterodox.learner import DataRater
from heterodox.meta import meta_gradient
from heterodox.training.metrics import read_rows
from tests.tiny import tiny_recipe
from tests.tiny_rater import DATA, SMALL, rater_recipe, user_recipe


@pytest.fixture
def exploding(monkeypatch):
    """Every meta-gradient leaves what a number can hold on its way."""

    def explode(*arguments, **options):
        found = meta_gradient(*arguments, **options)
        grads = [torch.full_like(grad, torch.nan) for grad in found.grads]
        return dataclasses.replace(found, grads=grads, adjoint_norms=found.adjoint_norms * torch.nan)

    monkeypatch.setattr("heterodox.meta.training.meta_gradient", explode)


def test_an_adjoint_that_explodes_ends_the_run_and_says_so(exploding, tmp_path):
    run = train(rater_recipe(), tmp_path / "run")
    assert run.summary["status"] == "diverged"
    assert "adjoint growth is no longer finite at step 3" in run.summary["message"]
    assert "shorten learner.backprop_steps" in run.summary["message"]


def test_where_nothing_learns_by_it_there_is_a_warning(exploding, tmp_path):
    run = train(rater_recipe({"control": "auxiliary"}), tmp_path / "run")
    assert run.summary["status"] == "finished"
    assert any("the adjoint grew inf times along a window of 2 steps" in text for text in run.summary["warnings"])


@pytest.fixture
def growing(monkeypatch):
    """Every adjoint grows by 5000 on its way, and is finite."""

    def grow(*arguments, **options):
        found = meta_gradient(*arguments, **options)
        norms = torch.ones_like(found.adjoint_norms)
        norms[1] = 5000
        return dataclasses.replace(found, adjoint_norms=norms)

    monkeypatch.setattr("heterodox.meta.training.meta_gradient", grow)


def test_an_adjoint_that_grows_is_told_of(growing, tmp_path):
    run = train(rater_recipe(), tmp_path / "run")
    assert run.summary["status"] == "finished"
    assert [text.partition(":")[0] for text in run.summary["warnings"]] == ["step 4", "step 8"]
    assert "the adjoint grew 5e+03 times along a window of 2 steps" in run.summary["warnings"][0]
    options = {"rounds": 2, "rater": SMALL, "batch_size": 4, "val_batches": 1, "val_batch_size": 4}
    run = train(user_recipe({"train": options}), tmp_path / "user")
    assert len(run.summary["warnings"]) == 1
    assert "grew 5e+03 times" in run.summary["warnings"][0]
    assert "rating.train.inner_lr" in run.summary["warnings"][0]


def test_a_rater_trained_in_the_run_may_not_explode_either(exploding, tmp_path):
    options = {"rounds": 2, "rater": SMALL, "batch_size": 4, "val_batches": 1, "val_batch_size": 4}
    with pytest.raises(RecipeError, match=r"round 1 of rating\.train is not finite.*inner_lr 0\.001"):
        train(user_recipe({"train": options}), tmp_path / "run")


def test_a_rater_that_leaves_what_a_number_can_hold_is_none(tmp_path):
    """The meta-gradient is fine, what the rater's own optimizer makes of it is not."""
    options = {"rounds": 1, "rater": SMALL, "batch_size": 4, "val_batches": 1, "val_batch_size": 4}
    recipe = user_recipe({"train": options | {"lr": 1e30, "weight_decay": 1e10}})
    with pytest.raises(RecipeError, match=r"the rater is not finite behind round 1 of rating\.train; .*lr 1e\+30"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize("data", [DATA, {}], ids=["noise", "clean"])
def test_a_rater_that_diverges_ends_its_own_run_and_says_so(data, tmp_path):
    recipe = rater_recipe({"lr": 1e30, "weight_decay": 1e10})
    run = train(recipe.model_copy(update={"data": tiny_recipe(data=data).data}), tmp_path / "run")
    assert run.summary["status"] == "diverged"
    assert "The rule's rater norm is no longer finite at step 3" in run.summary["message"]
    assert "lower learner.lr or learner.weight_decay" in run.summary["message"]


def test_scores_that_are_not_finite_are_told_of_and_drawn_nowhere():
    session = open_session(rater_recipe(), Solo(), "cpu")
    healthy = session.learner.examine(session.labelled_batches)
    assert healthy.values.keys() == {"auc_shuffled", "auc_repeated"}
    assert not healthy.warnings
    assert score_histogram(session)
    session.learner.trainer.average.fill_(torch.nan)
    found = session.learner.examine(session.labelled_batches)
    assert not found.values
    assert "scores that are not finite" in found.warnings[0]
    assert score_histogram(session) is None


def test_a_measure_that_is_no_number_is_null_in_the_log(monkeypatch, tmp_path):
    monkeypatch.setattr(DataRater, "examine", lambda *_: Diagnosis({"auc_shuffled": math.nan}))
    assert train(rater_recipe(run={"budget": {"steps": 1}}), tmp_path / "run").summary["status"] == "finished"
    measured = [row["auc_shuffled"] for row in read_rows(tmp_path / "run" / "metrics.jsonl", "eval")]
    assert measured == [None, None]


def test_a_saved_rater_that_is_not_finite_is_refused(trained_rater, monkeypatch, tmp_path):
    saved = open_run(trained_rater)
    saved.learner["meta"]["average"]["head.bias"].fill_(torch.inf)
    monkeypatch.setattr("heterodox.app.session.open_run", lambda _: saved)
    monkeypatch.setattr("heterodox.app.use.open_run", lambda _: saved)
    recipe = user_recipe({"rater": str(trained_rater)})
    for use in (
        lambda: open_session(recipe, Solo(), "cpu"),
        lambda: plan(recipe),
        lambda: score_run(trained_rater, tmp_path / "scores.parquet"),
    ):
        with pytest.raises(CheckpointError, match="has weights that are not finite; train it at a lower rate"):
            use()
