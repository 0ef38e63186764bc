"""What every rule must do: learn, repeat itself, resume, report its costs and tell the truth about itself."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.app.session import build_model
from heterodox.app.train import train
from heterodox.conformance import suite as checks
from heterodox.conformance.tiny import one_signal
from heterodox.core.errors import CheckpointError
from heterodox.core.memory import activation_bytes
from heterodox.core.rng import Streams
from heterodox.credit import DirectFeedback
from heterodox.objective import CrossEntropy
from heterodox.training.checkpoint import Checkpoints
from tests.conformance.combinations import CREDITS, OWN_MODELS, RESUMING_PAIRS, RULES, RUNNING_PAIRS, recipe_of
from tests.tiny import tiny_batch, tiny_recipe

every_pair = pytest.mark.parametrize(("credit", "update"), RUNNING_PAIRS)
every_rule = pytest.mark.parametrize("credit", RULES)
WITH_THE_UPDATE = {"learns_and_repeats_itself", "moves_all_but_the_frozen", "resumes_to_the_same_bits"}
OF_THE_RULE = [name for name in checks.CHECKS if name not in WITH_THE_UPDATE]


@every_pair
@pytest.mark.parametrize("check", [checks.learns_and_repeats_itself, checks.moves_all_but_the_frozen])
def test_every_pair_of_rule_and_update(check, credit, update, tmp_path):
    check(recipe_of(credit, update), tmp_path / "run")


@pytest.mark.parametrize(("credit", "update"), RESUMING_PAIRS)
def test_resume_equals_uninterrupted(credit, update, tmp_path):
    checks.resumes_to_the_same_bits(recipe_of(credit, update), tmp_path)


@every_rule
@pytest.mark.parametrize("check", OF_THE_RULE)
def test_every_rule(check, credit, tmp_path):
    checks.CHECKS[check](recipe_of(credit, "adamw"), tmp_path)


@pytest.mark.parametrize("update", [{"name": "adamw"}, {"name": "sgd", "momentum": 0.9}], ids=["adamw", "sgd"])
def test_a_run_whose_moments_are_missing_is_not_resumed(update, tmp_path):
    """Neither without those of Kolen–Pollack's own matrices, nor without any."""
    run = {"budget": {"steps": 2}, "sampling": {"tokens": 0}}
    recipe = tiny_recipe(credit={"name": "kolen_pollack"}, update=update, run=run)
    train(recipe, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    model, state, values = checkpoints.load()
    saved = state["learner"]["update"]
    (kind,) = saved.keys() - {"names"}
    own = {name for name in saved[kind] if name.startswith("feedback:")}
    assert own
    for lost in (own, {min(own)}, set(saved[kind])):
        left = saved | {kind: {name: kept for name, kept in saved[kind].items() if name not in lost}}
        checkpoints.save(2, model, state | {"learner": state["learner"] | {"update": left}}, values)
        with pytest.raises(CheckpointError, match=r"the checkpoint lacks the .* of "):
            train(recipe, tmp_path, resume=True)
    checkpoints.save(2, model, state, values)
    assert train(recipe, tmp_path, resume=True).summary["status"] == "finished"


def test_direct_feedback_holds_less_than_backprop():
    held = {}
    for credit in CREDITS:
        if credit in OWN_MODELS:
            continue
        alone = one_signal(recipe_of(credit, "adamw"))
        held[credit] = activation_bytes(alone.model, alone.batch, alone.weights, CrossEntropy(), alone.rule)
    literal = DirectFeedback.Config(route="own").build(alone.model, Streams(0))
    assert held["direct_feedback"] < 0.75 * held["backprop"]
    assert activation_bytes(alone.model, alone.batch, alone.weights, CrossEntropy(), literal) < 0.5 * held["backprop"]
    assert held["feedback_alignment"] == held["backprop"]
    assert held["head_only"] < held["direct_feedback"]


@pytest.mark.parametrize("elsewhere", ["local", "backprop", "frozen"])
@pytest.mark.parametrize(
    ("credit", "options"),
    [
        ("feedback_alignment", {}),
        ("feedback_alignment", {"grape": {}}),
        ("sign_symmetry", {}),
        ("kolen_pollack", {}),
        ("direct_feedback", {}),
        ("direct_feedback", {"route": "own"}),
    ],
)
def test_cost_and_manifest_of_elsewhere(credit, options, elsewhere):
    section = {"name": credit, "elsewhere": elsewhere} | options
    recipe = tiny_recipe(credit=section, run={"precision": "float64"})
    model = build_model(recipe, 8, "cpu")
    rule = recipe.credit.build(model, Streams(0))
    batch, weights = tiny_batch(4, 16, 8), torch.ones(4, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        signal = rule.signal(model, batch, weights, CrossEntropy())
    assert signal.cost.flops == counter.get_total_flops()
    assert signal.cost.tokens == batch.num_tokens
    trained = {name for name, origin in rule.manifest(model).items() if origin != "frozen"}
    assert trained == set(signal.grads)
