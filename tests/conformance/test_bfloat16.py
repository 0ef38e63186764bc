"""Under bfloat16 every signal points where float32's does, or is computed in float32, or the recipe is refused."""

from typing import Any

import pytest
import torch

from heterodox.app.plan import plan
from heterodox.app.recipe import Recipe
from heterodox.app.session import build_learner, build_model, open_session
from heterodox.conformance.suite import LEAST_COSINE, keeps_its_signal_in_bfloat16
from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.state import split
from heterodox.learner.probe import ModelWindow
from heterodox.model.gpt import CHOOSING
from tests.conformance.combinations import EQUILIBRIUM, OWN_MODELS, RULES, UPDATE_VARIANTS, recipe_of
from tests.saved import assert_same_bits
from tests.switches import SWITCHES
from tests.tiny import tiny_batch, tiny_recipe
from tests.tiny_rater import LEARNER, SMALL, rater_recipe

SIZE = {"width": 64, "heads": 4, "context": 32}
TRAIN = {"rounds": 1, "batch_size": 4, "rater": SMALL, "inner_steps": 2, "val_batches": 1, "val_batch_size": 4}
IN_FLOAT32: dict[str, tuple[dict[str, Any], str | None]] = {
    "learner": ({"learner": LEARNER}, "the inner models of learner data_rater, their optimizer and the meta-gradient"),
    "rating": (
        {"rating": {"name": "data_rater", "train": TRAIN}},
        "the inner models of rating.train, their optimizer and the meta-gradient",
    ),
    "credit": ({"credit": "meta_critic"}, "the signal of meta_critic"),
    "topology": (
        {"update": UPDATE_VARIANTS["sparse sparsae"] | {"lr": 1e-3}},
        "the losses and signals that masks are compared by at their events",
    ),
    "another topology": ({"update": UPDATE_VARIANTS["sparse"] | {"lr": 1e-3}}, None),
    "none": ({}, None),
}
"""Sections of a recipe, and what of it stays in float32."""


@pytest.mark.parametrize("credit", RULES)
def test_every_rule_keeps_its_signal(credit, tmp_path):
    keeps_its_signal_in_bfloat16(recipe_of(credit, "adamw", model=SIZE), tmp_path)


def test_backprop_through_a_relaxation_keeps_its_signal(tmp_path):
    keeps_its_signal_in_bfloat16(recipe_of("backprop", "adamw", model=EQUILIBRIUM | SIZE), tmp_path)


@pytest.mark.parametrize("credit", OWN_MODELS)
def test_rules_of_relaxing_states_refuse_it(credit):
    with pytest.raises(RecipeError, match=f"credit {credit} needs run.precision float32 or float64"):
        recipe_of(credit, "adamw", run={"precision": "bfloat16"})


@pytest.mark.parametrize("credit", ["backprop", "feedback_alignment", "direct_feedback"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_keeps_the_signal_or_refuses(switch, credit, tmp_path):
    recipe = recipe_of(credit, "adamw", model=SIZE | SWITCHES[switch])
    keeps_its_signal_in_bfloat16(recipe, tmp_path)
    if switch in CHOOSING:
        with pytest.raises(RecipeError, match=rf"model\.{switch} is a choice, .* make run\.precision float32"):
            recipe_of(credit, "adamw", model=SIZE | SWITCHES[switch], run={"precision": "bfloat16"})


def signal_of(recipe: Recipe):
    """Backprop's of a distilling student that has left its teacher."""
    model = build_model(recipe, 8, "cpu")
    learner = build_learner(recipe, model, Solo())
    learner.begin()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=drawn))
    batch = tiny_batch(16, 32, 8)
    found = learner.credit.signal(model, batch, torch.ones(16), learner.objective)
    assert learner.objective.alpha == 2.0
    return found


def test_self_distillation_keeps_the_signal():
    objective = {"name": "self_distillation", "warmup_steps": 0, "start": 2.0}
    whole, rounded = (
        signal_of(tiny_recipe(objective=objective, model=SIZE, run={"precision": precision})).grads
        for precision in ("float32", "bfloat16")
    )
    for name, gradient in whole.items():
        cosine = torch.cosine_similarity(gradient.flatten(), rounded[name].flatten(), dim=0)
        assert LEAST_COSINE < cosine < 1, name


def test_masks_are_compared_in_float32():
    seen = {}
    for precision in ("float32", "bfloat16"):
        recipe = tiny_recipe(run={"precision": precision})
        model = build_model(recipe, 8, "cpu")
        window = ModelWindow(model, build_learner(recipe, model, Solo()).credit, Solo())
        batch = tiny_batch(4, 16, 8)
        _, grads = window.signal(batch, {})
        seen[precision] = [window.losses(batch, {}), *grads.values()]
        assert model.autocast_dtype == (torch.bfloat16 if precision == "bfloat16" else None), "it was put back"
    assert all(map(torch.equal, *seen.values()))


@pytest.mark.parametrize("part", IN_FLOAT32)
def test_the_plan_and_the_manifest_say_what_stays_in_float32(part):
    sections, what = IN_FLOAT32[part]
    short, whole = (tiny_recipe(**sections, run={"precision": name}) for name in ("bfloat16", "float32"))
    assert plan(short)["in_float32"] == ([] if what is None else [what])
    assert plan(whole)["in_float32"] == []
    remark = f"{what}: in float32, though run.precision is bfloat16"
    assert (remark in open_session(short, Solo(), "cpu").manifest().get("remarks", [])) == (what is not None)
    assert remark not in open_session(whole, Solo(), "cpu").manifest().get("remarks", [])


def test_inner_models_have_the_same_bits_under_either_precision():
    """And so has the rater: its meta-gradient, its moments and its average."""
    states = []
    for precision in ("float32", "bfloat16"):
        learner = open_session(rater_recipe(run={"precision": precision}), Solo(), "cpu").learner
        batch = tiny_batch(4, 16, 8)
        reports = [learner.step(batch) for _ in range(3)]
        states.append(split(learner.state()["meta"])[0] | {"loss": reports[-1].loss, "norm": reports[-1].grad_norm})
    assert_same_bits(*states)
