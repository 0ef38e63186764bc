"""Random combinations of model switches, rules and updates: each builds, trains, resumes bit for bit, or is refused."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from heterodox.app.recipe import Recipe
from heterodox.app.train import train
from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.training.checkpoint import Checkpoints
from tests.conformance.combinations import ON_GPT, UPDATES, VARIANTS, recipe_of, runs
from tests.saved import assert_same_bits, tensors
from tests.switches import ALL_AT_ONCE

WIDTH = 16
SOFTMAX: dict[str, st.SearchStrategy[Any]] = {
    "softmax_backward": st.sampled_from(["autograd", "fused", "centred"]),
}
SIGMOID: dict[str, st.SearchStrategy[Any]] = {
    "sigmoid_bias": st.sampled_from(["neg_log_n", "neg_log_row", "zero", "learned"]),
    "straight_through_sigmoid": st.booleans(),
}
EITHER: dict[str, st.SearchStrategy[Any]] = {
    "straight_through_gelu": st.booleans(),
    "norm_backward": st.sampled_from(["exact", "straight_through", "center_scale", "projected"]),
    "mlp_top_k": st.integers(1, 4 * WIDTH),
    "residual_top_k": st.integers(1, WIDTH),
    "vq_codes": st.integers(2, 40),
    "subspace_rank": st.integers(1, WIDTH),
    "residual_gates": st.booleans(),
    "frozen_embeddings": st.booleans(),
    "dropout": st.sampled_from([0.0, 0.2]),
    "bias": st.booleans(),
}
TOO_LARGE: dict[str, st.SearchStrategy[Any]] = {
    "mlp_top_k": st.integers(1, 5 * WIDTH),
    "residual_top_k": st.integers(1, 2 * WIDTH),
    "vq_codes": st.integers(1, 2),
    "subspace_rank": st.integers(1, 2 * WIDTH),
}
ATTENTION = {"attention": st.sampled_from(["softmax", "sigmoid"])}
MODELS = st.one_of(
    st.fixed_dictionaries({}, optional=SOFTMAX | EITHER),
    st.fixed_dictionaries({"attention": st.just("sigmoid")}, optional=SIGMOID | EITHER),
    st.fixed_dictionaries({}, optional=ATTENTION | SOFTMAX | SIGMOID | EITHER | TOO_LARGE),
)
combinations = given(model=MODELS, credit=st.sampled_from([*ON_GPT, *VARIANTS]), update=st.sampled_from(UPDATES))
few = settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=400, derandomize=False)


def valid(model: dict[str, Any]) -> bool:
    """Whether the options fit together, said in other words than the recipe's."""
    softmax = model.get("attention", "softmax") == "softmax"
    for_sigmoid = "sigmoid_bias" in model or model.get("straight_through_sigmoid", False)
    backward = model.get("softmax_backward", "autograd")
    return (
        not (softmax and for_sigmoid)
        and not (not softmax and backward != "autograd")
        and not (backward == "centred" and model.get("dropout"))
        and model.get("mlp_top_k", 1) <= 4 * WIDTH
        and model.get("residual_top_k", 1) <= WIDTH
        and model.get("subspace_rank", 1) <= WIDTH
        and model.get("vq_codes", 2) >= 2
    )


def check(model: dict[str, Any], credit: str, update: str) -> None:
    run = {"budget": {"steps": 3}, "checkpoint_every": 1, "eval_every": 3, "eval_batches": 1, "batch_size": 4}
    sections = {"model": model | {"layers": 2, "width": WIDTH}, "run": run | {"warmup_steps": 0}}
    if not valid(model):
        with pytest.raises(RecipeError, match=r"\Amodel.*\Z"):  # one line that names the section
            recipe_of(credit, update, **sections)
        return
    if not runs(credit, update):
        with pytest.raises(RecipeError, match=r"\Aupdate .*\Z"):
            recipe_of(credit, update, **sections)
        return
    with tempfile.TemporaryDirectory() as folder:
        trains_and_resumes(recipe_of(credit, update, **sections), Path(folder))


def trains_and_resumes(recipe: Recipe, folder: Path) -> None:
    whole = train(recipe, folder / "whole")
    assert whole.summary["status"] == "finished"
    shutil.copytree(folder / "whole", folder / "cut")
    (folder / "cut" / "summary.json").unlink()
    newest = Checkpoints(folder / "cut" / "checkpoints").names()[-1]
    shutil.rmtree(folder / "cut" / "checkpoints" / newest)
    assert train(recipe, folder / "cut", resume=True).summary["steps"] == 3
    one = tensors(folder / "whole")
    assert_same_bits(one, tensors(folder / "cut"))
    initial = recipe.model.build(whole.model.head.out_features, Streams(recipe.seed)).state_dict()
    assert any(not torch.equal(initial[name], one[f"model/{name}"]) for name in initial)


@few
@combinations
@example(model=ALL_AT_ONCE, credit="direct_feedback own", update="sgd")
@example(model=ALL_AT_ONCE | {"dropout": 0.2}, credit="kolen_pollack", update="adamw")
@example(model={"dropout": 0.2, "softmax_backward": "fused"}, credit="direct_feedback", update="adamw")
def test_a_combination_trains_and_resumes_or_is_refused(model, credit, update):
    check(model, credit, update)


@pytest.mark.slow
@many
@combinations
def test_many_combinations_do(model, credit, update):
    check(model, credit, update)
