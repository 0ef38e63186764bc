"""What a recipe of MCL-DSUP may not ask for, and what its parts do with what it may."""

import pytest
import torch

from heterodox.app.plan import plan
from heterodox.app.recipe import check
from heterodox.app.session import build_learner, build_model, open_session
from heterodox.app.train import train
from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.memory import activation_bytes
from heterodox.core.rng import Streams
from heterodox.core.types import Batch
from heterodox.credit.meta_critic.forward import draw_projection
from heterodox.credit.meta_critic.networks import largest, units_kept
from heterodox.objective import CrossEntropy
from heterodox.training.metrics import read_rows
from tests.tiny import tiny_batch, tiny_recipe

TWELVE = {"budget": {"steps": 12}}
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
    "frozen at a rhythm": ({"objective": "frozen", "meta_every": 2}, "meta_every is 2, but objective frozen has no"),
    "frozen with a floor": ({"objective": "frozen", "floor": 0.5}, "floor is 0.5, but objective frozen has no"),
    "frozen with a penalty": ({"objective": "frozen", "penalty": 0.0}, "penalty is 0.0, but objective frozen has no"),
    "frozen with a rate": ({"objective": "frozen", "meta_lr": 0.1}, "meta_lr is 0.1, but objective frozen has no"),
    "frozen with MLP_G's rate": ({"objective": "frozen", "target_lr": 0.1}, "target_lr is 0.1, but objective frozen"),
    "frozen with a clip": ({"objective": "frozen", "meta_clip": None}, "meta_clip is None, but objective frozen"),
    "frozen with a decay": (
        {"objective": "frozen", "meta_weight_decay": 0.1}, "meta_weight_decay is 0.1, but objective frozen has no",
    ),
    "frozen with a warm-up": ({"objective": "frozen", "meta_warmup": 3}, "meta_warmup is 3, but objective frozen has"),
    "frozen and sampled": ({"objective": "frozen", "layers_per_step": 1}, "layers_per_step is 1, but objective frozen"),
    "frozen with a suffix": (
        {"objective": "frozen", "suffix": "separate"}, "suffix is separate, but objective frozen has no partial",
    ),
    "frozen with a step": ({"objective": "frozen", "step": 0.5}, "step is 0.5, but objective frozen has no"),
    "regression with a floor": ({"objective": "regression", "floor": 0.5}, "but objective regression has no meta-loss"),
    "regression with a penalty": ({"objective": "regression", "penalty": 2}, "penalty is 2.0, but objective"),
    "regression with a suffix": (
        {"objective": "regression", "suffix": "separate"}, "objective regression has no partial forward",
    ),
    "start of no linear path": ({"start": "random", "linear": False}, "start random is of the linear path, but linear"),
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
    "blocks that never learn": (
        {"meta_only_steps": 12}, "meta_only_steps is 12 of a budget of 12 steps: blocks never learn",
    ),
    "phase 0 without end": (
        {"regression_steps": 13}, "regression_steps is 13 of a budget of 12 steps: critics never learn by a meta-loss",
    ),
    "density of 0": ({"density": 0}, "credit.density"),
    "unknown matrix": ({"matrices": ["mlp.up"]}, "credit.matrices"),
    "a start that cannot be": ({"start": "stream", "linear": False}, "start stream needs"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_numbers(options, reason):
    with pytest.raises(RecipeError) as refusal:
        tiny_recipe(credit={"name": "meta_critic"} | options, run=TWELVE)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_transport_past_no_block_is_refused():
    one, frozen = {"layers": 1}, {"embeddings": "frozen"}
    for model, options in ((one, frozen), ({"frozen_embeddings": True} | one, {})):
        with pytest.raises(
            RecipeError, match=r"transport is attention, but model\.layers is 1 and embeddings are frozen"
        ):
            tiny_recipe(credit={"name": "meta_critic", "transport": "attention"} | options, model=model)
    tiny_recipe(credit={"name": "meta_critic", "transport": "attention"}, model=one)
    tiny_recipe(credit={"name": "meta_critic", "transport": "attention"} | frozen)


def test_waiting_until_the_last_step_but_one_is_accepted():
    tiny_recipe(credit={"name": "meta_critic", "meta_only_steps": 11, "regression_steps": 11}, run=TWELVE)


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


@pytest.mark.parametrize("objective", ["frozen", "regression"])
def test_what_joint_measurements_need_is_accepted_with_them(objective):
    recipe = tiny_recipe(credit={"name": "meta_critic", "objective": objective, "suffix": "separate", "joint_every": 5})
    assert check(recipe.dump()) == recipe
    tiny_recipe(credit={"name": "meta_critic", "objective": "frozen", "step": 0.5, "joint_every": 5})


RHYTHMS = {
    "every third step behind phase 0": {"meta_every": 3, "regression_steps": 4},
    "sampled": {"layers_per_step": 1, "transport": "attention", "hypothesis": "activations"},
    "all": {"meta_every": 2, "layers_per_step": 2, "joint_every": 3, "regression_steps": 4},
}
QUIET = {"eval_every": 100, "sampling": {"tokens": 0}}


@pytest.mark.parametrize("credit", RHYTHMS.values(), ids=RHYTHMS)
def test_a_plan_foretells_what_a_run_is_charged(credit, tmp_path):
    """To the last FLOP, whatever the steps' rhythm; step by step they do differ."""
    recipe = tiny_recipe(credit={"name": "meta_critic"} | credit, run={"budget": {"steps": 10}} | QUIET)
    foretold, run = plan(recipe), train(recipe, tmp_path)
    assert foretold["flops"] == run.summary["flops"]
    assert foretold["per_step"]["flops"] == run.summary["flops"] // 10
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert foretold["flops"] != 10 * rows[0]["flops"]
    for budget in ({"flops": foretold["flops"]}, {"tokens": foretold["tokens"]}):
        again = plan(tiny_recipe(credit={"name": "meta_critic"} | credit, run={"budget": budget}))
        assert (again["steps"], again["flops"]) == (10, foretold["flops"])


def test_a_plan_counts_what_learns_once_proposals_are_handed_over():
    """Its signal and moments are there later on, although the first steps move the readout alone."""
    late, plain = (plan(tiny_recipe(credit={"name": "meta_critic", "meta_only_steps": steps})) for steps in (9, 0))
    assert late["trained_parameters"] == plain["trained_parameters"] == plain["parameters"]
    for part in ("signal", "update_state"):
        assert late["memory_bytes"][part] == plain["memory_bytes"][part] > 0


def test_a_plan_of_a_long_run_takes_the_mean_of_the_steps_that_it_looks_at(monkeypatch):
    credit = {"name": "meta_critic", "meta_every": 4}
    plans = []
    for horizon in (8, 10_000):
        monkeypatch.setattr("heterodox.app.plan.HORIZON", horizon)
        plans.append(plan(tiny_recipe(credit=credit, run={"budget": {"steps": 400}})))
    assert plans[0] == plans[1]
    budget = {"flops": plans[0]["flops"]}
    monkeypatch.setattr("heterodox.app.plan.HORIZON", 8)
    assert plan(tiny_recipe(credit=credit, run={"budget": budget}))["steps"] == 400


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
