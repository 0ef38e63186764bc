"""A run that meta-trains a rater, and runs that use one."""

import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.app.plan import plan
from heterodox.app.session import open_session
from heterodox.app.train import train
from heterodox.app.use import probe_run
from heterodox.core.comm import Solo
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.protocols import LanguageModel
from heterodox.training.config import Budget
from heterodox.training.metrics import read_rows
from tests.saved import assert_same_bits, tensors, timeless
from tests.tiny import tiny_recipe
from tests.tiny_rater import LEARNER, rater_recipe, user_recipe


def test_it_logs_what_it_did(trained_rater):
    rows = list(read_rows(trained_rater / "metrics.jsonl"))
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
    assert tensors(trained_rater)["state/learner/meta/population/members"].shape[:2] == (2, 3)


@pytest.mark.parametrize("step", [1, 4])
def test_it_resumes_within_a_round(trained_rater, step, tmp_path):
    """In the middle of a round, before and after a member has started anew."""
    shutil.copytree(trained_rater, tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    train(rater_recipe(), tmp_path / "cut", resume=True, checkpoint=f"step-{step:08d}")
    assert_same_bits(tensors(trained_rater), tensors(tmp_path / "cut"))
    assert timeless(trained_rater) == timeless(tmp_path / "cut")


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


def test_it_can_be_planned(trained_rater):
    foretold = plan(rater_recipe())
    assert foretold["per_step"]["tokens"] == 2 * 4 * 16 * 4 // 3
    assert foretold["memory_bytes"]["activations"] > 0
    with pytest.raises(CheckpointError, match="a run of the learner data_rater"):
        probe_run(trained_rater)


@pytest.mark.parametrize("mode", ["filter", "reweight"])
def test_a_run_uses_the_rater(trained_rater, mode, tmp_path):
    share = {"keep": 0.5} if mode == "filter" else {}
    recipe = user_recipe({"rater": str(trained_rater), "mode": mode} | share)
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


def test_a_rater_trained_in_a_compiled_run_learns_from_models_of_its_own(tmp_path, monkeypatch):
    """What `compile` puts in the place of a method is bound to the run's own model."""
    compiled = []

    def bind(model):
        features, readout = model.features, model.readout
        model.features, model.readout = lambda tokens: features(tokens), lambda hidden: readout(hidden)
        compiled.append(model)

    monkeypatch.setattr(LanguageModel, "compile", bind)
    options = {key: value for key, value in LEARNER.items() if key != "name"} | {"rounds": 1}
    for name, switched_on in (("plain", False), ("compiled", True)):
        recipe = user_recipe({"train": options, "keep": 0.5}, name=name)
        train(
            recipe.model_copy(update={"run": recipe.run.model_copy(update={"compile": switched_on})}), tmp_path / name
        )
    assert len(compiled) == 1
    assert tensors(tmp_path / "plain")["state/learner/rating/rater/head.weight"].abs().max() > 0
    assert_same_bits(tensors(tmp_path / "plain"), tensors(tmp_path / "compiled"))
