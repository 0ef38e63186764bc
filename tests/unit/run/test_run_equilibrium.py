"""Equilibrium recipes: refusals, costs at every option, warnings and the guard on the free phase."""

import json
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.app.describe import explain_part
from heterodox.app.export import export_run
from heterodox.app.plan import plan
from heterodox.app.recipe import check
from heterodox.app.train import train
from heterodox.core.errors import RecipeError
from heterodox.core.memory import activation_bytes
from heterodox.core.rng import Streams
from heterodox.core.types import ORIGINS
from heterodox.credit import BPTT, Equilibrium, Implicit
from heterodox.model import Equilibrium as Model
from heterodox.objective import CrossEntropy
from heterodox.training.metrics import read_rows
from tests.conformance.combinations import EQUILIBRIUM
from tests.tiny import tiny_batch, tiny_recipe

RULES = {
    "bptt": {}, "bptt through 3": {"through": 3}, "bptt, penalty": {"jacobian_penalty": 0.1},
    "implicit": {}, "implicit, Anderson": {"solver": "anderson", "jacobian_penalty": 0.1},
    "equilibrium": {}, "equilibrium, plain": {"correction": "none"},
    "equilibrium, one-sided": {"nudge": "one_sided"}, "equilibrium, live": {"loss_gradient": "live"},
    "equilibrium, live and one-sided": {"loss_gradient": "live", "nudge": "one_sided"},
    "equilibrium, tolerance": {"tolerance": 1e-2, "solver": "anderson"},
    "equilibrium, penalty": {"jacobian_penalty": 0.1, "correction": "none"},
    "backprop": {}, "head_only": {}, "head_only, embeddings": {"embeddings": "backprop"},
}  # fmt: skip
SHAPES = {
    "one block": {}, "two blocks": {"layers": 2}, "no norm": {"layer_norm": False},
    "attention alone": {"mlp_ratio": 0, "layer_norm": False}, "tolerance": {"tolerance": 1e-2},
    "Anderson": {"tolerance": 1e-2, "solver": "anderson"},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_cost_is_what_torch_counts_at_every_option(rule, shape):
    if shape == "Anderson" and rule.startswith(("bptt", "backprop", "head_only, embeddings")):
        return  # the derivative of its small systems is not counted
    if shape == "tolerance" and rule == "bptt through 3":
        return  # refused
    credit = {"name": rule.replace(",", " ").split()[0]} | RULES[rule]
    recipe = tiny_recipe(model=EQUILIBRIUM | SHAPES[shape], credit=credit)
    model = recipe.model.build(8, Streams(0))
    built = recipe.credit.build(model, Streams(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        signal = built.signal(model, tiny_batch(4, 16, 8), torch.ones(4), CrossEntropy())
    assert signal.cost.flops == counter.get_total_flops() > 0


def held(rule, steps: int) -> int:
    model = Model.Config(**{**EQUILIBRIUM, "steps": steps}).build(8, Streams(0))
    return activation_bytes(model, tiny_batch(4, 16, 8), torch.ones(4), CrossEntropy(), rule)


def test_memory_does_not_grow_with_the_relaxation_but_for_bptt():
    for rule in (Equilibrium(), Implicit()):
        assert held(rule, 10) == held(rule, 40)
    assert held(BPTT(), 40) > 3.5 * held(BPTT(), 10)
    assert held(Equilibrium(), 20) < 0.5 * held(BPTT(), 20)


NO_STEPS = "found 0, but a phase of no steps leaves the state where it was"
GPT = {"name": "gpt", "layers": 3, "heads": 2, "width": 16, "context": 16}


@pytest.mark.parametrize(
    ("model", "credit", "said"),
    [
        (EQUILIBRIUM | {"dropout": 0.1}, {"name": "equilibrium"}, "no fixed point"),
        (EQUILIBRIUM, {"name": "feedback_alignment"}, "cannot train the equilibrium model"),
        (EQUILIBRIUM, {"name": "direct_feedback"}, "true Jacobian"),
        (EQUILIBRIUM, {"name": "equilibrium", "beta": 0.0}, "beta is 0"),
        (
            EQUILIBRIUM,
            {"name": "equilibrium", "beta": 1e-6},
            "beta 1e-06 drowns in the rounding of run.precision float32",
        ),
        (EQUILIBRIUM, {"name": "equilibrium", "beta": -1e-6}, "drowns"),
        (EQUILIBRIUM, {"name": "equilibrium", "nudged_steps": 0}, f"credit.nudged_steps: {NO_STEPS}"),
        (EQUILIBRIUM | {"steps": 0}, {"name": "equilibrium"}, f"model.steps: {NO_STEPS}"),
        (EQUILIBRIUM, {"name": "implicit", "steps": 0}, f"credit.steps: {NO_STEPS}"),
        (EQUILIBRIUM, {"name": "bptt", "through": 0}, f"credit.through: {NO_STEPS}"),
        (EQUILIBRIUM, {"name": "bptt", "jacobian_powers": 2}, "jacobian_powers is 2.*jacobian_penalty is 0"),
        (EQUILIBRIUM, {"name": "implicit", "jacobian_powers": 0}, "jacobian_powers is 0.*jacobian_penalty is 0"),
        (EQUILIBRIUM, {"name": "equilibrium", "jacobian_powers": 2}, "jacobian_powers is 2.*jacobian_penalty is 0"),
        (EQUILIBRIUM | {"straight_through_gelu": True}, {"name": "bptt"}, "straight_through_gelu .* true Jacobian"),
        (EQUILIBRIUM | {"norm_backward": "straight_through"}, {"name": "bptt"}, "norm_backward .* true Jacobian"),
        (EQUILIBRIUM | {"mlp_top_k": 4}, {"name": "bptt"}, "mlp_top_k .* jumps"),
        (EQUILIBRIUM | {"residual_gates": True}, {"name": "bptt"}, "residual_gates is a switch of model gpt"),
        (EQUILIBRIUM | {"tolerance": 0.01}, {"name": "bptt", "through": 2}, "through 2 counts back .*tolerance 0.01"),
        (EQUILIBRIUM, {"name": "equilibrium", "correction": "none", "clip": 1.0}, "clip"),
        (EQUILIBRIUM, {"name": "bptt", "through": 9}, "more than the 8"),
        (EQUILIBRIUM | {"solver": "anderson"}, {"name": "bptt", "through": 2}, "use damped"),
        (EQUILIBRIUM | {"heads": 3}, {"name": "bptt"}, "3 heads do not divide a width of 16"),
        (GPT, {"name": "bptt"}, "needs model equilibrium"),
        (GPT, {"name": "implicit"}, "needs model equilibrium"),
        (GPT | {"dropout": 0.1}, {"name": "equilibrium"}, "model.dropout is 0.1, expected 0.0"),
        (GPT, {"name": "equilibrium", "nudged_steps": 3}, "expected at least 4"),
        (GPT, {"name": "equilibrium", "step_size": 0.5}, "step_size is 0.5: on model gpt only steps of 1"),
        (
            GPT,
            {"name": "equilibrium", "solver": "anderson"},
            "solver is anderson: on model gpt 4 plain steps are exact",
        ),
        (GPT, {"name": "equilibrium", "tolerance": 0.1}, "tolerance is 0.1: on model gpt 4 steps are exact"),
        (GPT, {"name": "equilibrium", "nudged_limit": 0.2}, "nudged_limit is 0.2, but on model gpt"),
        (GPT, {"name": "equilibrium", "jacobian_penalty": 0.1}, "always contractive"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(model, credit, said):
    with pytest.raises(RecipeError, match=said):
        check({"model": model, "credit": credit})


def test_what_the_refusals_spare():
    """Each of them at the edge of what is refused."""
    for model, credit, precision in (
        (GPT, {"step_size": 1.0, "nudged_steps": 4, "nudged_limit": None}, "float32"),
        (EQUILIBRIUM, {"beta": 2e-5}, "float32"),
        (EQUILIBRIUM, {"beta": 1e-6}, "float64"),
        (EQUILIBRIUM, {"jacobian_powers": 2, "jacobian_penalty": 0.1}, "float32"),
        (EQUILIBRIUM | {"tolerance": 0.01}, {"name": "bptt"}, "float32"),
    ):
        recipe = check({"model": model, "credit": {"name": "equilibrium"} | credit, "run": {"precision": precision}})
        assert check(recipe.dump()) == recipe


@pytest.mark.parametrize("credit", ["equilibrium", "bptt", "implicit"])
def test_bfloat16_is_refused(credit):
    with pytest.raises(RecipeError, match="bfloat16"):
        check({"model": EQUILIBRIUM, "credit": credit, "run": {"precision": "bfloat16"}})


def test_backprop_takes_bfloat16(tmp_path):
    sections = {"model": EQUILIBRIUM, "run": {"budget": {"steps": 3}, "precision": "bfloat16"}}
    assert train(tiny_recipe(**sections), tmp_path / "run").summary["status"] == "finished"


WILD = EQUILIBRIUM | {"layer_norm": False, "scale": 3.0, "damping": 0.1, "weight_std": 0.5}


@pytest.mark.parametrize("credit", ["equilibrium", "bptt", "implicit"])
def test_a_relaxation_that_does_not_contract_is_reported_and_stops_the_run(credit, tmp_path):
    run = train(tiny_recipe(model=WILD, credit=credit, run={"log_every": 2}), tmp_path / "run")
    rows = list(read_rows(run.folder / "metrics.jsonl"))
    assert [row["kind"] for row in rows] == ["eval", "warning"], "before training starts"
    assert rows[0]["spectral_radius"] > 1
    assert f"{rows[0]['spectral_radius']:.3f}" in rows[1]["text"]
    assert run.summary["status"] == "diverged"
    assert "free residual" in run.summary["message"]
    assert "limit of 0.1" in run.summary["message"]
    assert run.summary["warnings"] == [f"step 0: {rows[1]['text']}"]


EXPLODING = {
    "large weights": {"layer_norm": False, "weight_std": 3.0, "steps": 60},
    "strong and undamped": {"layer_norm": False, "weight_std": 0.5, "damping": 0.0, "scale": 5.0, "steps": 60},
}


@pytest.mark.parametrize("options", EXPLODING.values(), ids=EXPLODING)
def test_a_block_that_explodes_at_initialisation_is_reported_with_its_radius(options, tmp_path):
    run = train(tiny_recipe(model=EQUILIBRIUM | options, credit="equilibrium"), tmp_path / "run")
    assert run.summary["status"] == "diverged"
    assert run.summary["steps"] == 0
    (warning,) = read_rows(run.folder / "metrics.jsonl")
    assert warning["kind"] == "warning"
    radius = float(re.search(r"the spectral radius of its step is (\d+\.\d+)", warning["text"])[1])
    assert radius > 1
    assert "measured at the start, z = x" in warning["text"]
    for remedy in ("more model.damping", "a smaller model.scale", "model.layer_norm true", "model.weight_std"):
        assert remedy in warning["text"]
    assert f"radius of its step is {radius:.3f}" in run.summary["message"]
    assert "update.lr" not in run.summary["message"], "nothing has been learned yet"
    assert run.summary["warnings"] == [f"step 0: {warning['text']}"]


def test_a_loss_that_is_lost_in_training_says_both_what_the_model_finds_and_what_helps_any_run(tmp_path):
    wild = {"name": "sgd", "lr": 1e8}
    credit = {"name": "bptt", "residual_limit": None}
    clip, often = {"clip": None}, {"budget": {"steps": 3}, "eval_every": 1, "log_every": 100}
    model = EQUILIBRIUM | {"layer_norm": False}
    run = train(tiny_recipe(model=model, credit=credit, update=wild, learner=clip, run=often), tmp_path / "run")
    assert run.summary["status"] == "diverged"
    assert "The validation loss became nan" in run.summary["message"]
    assert "not contractive" in run.summary["message"]
    assert "a lower update.lr" in run.summary["message"]


@pytest.mark.parametrize("credit", ["equilibrium", "bptt", "implicit"])
def test_the_manifest_tells_of_a_penalty(credit, tmp_path):
    for strength in (0.0, 0.25):
        section = {"name": credit, "jacobian_penalty": strength}
        recipe = tiny_recipe(model=EQUILIBRIUM, credit=section, run={"budget": {"steps": 1}})
        said = train(recipe, tmp_path / str(strength)).folder / "manifest.json"
        remarks = json.loads(said.read_text()).get("remarks", [])
        assert any("jacobian_penalty 0.25" in said and "double backpropagation" in said for said in remarks) == bool(
            strength
        )


def test_the_gpt_needs_no_guard_on_its_nudged_phases(tmp_path):
    """Their last step carries the nudge to the embeddings: it is long, and the end."""
    recipe = tiny_recipe(model=GPT, credit="equilibrium", run={"budget": {"steps": 1}})
    assert recipe.credit.nudged_limit == 0.1
    (row,) = read_rows(train(recipe, tmp_path / "run").folder / "metrics.jsonl", "train")
    assert row["nudged_residual"] > 0.1
    assert "unsettled" not in row


def test_without_a_limit_it_goes_on_and_keeps_saying_so(tmp_path):
    credit = {"name": "equilibrium", "residual_limit": None}
    run = train(tiny_recipe(model=WILD, credit=credit, run={"budget": {"steps": 10}}), tmp_path / "run")
    if run.summary["status"] == "diverged":  # of itself
        assert "limit" not in run.summary["message"]
    assert len(run.summary["warnings"]) >= 1


def test_metrics_show_radius_and_residuals(tmp_path):
    credit = {"name": "equilibrium", "jacobian_penalty": 0.1}
    run = train(tiny_recipe(model=EQUILIBRIUM, credit=credit), tmp_path / "run")
    assert run.summary["status"] == "finished"
    assert run.summary["warnings"] == []
    for row in read_rows(run.folder / "metrics.jsonl"):
        if row["kind"] == "eval":
            assert 0 < row["spectral_radius"] < 1
        else:
            assert 0 < row["free_residual"] < 0.01
            assert 0 < row["nudged_residual"] < 0.1
            assert row["jacobian_growth"] > 0


def test_the_gpt_learns_by_relaxation_what_it_learns_by_backprop(tmp_path):
    sections = {"model": GPT, "run": {"precision": "float64"}}
    losses = [
        train(tiny_recipe(credit=credit, **sections), tmp_path / str(number)).summary["val_loss"]
        for number, credit in enumerate([{"name": "equilibrium", "beta": 1e-3}, "backprop"])
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_plan_of_a_tolerance_counts_all_steps():
    section = EQUILIBRIUM | {"tolerance": 0.5}
    model, batch = Model.Config(**section).build(8, Streams(0)), tiny_batch(8, 16, 8)
    planned = plan(tiny_recipe(model=section, credit="bptt"))["per_step"]["flops"]
    assert planned == model.forward_flops(8, 16).with_backward
    assert BPTT().signal(model, batch, torch.ones(8), CrossEntropy()).cost.flops < planned


def test_gpt2_cannot_hold_it(tmp_path):
    run = train(tiny_recipe(model=EQUILIBRIUM, run={"budget": {"steps": 2}}), tmp_path / "run")
    with pytest.raises(RecipeError, match="this run's is equilibrium"):
        export_run(run.folder, "gpt2", tmp_path / "gpt2")


@pytest.mark.parametrize("credit", ["equilibrium", "bptt", "implicit"])
def test_explain_shows_a_manifest_on_a_model_that_it_can_train(credit):
    answer = explain_part(f"credit.{credit}")
    assert set(answer["manifest"].values()) <= set(ORIGINS)
    assert answer["manifest"]["head.weight"] == "exact"
