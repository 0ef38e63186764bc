"""Whole models with switches: what a switch leaves alone, whose gradient stays exact, and rules mirrored. float64."""

import pytest
import torch

from heterodox.core.rng import Streams
from heterodox.credit import Backprop, DirectFeedback, FeedbackAlignment
from heterodox.credit.feedback import linear_layers
from heterodox.model import GPT
from heterodox.objective import CrossEntropy
from tests.signals import KEY_BIASES, WEIGHTS, mirrored_direct_feedback, same, signal_of
from tests.switches import CASES, INEXACT, SWITCHES
from tests.tiny import tiny_batch, tiny_gpt

BACKWARD_ONLY = {
    "softmax_fused", "softmax_centred", "straight_through_gelu", "norm_straight_through", "norm_center_scale",
    "norm_projected", "residual_gates", "frozen_embeddings",
}  # fmt: skip


@pytest.mark.parametrize("switch", CASES)
def test_a_switch_leaves_all_other_initial_weights_as_they_were(switch):
    size = {"layers": 2, "heads": 2, "width": 16, "context": 6}
    plain = GPT.Config(**size).build(11, Streams(3)).state_dict()
    switched = GPT.Config(**size, **CASES[switch]).build(11, Streams(3)).state_dict()
    assert plain.keys() <= switched.keys()
    assert all(torch.equal(plain[name], switched[name]) for name in plain)
    again = GPT.Config(**size, **CASES[switch]).build(11, Streams(3)).state_dict()
    assert all(torch.equal(again[name], switched[name]) for name in switched)
    bases = [name for name in switched if name.endswith(("codebook", "basis"))]
    other = GPT.Config(**size, **CASES[switch]).build(11, Streams(4)).state_dict()
    assert not any(torch.equal(other[name], switched[name]) for name in bases)
    assert len(bases) == {"vq_codes": 2, "subspace_rank": 1, "all_at_once": 3}.get(switch, 0)


@pytest.mark.parametrize("switch", SWITCHES)
def test_which_switches_change_the_forward_pass(switch):
    size = {"layers": 2, "heads": 2, "width": 16, "context": 6}
    plain, switched = (GPT.Config(**size, **more).build(11, Streams(0)).double() for more in ({}, SWITCHES[switch]))
    with torch.no_grad():
        a, b = (model(tiny_batch().inputs) for model in (plain, switched))
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-15) == (switch in BACKWARD_ONLY)


@pytest.mark.parametrize("switch", SWITCHES)
def test_autograds_gradient_is_the_derivative_of_the_loss_but_where_the_switch_says_not(switch):
    model = tiny_gpt(layers=1, **SWITCHES[switch])
    grads = signal_of(Backprop(), model).grads
    batch, generator, wrong = tiny_batch(), torch.Generator().manual_seed(0), []
    for name, gradient in grads.items():
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        parameter, size = model.get_parameter(name), 1e-6
        losses = []
        for sign in (1, -2, 1):  # there, back, and to where it was
            with torch.no_grad():
                parameter.add_(sign * size * direction)
                losses.append((CrossEntropy().losses(model(batch.inputs), batch) * WEIGHTS).mean())
        slope = (losses[0] - losses[1]) / (2 * size)
        if not torch.allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-8):
            wrong.append(name)
    assert bool(wrong) == (switch in INEXACT), wrong
    assert not {"head.weight", "ln_f.weight", "ln_f.bias"} & set(wrong)


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name.endswith(("top_k", "rank"))])
def test_a_bottleneck_as_wide_as_what_passes_is_the_identity(switch):
    (key,) = SWITCHES[switch]
    plain = tiny_gpt()
    wide = tiny_gpt(**{key: 32 if key == "mlp_top_k" else 8})
    before, after = (signal_of(Backprop(), model) for model in (plain, wide))
    tolerance = {"rtol": 1e-4, "atol": 1e-7} if key == "subspace_rank" else {"rtol": 0, "atol": 0}  # a float32 basis
    assert torch.allclose(before.losses, after.losses, **tolerance)
    assert all(torch.allclose(before.grads[n], after.grads[n], **tolerance) for n in before.grads)
    narrow = signal_of(Backprop(), tiny_gpt(**SWITCHES[switch]))
    assert not torch.allclose(before.losses, narrow.losses, rtol=1e-3)


@pytest.mark.parametrize("switch", CASES)
def test_feedback_alignment_with_the_weights_as_feedback_is_backprop(switch):
    model = tiny_gpt(**CASES[switch])
    exact = signal_of(Backprop(), model)
    mirrored = signal_of(FeedbackAlignment({n: m.weight.detach() for n, m in linear_layers(model).items()}), model)
    assert mirrored.grads.keys() == exact.grads.keys()
    assert all(same(mirrored.grads[name], exact.grads[name]) for name in exact.grads)
    assert all(g.norm() > 1e-8 for name, g in exact.grads.items() if not name.endswith("attn.k.bias"))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("switch", ["plain", *SWITCHES])
def test_mirrored_direct_feedback_is_exact_in_the_last_mlp_and_the_readout(switch, dropout):
    """But for what it leaves out, the stream's bottlenecks; under dropout with the same masks."""
    options = SWITCHES.get(switch, {})
    if switch == "softmax_centred" and dropout:
        return
    model = tiny_gpt(layers=1, dropout=dropout, **options).train()
    direct, exact = mirrored_direct_feedback(model)
    left_out = switch in ("residual_top_k", "subspace_rank")
    assert direct.keys() == exact.keys()
    readout = ["ln_f.weight", "ln_f.bias", "head.weight"]
    behind = [n for n in exact if n.startswith(("blocks.0.mlp.proj", "blocks.0.mlp_gate"))]
    before = [n for n in exact if n.startswith("blocks.0.mlp.fc")]
    assert all(exact[name].norm() > 1e-6 for name in [*readout, *behind, *before])
    assert all(same(direct[name], exact[name]) for name in readout)
    assert all(same(direct[name], exact[name]) != left_out for name in behind)
    # C does not know of the gate or of the dropout between it and the stream.
    knows = not left_out and switch != "residual_gates" and not dropout
    assert all(same(direct[name], exact[name]) == knows for name in before)


@pytest.mark.parametrize("switch", ["plain", "sigmoid_learned", "sigmoid_neg_log_row", "softmax_fused"])
def test_mirrored_direct_feedback_recomputes_attention_with_its_own_dropout_masks(switch):
    """With dropout in attention alone, and an MLP that passes no error, all of attention is exact."""
    model = tiny_gpt(layers=1, **SWITCHES.get(switch, {})).train()
    model.blocks[0].attn.mix.dropout = 0.5
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight.zero_()
    direct, exact = mirrored_direct_feedback(model)
    unseen = set() if "sigmoid" in switch else KEY_BIASES
    names = [n for n in exact if n.startswith("blocks.0.attn") and n not in unseen]
    assert len(names) == {"sigmoid_learned": 9, "sigmoid_neg_log_row": 8}.get(switch, 7)
    assert all(exact[name].norm() > 1e-6 for name in names)
    assert all(same(direct[name], exact[name]) for name in names)
    torch.manual_seed(1)
    other = signal_of(Backprop(), model).grads
    assert not any(same(other[name], exact[name]) for name in names), "degenerate: the masks do not matter"


def test_a_rule_leaves_the_random_stream_where_the_forward_pass_left_it():
    """Masks drawn again may not shift what is drawn afterwards."""
    model = tiny_gpt(dropout=0.5).train()
    rule = DirectFeedback.Config().build(model, Streams(0))
    states = []
    for credit in (rule, Backprop()):
        torch.manual_seed(0)
        signal_of(credit, model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("route", ["stream", "own"])
@pytest.mark.parametrize("switch", ["sigmoid_learned", "residual_gates", "mlp_top_k", "frozen_embeddings"])
def test_direct_feedback_reaches_what_a_switch_adds(switch, route):
    model = tiny_gpt(**SWITCHES[switch])
    rule = DirectFeedback.Config(route=route).build(model, Streams(0))
    grads = signal_of(rule, model).grads
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert grads.keys() == trainable
    assert all(g.norm() > 1e-12 for n, g in grads.items() if not n.endswith("attn.k.bias"))
    added = {"sigmoid_learned": "mix.bias", "residual_gates": "gate.weight"}
    assert sum(name.endswith(added.get(switch, "none")) for name in grads) in (0, 2, 4)
    if switch == "mlp_top_k":  # a unit that never wins learns nothing
        with torch.no_grad():
            seen = []
            hook = model.blocks[1].mlp.top_k.register_forward_hook(lambda _, __, out: seen.append(out))
            model(tiny_batch().inputs)
            hook.remove()
            active = (seen[0] != 0).flatten(0, -2).any(0)
        moves = grads["blocks.1.mlp.fc.weight"].norm(dim=1) > 0
        assert torch.equal(moves, active)
        assert 0 < int(active.sum()) < 32
