"""What MCL-DSUP tells of its meta-steps: each quantity by hand, and all of them in every row of the log."""

import pytest
import torch

from heterodox.app.train import train
from heterodox.core.errors import CheckpointError
from heterodox.credit import Backprop
from heterodox.objective import CrossEntropy
from heterodox.training.metrics import read_rows
from tests.meta_critic import meta_of, rule_of
from tests.signals import WEIGHTS, grads_of, same, signal_of
from tests.tiny import tiny_batch, tiny_gpt, tiny_recipe

STAGES = ("embeddings", "block_0", "block_1")
HYPOTHESES = pytest.mark.parametrize("hypothesis", ["weights", "activations"])


@HYPOTHESES
def test_meta_loss_penalty_gain_and_variance_are_those_of_the_partial_forwards(hypothesis):
    """Loss and penalty together are what critics minimise; variance is over examples, by their weights."""
    model = tiny_gpt()
    options = {"hypothesis": hypothesis, "step": 0.7, "penalty": 0.4, "floor": 9.0}
    expected = meta_of(rule_of(model, **options), model)
    signal = signal_of(rule_of(model, **options), model)
    told = signal.metrics
    total = torch.stack([told[f"meta_loss/{key}"] + told[f"meta_penalty/{key}"] for key in STAGES]).mean()
    assert same(total, expected.value.detach())
    for key, index in zip(STAGES, (-1, 0, 1), strict=True):
        losses = expected.losses[index]
        mean = (losses * WEIGHTS).sum() / WEIGHTS.sum()
        assert same(told[f"meta_loss/{key}"], mean)
        assert same(told[f"meta_gain/{key}"], signal.loss - mean)
        assert same(told[f"meta_variance/{key}"], ((losses - mean).square() * WEIGHTS).sum() / WEIGHTS.sum())
        assert not torch.isclose(told[f"meta_variance/{key}"], losses.var(correction=0), rtol=1e-3)
        assert told[f"meta_penalty/{key}"] > 0


def test_the_penalty_is_the_proximal_term_and_the_floor_by_hand():
    model = tiny_gpt()
    for floor in (0.0, 9.0):
        options = {"step": 0.7, "penalty": 0.4, "floor": floor}
        told = signal_of(rule_of(model, **options), model).metrics
        proposed = signal_of(rule_of(model, objective="frozen"), model).grads
        square = sum(x.square().sum() for name, x in proposed.items() if name.startswith("blocks.1."))
        missing = max(0.0, floor - float(square) ** 0.5)
        assert float(told["meta_penalty/block_1"]) == pytest.approx(0.35 * (0.4 * float(square) + missing**2))


def test_gradient_norms_are_those_of_the_meta_gradient_by_network():
    model = tiny_gpt()
    expected = meta_of(rule_of(model), model).gradient
    told = signal_of(rule_of(model), model).metrics
    for part in ("target", "critics"):
        squares = [g.square().sum() for n, g in expected.items() if n.startswith("target.") == (part == "target")]
        assert same(told[f"meta_grad_norm/{part}"], torch.stack(squares).sum().sqrt())
    assert not torch.isclose(told["meta_grad_norm/target"], told["meta_grad_norm/critics"])


def test_norms_and_densities_are_those_of_what_is_handed_over():
    model = tiny_gpt()
    signal = signal_of(rule_of(model, structure="elementwise", density=0.1), model)
    for key, start in zip(STAGES, ("tok_emb pos_emb", "blocks.0.", "blocks.1."), strict=True):
        entries = torch.cat([g.flatten() for n, g in signal.grads.items() if n.startswith(tuple(start.split()))])
        assert same(signal.metrics[f"proposal_norm/{key}"], entries.norm())
        share = float(signal.metrics[f"proposal_density/{key}"])
        assert share == pytest.approx(int(entries.count_nonzero()) / entries.numel())
        assert 0.05 < share < 0.5


def test_regression_tells_its_own_loss_and_is_silent_behind_phase_0():
    model, exact = tiny_gpt(), grads_of(Backprop(), tiny_gpt())
    rule = rule_of(model, regression_steps=1, step=0.7)
    proposed = signal_of(rule_of(model, objective="frozen"), model).grads
    first, second = (signal_of(rule, model).metrics for _ in range(2))
    for key, start in {"block_0": "blocks.0.", "block_1": "blocks.1."}.items():
        apart = [(proposed[n] - exact[n]).square().sum() for n in proposed if n.startswith(start)]
        assert same(first[f"regression_loss/{key}"], 0.35 * torch.stack(apart).sum())
        assert torch.isinf(first[f"meta_loss/{key}"])
        assert torch.isinf(second[f"regression_loss/{key}"])
        assert torch.isfinite(second[f"meta_loss/{key}"])


def loss_with(model, proposals, eta: float) -> torch.Tensor:
    """The loss with these weights moved, and moved back again."""
    before = {name: model.get_parameter(name).detach().clone() for name in proposals}
    with torch.no_grad():
        for name, proposal in proposals.items():
            model.get_parameter(name).sub_(proposal, alpha=eta)
        loss = (CrossEntropy().losses(model(tiny_batch().inputs), tiny_batch()) * WEIGHTS).mean()
        for name, weight in before.items():
            model.get_parameter(name).copy_(weight)
    return loss


@HYPOTHESES
@pytest.mark.parametrize("suffix", ["shared", "separate"])
def test_proposal_gains_single_and_joint_are_of_one_and_the_same_weights(hypothesis, suffix):
    model = tiny_gpt()
    rule = rule_of(model, joint_every=1, step=0.1, hypothesis=hypothesis, suffix=suffix)
    signal = signal_of(rule, model)
    starts = dict(zip(STAGES, (("tok_emb", "pos_emb"), ("blocks.0.",), ("blocks.1.",)), strict=True))
    starts["joint"] = tuple(start for found in starts.values() for start in found)
    for key, start in starts.items():
        proposals = {name: x for name, x in signal.grads.items() if name.startswith(start)}
        gain = signal.loss - loss_with(model, proposals, 0.1)
        assert same(signal.metrics[f"proposal_gain/{key}"], gain)
        assert abs(float(gain)) > 1e-5
    singles = sum(signal.metrics[f"proposal_gain/{key}"] for key in STAGES)
    assert not torch.isclose(signal.metrics["proposal_gain/joint"], singles, rtol=1e-6)


def test_what_a_step_measures_is_told_until_it_is_measured_again():
    model = tiny_gpt()
    rule = rule_of(model, meta_every=3, joint_every=2)
    told = [signal_of(rule, model).metrics for _ in range(4)]
    assert torch.isinf(told[0]["proposal_gain/joint"])
    assert same(told[1]["proposal_gain/joint"], told[2]["proposal_gain/joint"])
    assert same(told[0]["meta_gain/block_0"], told[2]["meta_gain/block_0"])
    assert not torch.isclose(told[2]["meta_gain/block_0"], told[3]["meta_gain/block_0"], rtol=1e-9)
    assert not torch.isclose(told[1]["proposal_gain/joint"], told[3]["proposal_gain/joint"], rtol=1e-9)


def test_what_is_told_survives_a_checkpoint():
    model = tiny_gpt()
    rule, other = (rule_of(model, seed=seed, meta_every=4, layers_per_step=1) for seed in (0, 0))
    signal_of(rule, model)
    other.load_state(rule.state())
    assert same(other.monitor.values["meta_grad_norm/target"], rule.monitor.values["meta_grad_norm/target"])
    whole, resumed = (signal_of(r, model).metrics for r in (rule, other))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert torch.isfinite(whole["meta_grad_norm/target"])
    with pytest.raises(CheckpointError, match="lacks monitored value"):
        other.load_state({key: leaf for key, leaf in rule.state().items() if key != "monitored"})


def test_every_quantity_stands_in_every_row_of_the_log(tmp_path):
    """Meta-steps are the odd steps, for one stage each; joint gains come at 3, 6, …, rows at 1, 4, 8, …"""
    credit = {"name": "meta_critic", "meta_every": 2, "layers_per_step": 1, "joint_every": 3}
    train(tiny_recipe(credit=credit, run={"budget": {"steps": 16}, "log_every": 4}), tmp_path)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 4, 8, 12, 16]
    by_stage = ("meta_loss", "meta_variance", "meta_gain", "meta_penalty", "proposal_norm", "proposal_gain")
    names = {f"{quantity}/{key}" for quantity in by_stage for key in STAGES}
    names |= {"proposal_gain/joint", "meta_grad_norm/critics", "meta_grad_norm/target"}
    for row in rows:
        assert names <= row.keys(), row["step"]
        assert row["meta_grad_norm/target"] is not None
    assert rows[0]["proposal_gain/joint"] is None
    assert all(rows[-1][name] is not None for name in names)
    assert len({row["meta_grad_norm/target"] for row in rows}) == len(rows)
