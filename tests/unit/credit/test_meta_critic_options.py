"""What a recipe of MCL-DSUP may not ask for, and what its parts do with what it may."""

import pytest
import torch

from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.core.types import Batch
from heterodox.credit.meta_critic.mask import largest, units_kept
from heterodox.credit.meta_critic.target import draw_projection
from heterodox.objective import CrossEntropy
from heterodox.probe import activation_bytes
from heterodox.recipe import check
from heterodox.run.plan import plan
from heterodox.run.session import build_learner, build_model, open_session
from tests.tiny import tiny_batch, tiny_recipe

REFUSED = {
    "no entry": (
        {"structure": "elementwise", "density": 1e-4},
        "density 0.0001 keeps none of the 256 units of attn.q of 16 × 16",
    ),
    "no tile": ({"structure": "block", "block": 8, "density": 0.2}, "density 0.2 keeps none of the 4 units of attn.q"),
    "no term": ({"structure": "low_rank", "rank": 2, "density": 0.3}, "keeps none of the 2 units of attn.q"),
    "no token": ({"density": 0.05}, "density 0.05 of an example's 16 tokens keeps none"),
    "tiles do not fit": ({"structure": "block", "block": 5}, "block is 5, which does not divide attn.q of 16 × 16"),
    "tiles do not fit fc": (
        {"structure": "block", "block": 32, "matrices": ["mlp.fc"]},
        "block is 32, which does not divide mlp.fc of 64 × 16",
    ),
    "rank": ({"structure": "low_rank", "rank": 17}, "rank is 17, above the rank 16 of attn.q of 16 × 16"),
    "too many layers": ({"layers_per_step": 4}, "layers_per_step is 4, but there are 3 stages to sample"),
    "and fewer stages": (
        {"layers_per_step": 3, "embeddings": "frozen"}, "layers_per_step is 3, but there are 2 stages to sample",
    ),
    "rank of outer": ({"rank": 2}, "rank is for structure low_rank only, and structure is outer"),
    "block of outer": ({"block": 2}, "block is for structure block only, and structure is outer"),
    "point of blocks": ({"structure": "block", "point": "output"}, "point is for structure outer only"),
    "frozen and phase 0": (
        {"objective": "frozen", "regression_steps": 3}, "regression_steps is 3, but objective frozen has no meta-step",
    ),
    "phase 0 of regression": (
        {"objective": "regression", "regression_steps": 3}, "but objective regression is nothing else",
    ),
    "activations of no errors": (
        {"hypothesis": "activations", "structure": "low_rank"}, "structure outer and objective meta, not low_rank",
    ),
    "activations and regression": (
        {"hypothesis": "activations", "objective": "regression"}, "objective meta, not outer and regression",
    ),
    "transport of a pooled target": (
        {"transport": "attention", "target": "pooled"}, "transport attention needs a G of tokens",
    ),
    "transport without a tape": ({"transport": "attention", "point": "output"}, "not error, outer and output"),
    "reuse of nothing": ({"reuse_target": True, "meta_every": 2}, "reuse_target needs a meta-step in every step"),
    "density of 0": ({"density": 0}, "credit.density"),
    "unknown matrix": ({"matrices": ["mlp.up"]}, "credit.matrices"),
    "a start that cannot be": ({"start": "stream", "linear": False}, "start stream needs"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_numbers(options, reason):
    with pytest.raises(RecipeError) as refusal:
        tiny_recipe(credit={"name": "meta_critic"} | options)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_model_is_refused():
    with pytest.raises(RecipeError, match="needs blocks run one after another: model gpt, not equilibrium"):
        tiny_recipe(credit="meta_critic", model={"name": "equilibrium", "layers": 1})


def test_a_resolved_recipe_is_read_again():
    recipe = tiny_recipe(credit="meta_critic", model={"frozen_embeddings": True})
    assert check(recipe.dump()) == recipe


def built(**options):
    recipe = tiny_recipe(credit={"name": "meta_critic"} | options)
    model = build_model(recipe, 8, "cpu")
    return recipe, model, build_learner(recipe, model, Solo()).credit


def test_too_many_meta_parameters_are_refused_when_they_can_be_counted():
    _, _, rule = built()
    size = sum(parameter.numel() for parameter in rule.proposals.critics.parameters())
    built(max_meta_parameters=size)
    with pytest.raises(RecipeError, match=rf"{size:,} parameters, above credit.max_meta_parameters {size - 1:,}"):
        built(max_meta_parameters=size - 1)


@pytest.mark.parametrize("options", [{"objective": "regression"}, {"regression_steps": 7}])
def test_the_manifest_declares_that_critics_learn_by_backpropagation(options):
    manifests = [
        open_session(tiny_recipe(credit={"name": "meta_critic"} | given), Solo(), "cpu").manifest()
        for given in (options, {})
    ]
    declared, plain = (" ".join(manifest["remarks"]) for manifest in manifests)
    assert "backpropagation" in declared
    assert "meta-parameters" in plain
    assert "backpropagation" not in plain


def test_tiles_that_do_not_divide_the_vocabulary_are_refused():
    with pytest.raises(RecipeError, match=r"block is 16, which does not divide tok_emb\.weight of 8 × 16; make credit"):
        built(structure="block")
    built(structure="block", embeddings="frozen")


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"target": "pooled", "structure": "low_rank"}])
def test_a_plan_foretells_what_a_step_costs_and_holds(options):
    recipe, model, rule = built(**options)
    drawn = tiny_batch(recipe.run.batch_size, 16, 8)
    batch = Batch(drawn.inputs.contiguous(), drawn.targets.contiguous(), drawn.ids)
    foretold = plan(recipe)
    weights = torch.ones(len(batch.ids))
    assert foretold["memory_bytes"]["activations"] == activation_bytes(model, batch, weights, CrossEntropy(), rule)
    assert foretold["per_step"]["flops"] == rule.signal(model, batch, weights, CrossEntropy()).cost.flops
    assert foretold["memory_bytes"]["rule_state"] > 3 * sum(p.nbytes for p in rule.proposals.critics.parameters())


def test_the_mask_keeps_exactly_so_many_and_the_largest():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert largest(scores, 2).sum(-1).tolist() == [2, 2]
    assert bool(largest(scores, 1)[0, 0])
    assert [units_kept(density, 10) for density in (0.05, 0.1, 0.29, 0.3, 1.0)] == [0, 1, 2, 3, 10]


@pytest.mark.parametrize(("local", "density"), [(6, 1.0), (9, 1.0), (12, 1.0), (6, 0.3)])
def test_projections_lose_nothing_that_they_need_not(local, density):
    matrix = draw_projection(local, 9, density, Streams(0).generator("rule")).double()
    assert torch.allclose(matrix.norm(dim=1).square().mean(), torch.ones((), dtype=torch.float64), rtol=1e-6)
    if density < 1:
        assert (matrix != 0).sum(1).tolist() == [3] * local
    else:
        gram = matrix.T @ matrix if local >= 9 else matrix @ matrix.T
        assert torch.allclose(gram, gram[0, 0] * torch.eye(len(gram), dtype=torch.float64), atol=1e-6)
