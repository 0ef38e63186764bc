"""Each control of the meta-step, by what it does to the critics' first steps and to what is handed over."""

import pytest
import torch

from heterodox.credit.meta_critic import MetaCritic
from tests.meta_critic import rule_of
from tests.signals import same, signal_of
from tests.tiny import tiny_gpt

Tensors = dict[str, torch.Tensor]


def critics_of(rule: MetaCritic) -> Tensors:
    return {name: p.detach().clone() for name, p in rule.proposals.critics.named_parameters()}


def moves(step: int = 0, **options) -> Tensors:
    """How far one signal moves critics and MLP_G, as if it were that of step number `step`."""
    model = tiny_gpt()
    rule = rule_of(model, **options)
    rule.step, before = step, critics_of(rule)
    signal_of(rule, model)
    return {name: after - before[name] for name, after in critics_of(rule).items()}


def longest(found: Tensors, of_target: bool) -> float:
    return max(float(x.abs().max()) for name, x in found.items() if name.startswith("target.") == of_target)


def test_target_lr_is_the_rate_of_the_target_network_alone():
    """AdamW's first step is as long as its learning rate, whatever the gradient."""
    found = moves(meta_lr=1e-3, target_lr=1e-2, meta_weight_decay=0.0)
    assert longest(found, of_target=True) == pytest.approx(1e-2, rel=1e-6)
    assert longest(found, of_target=False) == pytest.approx(1e-3, rel=1e-6)
    assert longest(moves(meta_lr=1e-3, meta_weight_decay=0.0), of_target=True) == pytest.approx(1e-3, rel=1e-6)


def test_meta_weight_decay_shrinks_all_by_rate_and_decay():
    plain, decayed = (moves(meta_lr=1e-3, meta_weight_decay=decay) for decay in (0.0, 0.5))
    for name, start in critics_of(rule_of(tiny_gpt())).items():
        assert torch.allclose(decayed[name] - plain[name], -1e-3 * 0.5 * start, rtol=1e-6, atol=1e-12), name


def test_meta_warmup_grows_both_rates_linearly():
    plain = moves(target_lr=1e-2)
    assert longest(plain, of_target=True) > 0
    for step, share in {0: 0.25, 1: 0.5, 3: 1.0, 9: 1.0}.items():
        for name, move in moves(step, target_lr=1e-2, meta_warmup=4).items():
            assert torch.allclose(move, share * plain[name], rtol=1e-9, atol=1e-14), (step, name)


def first_moments(**options) -> tuple[float, float]:
    """The norm of the gradient that AdamW got in a first step, and the one that is reported."""
    model = tiny_gpt()
    rule = rule_of(model, **options)
    metrics = signal_of(rule, model).metrics
    got = torch.stack([x.square().sum() for x in rule.optimiser.first.values()]).sum().sqrt() / (1 - 0.9)
    parts = [metrics[f"meta_grad_norm/{part}"].square() for part in ("critics", "target")]
    return float(got), float(torch.stack(parts).sum().sqrt())


def test_meta_clip_limits_the_global_norm_and_the_norms_are_told_from_before():
    got, reported = first_moments(meta_clip=None)
    assert got == pytest.approx(reported, rel=1e-9)
    clipped, still = first_moments(meta_clip=reported / 2)
    assert clipped == pytest.approx(reported / 2, rel=1e-4)
    assert still == pytest.approx(reported, rel=1e-9)
    assert first_moments(meta_clip=2 * reported)[0] == pytest.approx(reported, rel=1e-9)


def test_meta_only_steps_hand_over_the_readouts_gradient_alone_while_critics_learn():
    model = tiny_gpt()
    rule = rule_of(model, meta_only_steps=2)
    for step in range(4):
        before = critics_of(rule)
        grads = signal_of(rule, model).grads
        everything = {name for name, _ in model.named_parameters()}
        assert grads.keys() == (model.readout_names if step < 2 else everything)
        assert all(not torch.equal(p, before[name]) for name, p in critics_of(rule).items() if "target" in name)


def test_proposal_warmup_grows_proposals_linearly_once_they_are_handed_over():
    model = tiny_gpt()
    plain, warming = rule_of(model), rule_of(model, meta_only_steps=1, proposal_warmup=3)
    name = "blocks.0.mlp.fc.weight"
    for share in (None, 1 / 3, 2 / 3, 1.0, 1.0):
        whole, found = (signal_of(rule, model).grads for rule in (plain, warming))
        assert whole[name].norm() > 0
        if share is None:
            assert name not in found
        else:
            assert same(found[name], share * whole[name])
            assert same(found["head.weight"], whole["head.weight"])
