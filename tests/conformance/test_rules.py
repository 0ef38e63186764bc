"""What every rule must do: learn, repeat itself, resume, report its costs and tell the truth about itself."""

import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.core.comm import Solo
from heterodox.core.errors import CheckpointError
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, map_tensors, split
from heterodox.core.types import ORIGINS
from heterodox.credit import DirectFeedback
from heterodox.objective import CrossEntropy
from heterodox.probe import activation_bytes, exact_gradients
from heterodox.run.checkpoint import Checkpoints
from heterodox.run.session import build_learner, build_model
from heterodox.run.train import train
from tests.conformance.combinations import CREDITS, OWN_MODELS, RESUMING_PAIRS, RULES, RUNNING_PAIRS, recipe_of
from tests.saved import assert_same_bits, tensors, timeless
from tests.tiny import tiny_batch, tiny_recipe

every_pair = pytest.mark.parametrize(("credit", "update"), RUNNING_PAIRS)
every_rule = pytest.mark.parametrize("credit", RULES)


@every_pair
def test_learns_and_repeats_itself(credit, update, tmp_path):
    recipe = recipe_of(credit, update, run={"budget": {"steps": 120}, "batch_size": 16})
    run = train(recipe, tmp_path / "a")
    assert run.summary["status"] == "finished"
    assert run.summary["val_loss"] < run.summary["unigram_loss"] - 0.1
    assert run.summary["val_loss"] > run.summary["floor_loss"] - 0.05
    train(recipe, tmp_path / "b")
    assert_same_bits(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


@pytest.mark.parametrize(("credit", "update"), RESUMING_PAIRS)
def test_resume_equals_uninterrupted(credit, update, tmp_path):
    recipe = recipe_of(credit, update, model={"dropout": 0.1})
    train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    newest = Checkpoints(tmp_path / "cut" / "checkpoints").names()[-1]
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / newest)
    run = train(recipe, tmp_path / "cut", resume=True)
    assert run.summary["steps"] == 30
    assert_same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")


def one_signal(credit: str):
    """A model in float64, a learner with the rule, a batch and its weights."""
    recipe = recipe_of(credit, "sgd", run={"precision": "float64"})
    model = build_model(recipe, 8, "cpu")
    learner = build_learner(recipe, model, Solo())
    batch = tiny_batch(4, 16, 8)
    weights = learner.rating.weights(batch).double()
    return model, learner, batch, weights


@every_rule
def test_cost_is_what_torch_counts(credit):
    model, learner, batch, weights = one_signal(credit)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        signal = learner.credit.signal(model, batch, weights, CrossEntropy())
    assert signal.cost.flops == counter.get_total_flops() > 0
    assert signal.cost.tokens == batch.num_tokens


@every_rule
def test_manifest_is_true(credit):
    model, learner, batch, weights = one_signal(credit)
    manifest = learner.credit.manifest(model)
    assert set(manifest) == {name for name, _ in model.named_parameters()}
    assert set(manifest.values()) <= set(ORIGINS)
    signal = learner.credit.signal(model, batch, weights, CrossEntropy())
    exact = exact_gradients(model, batch, weights, CrossEntropy(), Solo())
    for name, origin in manifest.items():
        if origin == "frozen":
            assert name not in signal.grads
            continue
        assert signal.grads[name].norm() > 0, name
        true = torch.allclose(signal.grads[name], exact[name], rtol=1e-9, atol=1e-12)
        assert true == (origin in ("exact", "backprop")), (name, origin)


@every_pair
def test_frozen_parameters_do_not_move_and_the_others_do(credit, update, tmp_path):
    recipe = recipe_of(credit, update, run={"budget": {"steps": 3}})
    run = train(recipe, tmp_path / "run")
    initial = build_model(recipe, 8, "cpu").state_dict()
    manifest = build_learner(recipe, run.model, Solo()).credit.manifest(run.model)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, initial[name]) == (manifest[name] == "frozen"), name
        assert parameter.grad is None


@every_rule
def test_signal_weights_examples(credit):
    """Weight zero removes an example; the loss is the weighted mean."""
    model, learner, batch, _ = one_signal(credit)
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    state = map_tensors(learner.credit.state(), torch.clone)
    signal = learner.credit.signal(model, batch, weights, CrossEntropy())
    assert torch.allclose(signal.loss, (signal.losses * weights).mean())
    other = tiny_batch(4, 16, 8)
    other.inputs[1] = (other.inputs[1] + 3) % 8
    learner.credit.load_state(state)
    unmoved = learner.credit.signal(model, other, weights, CrossEntropy())
    for name, gradient in signal.grads.items():
        assert torch.allclose(gradient, unmoved.grads[name], atol=1e-12), name


@every_rule
def test_same_initial_weights_for_every_rule(credit):
    model, *_ = one_signal(credit)
    sections = {"model": OWN_MODELS[credit]} if credit in OWN_MODELS else {}
    reference = build_model(recipe_of("backprop", "adamw", run={"precision": "float64"}, **sections), 8, "cpu")
    assert_same_bits(dict(model.state_dict()), dict(reference.state_dict()))


@every_rule
def test_a_checkpoint_without_the_rules_state_is_refused(credit):
    model, learner, *_ = one_signal(credit)
    state = learner.credit.state()
    if not state:
        return
    with pytest.raises(CheckpointError, match="lacks"):
        learner.credit.load_state({})
    fresh = build_learner(recipe_of(credit, "sgd", seed=7), model, Solo()).credit
    before, wanted = (split(part.state())[0] for part in (fresh, learner.credit))
    assert any(not torch.equal(before[name], wanted[name]) for name in wanted)
    fresh.load_state(state)
    after = split(fresh.state())[0]
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


def damages(remembered: Tree) -> list[Tree]:
    """The state without all of it, without each group of it, and without one tensor of each group."""
    found: list[Tree] = [{}] if remembered else []
    for group, leaf in remembered.items():
        rest = {key: kept for key, kept in remembered.items() if key != group}
        found.append(rest)
        if isinstance(leaf, dict) and len(leaf) > 1:
            found.append(rest | {group: dict(list(leaf.items())[1:])})
    return found


@every_rule
def test_a_run_whose_feedback_is_missing_is_not_resumed(credit, tmp_path):
    """Never silently with fresh feedback: neither without all that the rule remembers, nor without one tensor of it."""
    recipe = recipe_of(credit, "adamw", run={"budget": {"steps": 2}, "sampling": {"tokens": 0}})
    train(recipe, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    model, state, values = checkpoints.load()
    remembered = state["learner"].pop("credit")
    for left in damages(remembered):
        checkpoints.save(2, model, state | {"learner": state["learner"] | {"credit": left}}, values)
        with pytest.raises(CheckpointError, match=r"the checkpoint lacks .* it belongs to another recipe"):
            train(recipe, tmp_path, resume=True)
    checkpoints.save(2, model, state | {"learner": state["learner"] | {"credit": remembered}}, values)
    assert train(recipe, tmp_path, resume=True).summary["status"] == "finished"


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
        model, learner, batch, weights = one_signal(credit)
        held[credit] = activation_bytes(model, batch, weights, CrossEntropy(), learner.credit)
    literal = DirectFeedback.Config(route="own").build(model, Streams(0))
    assert held["direct_feedback"] < 0.75 * held["backprop"]
    assert activation_bytes(model, batch, weights, CrossEntropy(), literal) < 0.5 * held["backprop"]
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
