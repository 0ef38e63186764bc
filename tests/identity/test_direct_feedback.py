"""Where direct feedback through the residual stream must be exact, and where it must not be. float64."""

import pytest
import torch
from torch import nn

from heterodox.core.rng import Streams
from heterodox.credit import Backprop, DirectFeedback
from heterodox.credit.direct_feedback import direct_gradients
from heterodox.credit.tape import POINTWISE, record_layers
from tests.signals import grads_of, mirrored_direct_feedback, same, signal_of
from tests.tiny import tiny_gpt

ATTENTION = [f"blocks.0.attn.{part}.weight" for part in "qkvo"]
MLP = ["blocks.0.mlp.fc.weight", "blocks.0.mlp.fc.bias", "blocks.0.mlp.proj.weight", "blocks.0.mlp.proj.bias"]
READOUT = ["ln_f.weight", "ln_f.bias", "head.weight"]


def equal(direct, exact, names):
    assert all(exact[name].norm() > 1e-6 for name in names), "degenerate: nothing to learn"
    return [same(direct[name], exact[name]) for name in names]


def test_mirrored_feedback_is_exact_in_the_last_mlp_and_the_readout():
    """Nothing lies between the last MLP and the head, so the shared stream error is the true one there."""
    direct, exact = mirrored_direct_feedback(tiny_gpt(layers=1))
    assert all(equal(direct, exact, MLP + READOUT))
    # The attention's error misses what flows through the MLP above it.
    assert not any(equal(direct, exact, ATTENTION))


def test_and_in_the_attention_once_the_mlp_above_passes_no_error():
    model = tiny_gpt(layers=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight.zero_()
    direct, exact = mirrored_direct_feedback(model)
    assert all(equal(direct, exact, ATTENTION + READOUT))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_and_in_the_embeddings_once_no_branch_passes_error(dropout):
    """Under dropout, on their sum alike, with the same masks."""
    model = tiny_gpt(layers=1, dropout=dropout).train()
    with torch.no_grad():
        for layer in (model.blocks[0].mlp.fc, model.blocks[0].attn.q, model.blocks[0].attn.k, model.blocks[0].attn.v):
            layer.weight.zero_()
    direct, exact = mirrored_direct_feedback(model)
    assert all(equal(direct, exact, ["tok_emb.weight", "pos_emb.weight", *READOUT]))
    torch.manual_seed(1)
    other = grads_of(Backprop(), model)
    assert same(other["pos_emb.weight"], exact["pos_emb.weight"]) == (not dropout)


@pytest.mark.parametrize(
    ("point", "spoilt"),
    [("stream", [*MLP, "ln_f.weight"]), ("blocks.0.mlp.act", MLP[:2])],
)
def test_the_wrong_sign_is_noticed(point, spoilt):
    model = tiny_gpt(layers=1)
    matrix = {"stream": model.head.weight, "blocks.0.mlp.act": model.blocks[0].mlp.proj.weight}[point]
    direct, exact = mirrored_direct_feedback(model, **{point: -matrix.detach()})
    assert not any(equal(direct, exact, spoilt))
    assert equal(direct, exact, ["head.weight"]) == [True]


def test_the_two_routes_differ_and_neither_holds_a_graph():
    model = tiny_gpt()
    routes = {
        route: signal_of(DirectFeedback.Config(route=route).build(model, Streams(0)), model)
        for route in ("stream", "own")
    }
    assert set(routes["stream"].grads) == set(routes["own"].grads) == {name for name, _ in model.named_parameters()}
    for signal in routes.values():
        assert not any(gradient.requires_grad for gradient in signal.grads.values())
        assert not signal.loss.requires_grad
    assert not torch.allclose(routes["stream"].grads["tok_emb.weight"], routes["own"].grads["tok_emb.weight"])


class Scale(nn.Module):
    """A layer of another kind than the tape knows by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x):
        return x * self.weight


def test_operations_in_a_row_and_other_layers_learn_by_their_own_derivative():
    """Two layers deep, direct feedback with the weights of the second is exact, whatever stands between them."""
    torch.manual_seed(0)
    net = nn.Sequential(Scale(), nn.Linear(5, 7), nn.GELU(), nn.Dropout(0.5), nn.Linear(7, 5), Scale(), nn.Tanh())
    net = net.double().train()
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    torch.manual_seed(1)
    with torch.no_grad(), record_layers(net, (*POINTWISE, nn.Dropout)) as tape:
        out = net(x)
    assert [(record.name, record.point) for record in tape.records] == [
        ("0", "0"), ("1", "2"), ("4", "4"), ("5", "6"),
    ]  # fmt: skip
    torch.manual_seed(1)
    acts = [x]
    for layer in net:
        acts.append(layer(acts[-1]))
    assert torch.equal(acts[-1], out)
    exact = torch.autograd.grad(acts[-1].square().sum(), [*net.parameters(), *acts[1:]])
    errors = dict(zip("0123456", exact[-len(net) :], strict=True))
    true = dict(zip(dict(net.named_parameters()), exact, strict=False))
    points = {"0": errors["0"], "1": errors["3"], "4": errors["4"], "5": errors["6"]}
    state = torch.get_rng_state()
    found = direct_gradients(tape, lambda record: points[record.name])
    assert torch.equal(torch.get_rng_state(), state)
    assert found.keys() == true.keys()
    for name, gradient in true.items():
        assert gradient.norm() > 1e-3, name
        assert torch.allclose(found[name], gradient, rtol=1e-11), name


def test_what_is_frozen_gets_no_signal():
    model = tiny_gpt()
    model.blocks[0].ln1.weight.requires_grad_(False)
    model.tok_emb.weight.requires_grad_(False)
    for route in ("stream", "own"):
        rule = DirectFeedback.Config(route=route).build(model, Streams(0))
        grads = grads_of(rule, model)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert grads.keys() == trainable
        assert {n for n, origin in rule.manifest(model).items() if origin != "frozen"} == trainable
