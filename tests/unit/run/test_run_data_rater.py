"""A run that meta-trains a rater, and runs that use one."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.core.comm import Solo
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.types import Diagnosis
from heterodox.learner import DataRater
from heterodox.log.jsonl import read_rows
from heterodox.meta import meta_gradient
from heterodox.recipe import Recipe
from heterodox.run.config import Budget
from heterodox.run.histogram import score_histogram
from heterodox.run.plan import plan
from heterodox.run.probe_run import probe_run
from heterodox.run.saved import open_run
from heterodox.run.score_run import score_run
from heterodox.run.session import open_session
from heterodox.run.train import train
from tests.saved import assert_same_bits, tensors, timeless
from tests.tiny import tiny_recipe

SMALL = {"layers": 1, "heads": 1, "width": 8}
LEARNER = {
    "name": "data_rater", "rater": SMALL, "population": 2, "lifetime": 6, "inner_steps": 4, "backprop_steps": 2,
    "batch_size": 4, "val_batches": 1, "val_batch_size": 4, "lr": 0.01, "inner_clip": 0.5,
}  # fmt: skip
DATA = {"corruption": {"window": 16, "kinds": ["shuffled", "repeated"]}}
RUN = {
    "budget": {"steps": 8}, "batch_size": 4, "eval_every": 4, "eval_batches": 1, "checkpoint_every": 1,
    "keep_checkpoints": 9, "sampling": {"tokens": 0}, "log_every": 1,
}  # fmt: skip


def rater_recipe(learner=None, run=None, **sections) -> Recipe:
    model = {"layers": 1, "heads": 1, "width": 8, "context": 16} | sections.pop("model", {})
    return tiny_recipe(learner=LEARNER | (learner or {}), data=DATA, model=model, run=RUN | (run or {}), **sections)


def user_recipe(rating, **sections) -> Recipe:
    """A run of two steps that is rated by this."""
    model = {"layers": 1, "heads": 1, "width": 8, "context": 16}
    run = RUN | {"budget": {"steps": 2}}
    return tiny_recipe(rating={"name": "data_rater"} | rating, data=DATA, model=model, run=run, **sections)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("rater") / "run"
    assert train(rater_recipe(), folder).summary["status"] == "finished"
    return folder


def test_it_logs_what_it_did(trained):
    rows = list(read_rows(trained / "metrics.jsonl"))
    ends = [row for row in rows if "meta_loss" in row]
    assert [row["step"] for row in ends] == [3, 6]  # two steps of the inner models, then the window
    assert {"score_std", "score_entropy", "score_clamped", "adjoint_norm", "adjoint_growth"} <= ends[-1].keys()
    assert ends[-1]["score_std"] > 0 == rows[1]["score_std"]
    measured = [row for row in rows if row["kind"] == "eval"]
    assert measured[0]["auc_shuffled"] == 0.5
    assert 0 < measured[-1]["auc_repeated"] < 1
    last = rows[-2]
    assert last["tokens"] == 2 * 4 * 16 * (2 * 4 + 2)  # members, batch, context, inner steps
    assert last["meta_tokens"] == 2 * 4 * 16 * 2
    assert tensors(trained)["state/learner/meta/population/members"].shape[:2] == (2, 3)


@pytest.mark.parametrize("step", [1, 4])
def test_it_resumes_within_a_round(trained, step, tmp_path):
    """In the middle of a round, before and after a member has started anew."""
    shutil.copytree(trained, tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    train(rater_recipe(), tmp_path / "cut", resume=True, checkpoint=f"step-{step:08d}")
    assert_same_bits(tensors(trained), tensors(tmp_path / "cut"))
    assert timeless(trained) == timeless(tmp_path / "cut")


@pytest.mark.parametrize(
    "learner",
    [
        {"schedule": "binomial", "backprop_steps": 4, "weighting": {"entropy": 0.1}},
        {"micro_batch": 2, "population": 1},
        {"graphs": 2, "backprop_steps": 4, "rater": {"width": 8, "layers": 0, "conv": 5}},
        {"control": "auxiliary", "inner_steps": 2, "weighting": {"kind": "softmax"}},
        {"control": "detached", "inner_steps": 2},
    ],
)
def test_its_cost_is_what_torch_counts(learner):
    recipe = rater_recipe(learner, run={"precision": "float64"})
    session = open_session(recipe, Solo(), "cpu")
    for _ in range(recipe.learner.inner_steps - recipe.learner.backprop_steps + 1):
        batch = session.loader.next_batch()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            report = session.learner.step(batch)
        assert report.cost.flops == counter.get_total_flops() > 0


def test_a_rater_of_the_same_run_is_planned(tmp_path):
    """To the FLOP, whatever the budget's unit is."""
    options = {key: value for key, value in LEARNER.items() if key != "name"} | {"rounds": 2}
    recipe = user_recipe({"train": options, "keep": 0.5})
    spent, foretold = train(recipe, tmp_path / "run").summary, plan(recipe, speed=1e6)
    assert foretold["once"]["flops"] > foretold["per_step"]["flops"] > 0
    assert {key: foretold[key] for key in ("flops", "tokens", "meta_tokens", "steps")} == {
        key: spent[key] for key in ("flops", "tokens", "meta_tokens", "steps")
    }
    assert foretold["hours"] == pytest.approx(spent["flops"] / 3.6e9)
    assert plan(recipe)["hours"] is None
    once, step = foretold["once"], foretold["per_step"]
    tokens = {key: cost["tokens"] + cost["meta_tokens"] for key, cost in (("once", once), ("step", step))}
    for budget, steps in (
        ({"flops": once["flops"] + 3 * step["flops"]}, 3),
        ({"flops": once["flops"] / 2}, 1),
        ({"tokens": tokens["once"] + 3 * tokens["step"]}, 3),
    ):
        other = recipe.model_copy(update={"run": recipe.run.model_copy(update={"budget": Budget(**budget)})})
        assert plan(other)["steps"] == steps
        assert plan(other)["flops"] == once["flops"] + steps * step["flops"]


def test_it_can_be_planned(trained):
    foretold = plan(rater_recipe())
    assert foretold["per_step"]["tokens"] == 2 * 4 * 16 * 4 // 3
    assert foretold["memory_bytes"]["activations"] > 0
    with pytest.raises(CheckpointError, match="a run of the learner data_rater"):
        probe_run(trained)


@pytest.mark.parametrize("mode", ["filter", "reweight"])
def test_a_run_uses_the_rater(trained, mode, tmp_path):
    share = {"keep": 0.5} if mode == "filter" else {}
    recipe = user_recipe({"rater": str(trained), "mode": mode} | share)
    run = train(recipe, tmp_path / "run")
    assert run.summary["status"] == "finished"
    assert run.summary["tokens"] == 2 * 4 * 16
    assert run.summary["meta_tokens"] == (2 * 4 * 16 if mode == "filter" else 0)
    assert 2 * plan(recipe)["per_step"]["flops"] == run.summary["flops"]
    other = recipe.model_copy(update={"data": tiny_recipe(data={"tokenizer": {"name": "byte"}}).data})
    with pytest.raises(RecipeError, match="train a rater on these tokens"):
        open_session(other, Solo(), "cpu")
    lost = recipe.model_copy(update={"rating": recipe.rating.model_copy(update={"rater": tmp_path / "run"})})
    with pytest.raises(RecipeError, match="trained no rater"):
        open_session(lost, Solo(), "cpu")


def test_a_rater_trained_in_the_same_run_is_charged(tmp_path):
    options = {key: value for key, value in LEARNER.items() if key != "name"} | {"rounds": 1}
    recipe = user_recipe({"train": options, "keep": 0.5})
    run = train(recipe, tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert rows[0]["tokens"] == 4 * 16 + 2 * 4 * 16 * 4
    assert rows[1]["tokens"] - rows[0]["tokens"] == 4 * 16
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    before = tensors(tmp_path / "run")
    again = train(recipe, tmp_path / "run", resume=True)
    assert again.summary["flops"] == run.summary["flops"]
    name = "state/learner/rating/rater/head.weight"
    assert torch.equal(before[name], tensors(tmp_path / "run")[name])
    assert before[name].abs().max() > 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"learner": {"backprop_steps": 5}}, "backprop_steps 5 is longer than the 4 inner_steps"),
        ({"learner": {"weighting": {"kind": "softmax"}, "batch_size": 1}}, "softmax weights over a batch of one"),
        ({"credit": {"name": "head_only"}}, "learner data_rater needs credit backprop, found head_only"),
        ({"learner": {"slots": 3}}, "slots are for the schedule binomial"),
        ({"learner": {"lifetime": 2}}, "a lifetime of 2 steps is shorter"),
        ({"learner": {"rater": {"heads": 3}}}, "3 heads do not divide"),
        ({"learner": {"reset": "fresh"}}, "lifetime 6 is for the reset staggered only"),
        (
            {"learner": {"rater": {"view": 17}}},
            r"learner\.rater\.view is 17, but a window has the model's context of 16",
        ),
        (
            {"learner": {"eps_root": 1e-6}, "update": {"name": "sgd"}},
            r"learner\.eps_root 1e-06 is of AdamW, and update",
        ),
        ({"run": {"probe_every": 2}}, r"run\.probe_every 2 compares .* learner data_rater has no such signal"),
        ({"run": {"compile": True}}, "cannot be differentiated twice"),
        ({"model": {"straight_through_gelu": True}}, r"which model\.straight_through_gelu makes another than"),
    ],
)
def test_refuses(sections, message):
    with pytest.raises(RecipeError, match=message):
        rater_recipe(**sections)


@pytest.mark.parametrize("use", [lambda recipe: open_session(recipe, Solo(), "cpu"), plan], ids=["train", "plan"])
def test_refuses_what_only_the_corpus_shows(use):
    with pytest.raises(RecipeError, match=r"has 62 examples, but learner\.val_batches 1 of .* ask for 400 in a round"):
        use(rater_recipe({"val_batch_size": 400}))
    train = {"rounds": 1, "val_batches": 3, "val_batch_size": 40}
    wanted = r"rating\.train\.val_batches 3 of rating\.train\.val_batch_size 40 ask for 120"
    with pytest.raises(RecipeError, match=wanted):
        use(user_recipe({"train": train}))
    with pytest.raises(RecipeError, match=r"data\.corruption\.window is 16, but the model's context is 8"):
        use(rater_recipe(model={"context": 8}))


@pytest.mark.parametrize(
    ("rating", "run", "message"),
    [
        ({"mode": "reweight", "keep": 0.5}, {}, r"keep 0\.5 is for the mode filter only"),
        ({"mode": "reweight"}, {"batch_size": 1}, "weighs the examples of a batch, and run.batch_size is 1"),
    ],
)
def test_refuses_reweighting(rating, run, message):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(rating={"name": "data_rater", "rater": "runs/rater"} | rating, run=RUN | run)


def test_a_rater_trained_in_the_run_cannot_read_more_than_a_window():
    with pytest.raises(
        RecipeError, match=r"rating\.train\.rater\.view is 17, but a window has the model's context of 16"
    ):
        user_recipe({"train": {"rater": {"view": 17}}})
    assert user_recipe({"train": {"rater": {"view": 16}}}).rating.train.rater.view == 16


def test_a_resolved_recipe_is_a_recipe():
    for recipe in (rater_recipe(update={"name": "sgd"}), rater_recipe({"rater": {"layers": 0, "width": 18}})):
        assert Recipe.model_validate(recipe.dump()) == recipe
    for rating in ({"mode": "reweight"}, {"mode": "filter"}, {"keep": 0.5}):
        recipe = user_recipe({"train": {"reset": "fresh"}} | rating)
        assert Recipe.model_validate(recipe.dump()) == recipe
    assert user_recipe({"rater": "runs/rater"}).rating.drawn(7) == 10


@pytest.fixture
def exploding(monkeypatch):
    """Every meta-gradient leaves what a number can hold on its way."""

    def explode(*arguments, **options):
        found = meta_gradient(*arguments, **options)
        grads = [torch.full_like(grad, torch.nan) for grad in found.grads]
        return dataclasses.replace(found, grads=grads, adjoint_norms=found.adjoint_norms * torch.nan)

    monkeypatch.setattr("heterodox.meta.trainer.meta_gradient", explode)


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

    monkeypatch.setattr("heterodox.meta.trainer.meta_gradient", grow)


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


def test_a_saved_rater_that_is_not_finite_is_refused(trained, monkeypatch, tmp_path):
    saved = open_run(trained)
    saved.learner["meta"]["average"]["head.bias"].fill_(torch.inf)
    monkeypatch.setattr("heterodox.run.session.open_run", lambda _: saved)
    monkeypatch.setattr("heterodox.run.score_run.open_run", lambda _: saved)
    recipe = user_recipe({"rater": str(trained)})
    for use in (
        lambda: open_session(recipe, Solo(), "cpu"),
        lambda: plan(recipe),
        lambda: score_run(trained, tmp_path / "scores.parquet"),
    ):
        with pytest.raises(CheckpointError, match="has weights that are not finite; train it at a lower rate"):
            use()
