"""What every rule must do with every switch of the model: true costs, a true manifest, no stale parameter, resume."""

import shutil
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.app.plan import plan
from heterodox.app.session import build_learner, build_model
from heterodox.app.train import train
from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.memory import activation_bytes
from heterodox.core.types import Batch
from heterodox.learner.probe import exact_gradients
from heterodox.model import generate
from heterodox.model.gpt import CHOOSING
from heterodox.objective import CrossEntropy
from tests.conformance.combinations import ON_GPT, OWN_MODELS
from tests.saved import assert_same_bits, tensors
from tests.switches import CASES, SWITCHES
from tests.tiny import tiny_batch, tiny_recipe

VARIANTS = [*({"name": name} for name in ON_GPT), {"name": "direct_feedback", "route": "own"}]
MORE = [
    {"name": "direct_feedback", "route": "own", "elsewhere": "frozen"},
    {"name": "direct_feedback", "elsewhere": "frozen"},
    {"name": "direct_feedback", "elsewhere": "backprop"},
    {"name": "feedback_alignment", "elsewhere": "backprop"},
    {"name": "feedback_alignment", "elsewhere": "frozen"},
    {"name": "head_only", "embeddings": "backprop"},
]
WITH_PARAMETERS_OR_FLOPS = ["sigmoid_learned", "vq_codes", "subspace_rank", "residual_gates", "frozen_embeddings"]
COMBINATIONS = [*product(CASES, VARIANTS), *product([*WITH_PARAMETERS_OR_FLOPS, "all_at_once"], MORE)]


def recipe_with(switch: str, credit: dict, **run):
    return tiny_recipe(model=CASES[switch], credit=credit, update={"name": "sgd", "lr": 0.1}, run=run)


@pytest.mark.parametrize(
    ("switch", "credit"), COMBINATIONS, ids=[f"{switch}-{'-'.join(c.values())}" for switch, c in COMBINATIONS]
)
def test_cost_and_manifest_are_true(switch, credit):
    if CASES[switch].get("frozen_embeddings") and credit.get("embeddings") == "backprop":
        with pytest.raises(RecipeError, match=r"credit\.embeddings is backprop, but model\.frozen_embeddings is true"):
            recipe_with(switch, credit)
        return
    recipe = recipe_with(switch, credit, precision="float64")
    model = build_model(recipe, 8, "cpu")
    learner = build_learner(recipe, model, Solo())
    batch, weights = tiny_batch(4, 16, 8), torch.ones(4, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        signal = learner.credit.signal(model, batch, weights, CrossEntropy())
    assert signal.cost.flops == counter.get_total_flops() > 0

    manifest = learner.credit.manifest(model)
    exact = exact_gradients(model, batch, weights, CrossEntropy(), Solo())
    assert manifest.keys() == {name for name, _ in model.named_parameters()}
    assert signal.grads.keys() == {name for name, origin in manifest.items() if origin != "frozen"}
    assert all(model.get_parameter(name).requires_grad for name in signal.grads)
    for name, gradient in signal.grads.items():
        assert gradient.norm() > 0, name
        true = torch.allclose(gradient, exact[name], rtol=1e-9, atol=1e-12)
        assert true == (manifest[name] in ("exact", "backprop")), (name, manifest[name])


@pytest.mark.parametrize("switch", CASES)
@pytest.mark.parametrize("credit", OWN_MODELS)
def test_rules_of_relaxing_states_refuse_switches(credit, switch):
    with pytest.raises(RecipeError, match=r"needs (layers that are fixed functions|model equilibrium)"):
        recipe_with(switch, {"name": credit})


@pytest.mark.parametrize("credit", ON_GPT)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_all_switches_at_once_train_resume_and_foretell(credit, precision, tmp_path):
    """Frozen parameters and bases stay, all others move; bf16 autocast goes; a resumed run has the same bits."""
    short = {"budget": {"steps": 4}, "checkpoint_every": 2, "precision": precision}
    model = CASES["all_at_once"] | {"dropout": 0.1}
    if precision == "bfloat16":
        model |= dict.fromkeys(CHOOSING)
    recipe = tiny_recipe(model=model, credit={"name": credit}, run=short)
    run = train(recipe, tmp_path / "whole")
    assert run.summary["status"] == "finished"
    initial = build_model(recipe, 8, "cpu").state_dict()
    manifest = build_learner(recipe, run.model, Solo()).credit.manifest(run.model)
    for name, tensor in run.model.state_dict().items():
        stays = manifest.get(name, "frozen") == "frozen"
        assert torch.equal(tensor, initial[name]) == stays, name
    assert initial.keys() - manifest.keys() >= {"subspace.basis"} | (
        {"blocks.0.vq.codebook"} if model["vq_codes"] else set()
    )

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    train(recipe, tmp_path / "cut", resume=True)
    assert_same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))

    foretold = plan(recipe)
    assert 4 * foretold["per_step"]["flops"] == run.summary["flops"]
    assert foretold["memory_bytes"]["activations"] == run.summary["activation_bytes"]


@pytest.mark.parametrize("switch", [switch for switch in SWITCHES if switch not in CHOOSING])
@pytest.mark.parametrize("credit", ["backprop", "direct_feedback"])
def test_every_switch_goes_under_autocast_is_planned_and_generates(switch, credit):
    recipe = recipe_with(switch, {"name": credit}, precision="bfloat16")
    model = build_model(recipe, 8, "cpu")
    learner = build_learner(recipe, model, Solo())
    drawn = tiny_batch(recipe.run.batch_size, 16, 8)
    batch = Batch(drawn.inputs.contiguous(), drawn.targets.contiguous(), drawn.ids)
    weights = learner.rating.weights(batch)
    signal = learner.credit.signal(model, batch, weights, CrossEntropy())
    assert all(bool(g.isfinite().all()) and g.dtype == torch.float32 for g in signal.grads.values())
    whole = build_model(recipe_with(switch, {"name": credit}), 8, "cpu")
    assert torch.allclose(signal.loss, CrossEntropy().losses(whole(batch.inputs), batch).mean(), rtol=0.02)
    foretold = plan(recipe)
    held = activation_bytes(model, batch, weights, CrossEntropy(), learner.credit)
    assert foretold["memory_bytes"]["activations"] == held
    assert foretold["per_step"]["flops"] == signal.cost.flops
    longer = generate(model, batch.inputs[:1, :1], 20, temperature=0.0)
    assert torch.equal(longer, generate(model, batch.inputs[:1, :1], 20, top_k=1))
