"""MCL-DSUP's meta-gradient against finite differences and its limits, and an oracle critic against backprop."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from heterodox.core.comm import Solo
from heterodox.credit import Backprop, MetaCritic
from heterodox.credit.meta_critic import forward as partial
from heterodox.credit.meta_critic import proposals
from heterodox.credit.meta_critic.networks import EMBEDDINGS, stage_of
from heterodox.learner import Gradient
from heterodox.objective import CrossEntropy
from heterodox.rating import Uniform
from heterodox.update import SGD, AdamW
from tests.measured import differ, is_of_order, within
from tests.meta_critic import dot, meta_of, rule_of, slope, summary_gradients
from tests.signals import WEIGHTS, grads_of, same, signal_of
from tests.tiny import tiny_batch, tiny_gpt

RULES = {
    "outer": {},
    "outer of some tokens": {"density": 0.5},
    "outer at each matrix": {"point": "output"},
    "activations": {"hypothesis": "activations"},
    "activations of some tokens": {"hypothesis": "activations", "density": 0.5, "floor": 9.0},
    "transport": {"transport": "attention"},
    "activations and transport": {"hypothesis": "activations", "transport": "attention", "critic": "mlp"},
    "activations at each matrix": {"hypothesis": "activations", "point": "output"},
    "shared": {"shared": True},
    "mlp": {"critic": "mlp", "local_width": 5, "local_density": 0.5},
    "token": {"target": "token"},
    "plain": {"penalty": 0.0, "step": 0.3, "floor": 9.0},
    "low_rank": {"structure": "low_rank", "rank": 3, "density": 0.67},
    "block": {"structure": "block", "block": 4, "density": 0.5, "embeddings": "frozen"},
    "elementwise": {"structure": "elementwise", "density": 0.1},
    "source": {
        "structure": "low_rank",
        "rank": 2,
        "target": "pooled",
        "critic": "mlp",
        "linear": False,
        "penalty": 0.0,
    },
}  # fmt: skip
SIGMOID = {"attention": "sigmoid", "sigmoid_bias": "learned"}
every_rule = pytest.mark.parametrize("options", RULES.values(), ids=RULES)


@every_rule
@pytest.mark.parametrize("switches", [{}, {"attention": "sigmoid", "sigmoid_bias": "learned", "residual_gates": True}])
def test_the_critics_gradient_is_that_of_the_meta_loss(options, switches):
    """Along random directions of θ, MLP_G's and every critic's; masks do not change at so small a step."""
    model = tiny_gpt(**switches)
    rule = rule_of(model, **options)
    found = meta_of(rule, model).gradient
    for seed in range(2):
        measured, direction = slope(rule, model, lambda: meta_of(rule, model).value, seed, eps=1e-6)
        assert dot(found, direction) == pytest.approx(measured, rel=1e-5, abs=1e-10)
        assert abs(measured) > 1e-7
    of_target = {name: g for name, g in found.items() if name.startswith("target.")}
    assert all(float(g.norm()) > 0 for g in of_target.values())


@every_rule
def test_for_a_small_step_it_is_minus_the_step_times_the_slope_along_the_gradient(options):
    """∂L_meta,i/∂θ → −η ⟨∂ΔW/∂θ, ∇_W L⟩, to first order in η; without a penalty. Of errors: −η ⟨∂δ/∂θ, ∂L/∂a⟩."""
    model = tiny_gpt()
    rule = rule_of(model, **options)
    exact = true_moves(model, rule) if rule.meta.activations else grads_of(Backprop(), model)

    def distance(step: float) -> float:
        rule = rule_of(model, **options | {"penalty": 0.0, "floor": 0.0, "step": step})
        found = meta_of(rule, model).gradient

        def along_the_gradient() -> torch.Tensor:
            each = meta_of(rule, model).proposals.values()
            return sum((d * exact[n]).sum() for proposal in each for n, d in proposal.items()) / len(each)

        measured, direction = slope(rule, model, along_the_gradient, eps=1e-6)
        assert abs(measured) > 1e-7
        return abs(dot(found, direction) / (-step * measured) - 1)

    large, small = distance(1e-4), distance(1e-5)
    assert within(large, 1e-2)
    assert small < 0.2 * large + 1e-6


@every_rule
def test_every_stage_sends_a_gradient_to_its_critic_and_to_the_target_network(options):
    model = tiny_gpt()
    rule = rule_of(model, **options)
    for stage in rule.proposals.stages:
        found = meta_of(rule, model, [stage]).gradient
        of_target = [g for name, g in found.items() if name.startswith("target.")]
        of_critics = [g for name, g in found.items() if name.startswith("nets.")]
        assert of_target
        assert of_critics
        assert all(float(g.norm()) > 0 for g in (*of_target, *of_critics)), stage


def test_the_source_with_detached_streams_sends_none_from_below_the_last_block(monkeypatch):
    """Its protocol detaches h_j' between layers: the reason why ours does not."""
    model = tiny_gpt()
    plain, run_stage = rule_of(model, penalty=0.0), partial.run_stage

    def detached(gpt, index, x):
        return run_stage(gpt, index, x.detach() if x.is_floating_point() else x)

    monkeypatch.setattr(partial, "run_stage", detached)
    first, last = (next(s for s in plain.proposals.stages if s.index == index) for index in (0, 1))
    below, above = (meta_of(plain, model, [stage]).gradient for stage in (first, last))
    assert dot(below, below) == 0
    assert dot(above, above) > 0


def true_errors(model, rule: MetaCritic, weights: torch.Tensor = WEIGHTS) -> dict[str, torch.Tensor]:
    """The true error at every point at which the rule lets errors enter."""
    modules, outputs = dict(model.named_modules()), {}
    points = {slot for stage in rule.proposals.stages for slot in stage.slots}

    def keep(point):
        def hook(module, args, output):
            outputs[point] = output

        return hook

    handles = [modules[point].register_forward_hook(keep(point)) for point in points]
    loss = (CrossEntropy().losses(model(tiny_batch().inputs), tiny_batch()) * weights).mean()
    for handle in handles:
        handle.remove()
    found = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    positions = found["pos_emb"]
    return found | {"pos_emb": positions.expand(len(WEIGHTS), -1, -1) / len(WEIGHTS)}


def true_moves(model, rule: MetaCritic) -> dict[str, torch.Tensor]:
    """The same where positions may move by example."""
    found = true_errors(model, rule)
    return found | {"pos_emb": found["tok_emb"]}


def let_an_oracle_speak(monkeypatch, errors, sign: float = 1.0) -> None:
    """Critics answer with the true errors."""

    def outputs(self, stage, context, target, size, *, mean):
        del self, context, target, size, mean
        return {slot: sign * tiny_batch().num_tokens * errors[slot] for slot in stage.slots}

    monkeypatch.setattr(proposals.Critics, "outputs", outputs)


@pytest.mark.parametrize("point", ["branch", "output"])
@pytest.mark.parametrize(
    "switches", [{}, {"residual_gates": True}, {"attention": "sigmoid", "sigmoid_bias": "learned"}]
)
@pytest.mark.parametrize("update", [SGD(lr=0.3), AdamW(lr=1e-2)])
def test_an_oracle_critic_is_backprop_with_the_same_update(update, switches, point, monkeypatch):
    weights = []
    for oracle in (1.0, -1.0, None):
        model = tiny_gpt(**switches)
        credit = Backprop() if oracle is None else rule_of(model, point=point, objective="frozen")
        if oracle is not None:
            let_an_oracle_speak(monkeypatch, true_errors(model, credit, torch.ones(4)), oracle)
        update.load_state({"names": [], "moments": {}})
        Gradient(model, CrossEntropy(), Uniform(), credit, update, Solo(), clip=None).step(tiny_batch())
        weights.append(model.state_dict())
    oracle, wrong, backprop = weights
    for name, weight in backprop.items():
        if name.endswith("attn.k.bias") and "attention" not in switches:  # no gradient: AdamW divides noise by noise
            continue
        assert torch.allclose(oracle[name], weight, rtol=1e-9, atol=1e-11), name
    name = "blocks.0.mlp.fc.weight"
    assert differ(wrong[name], backprop[name], atol=1e-4)


@pytest.mark.parametrize(
    ("hypothesis", "true", "point"),
    [("weights", true_errors, "branch"), ("activations", true_moves, "branch"), ("activations", true_moves, "output")],
)
def test_the_gradient_is_the_best_proposal_of_the_proximal_loss(hypothesis, true, point, monkeypatch):
    """∂/∂ΔW [L(W − ηΔW) + (η/2)‖ΔW‖²] at ΔW = ∇L vanishes with η, and does not at −∇L; so for errors."""

    def size(sign: float, step: float) -> float:
        model = tiny_gpt()
        rule = rule_of(model, step=step, hypothesis=hypothesis, point=point)
        with monkeypatch.context() as patch:
            let_an_oracle_speak(patch, true(model, rule), sign)
            found = summary_gradients(rule, model)
        return sum(float(g.square().sum()) for g in found) ** 0.5 / step

    assert size(1.0, 1e-3) < 0.05 * size(-1.0, 1e-3)
    steps = (1e-3, 1e-4)
    assert is_of_order([size(1.0, step) for step in steps], steps, 1, 0.3)


@pytest.mark.parametrize("hypothesis", ["weights", "activations"])
def test_partial_forwards_one_by_one_give_the_same_gradient(hypothesis):
    model = tiny_gpt()
    shared, separate = (
        meta_of(rule_of(model, suffix=suffix, hypothesis=hypothesis), model) for suffix in ("shared", "separate")
    )
    assert shared.gradient.keys() == separate.gradient.keys()
    for name, gradient in shared.gradient.items():
        assert same(gradient, separate.gradient[name]), name
    assert same(shared.value, separate.value)


@pytest.mark.parametrize("hypothesis", ["weights", "activations"])
@pytest.mark.parametrize("together", [True, False])
def test_partial_forwards_with_the_weights_as_they_are_are_the_main_forward(together, hypothesis):
    """Also under dropout, whose masks are the main forward's, and whether or not streams share the stages above."""
    model = tiny_gpt(dropout=0.0 if together else 0.3)
    rule = rule_of(model, step=1e-300, hypothesis=hypothesis)
    torch.manual_seed(0)
    losses = meta_of(rule, model).losses
    torch.manual_seed(0)
    plain = CrossEntropy().losses(model(tiny_batch().inputs), tiny_batch())
    assert losses.keys() == {EMBEDDINGS, 0, 1}
    for found in losses.values():
        assert same(found, plain.detach())


def test_the_joint_change_is_that_of_all_proposals_at_once():
    model = tiny_gpt()
    rule = rule_of(model, joint_every=1, step=0.1)
    signal = signal_of(rule, model)
    loss = signal.loss.clone()
    with torch.no_grad():
        for name, proposal in signal.grads.items():
            if name not in model.readout_names:
                model.get_parameter(name).sub_(proposal, alpha=0.1)
    after = (CrossEntropy().losses(model(tiny_batch().inputs), tiny_batch()) * WEIGHTS).mean()
    assert same(signal.metrics["proposal_gain/joint"], (loss - after).detach())
    assert abs(float((after - loss).detach())) > 1e-4


def test_frozen_critics_stay_and_sampled_stages_alone_learn():
    model = tiny_gpt()
    frozen, sampled = rule_of(model, objective="frozen"), rule_of(model, layers_per_step=1)
    for rule in (frozen, sampled):
        before = {name: tensor.clone() for name, tensor in rule.state()["critics"].items()}
        signal_of(rule, model)
        moved = {name for name, tensor in rule.state()["critics"].items() if not torch.equal(tensor, before[name])}
        nets = {name.split(".")[1] for name in moved if name.startswith("nets.")}
        assert len(nets) == (0 if rule is frozen else 1)
        assert any(name.startswith("target.") for name in moved) == (rule is sampled)
    assert stage_of("blocks.1.mlp.fc.weight") == 1


def test_regression_asks_for_the_true_gradient():
    """Many steps of it on one batch turn every matrix's proposal towards the gradient; without, they do not."""
    model = tiny_gpt()
    exact = grads_of(Backprop(), model)
    rule = rule_of(model, objective="regression", meta_lr=2e-2, critic_hidden=32, meta_weight_decay=0.0)
    first = signal_of(rule, model).grads
    for _ in range(150):
        last = signal_of(rule, model).grads
    for name, gradient in exact.items():
        if gradient.ndim == 2 and name.startswith("blocks"):
            before, after = (cosine_similarity(g[name].flatten(), gradient.flatten(), 0) for g in (first, last))
            assert after > max(0.8, float(before)), name
