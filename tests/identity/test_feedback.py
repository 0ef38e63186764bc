"""Exact identities of rules that send errors through feedback weights, in float64."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from heterodox.core.rng import Streams
from heterodox.credit import Backprop, DirectFeedback, FeedbackAlignment, HeadOnly
from heterodox.credit.base import elsewhere_names
from heterodox.credit.direct_feedback import direct_gradients
from heterodox.credit.feedback import linear_layers
from heterodox.credit.tape import record_layers
from tests.measured import differ
from tests.signals import KEY_BIASES, same, signal_of
from tests.tiny import tiny_batch, tiny_gpt

RULES = [Backprop, FeedbackAlignment, DirectFeedback, HeadOnly]


def test_feedback_alignment_with_the_weights_as_feedback_is_backprop():
    model = tiny_gpt()
    exact = signal_of(Backprop(), model)
    twin = FeedbackAlignment({n: layer.weight.detach() for n, layer in linear_layers(model).items()})
    mirrored = signal_of(twin, model)
    assert same(mirrored.loss, exact.loss)
    for name, gradient in exact.grads.items():
        assert (gradient.norm() > 1e-6) == (name not in KEY_BIASES), f"degenerate: {name} has no gradient"
        assert same(mirrored.grads[name], gradient), name


def test_feedback_alignment_with_random_feedback_is_not_backprop():
    model = tiny_gpt()
    exact = signal_of(Backprop(), model)
    random = signal_of(FeedbackAlignment.Config().build(model, Streams(0)), model)
    differing = {n for n, g in exact.grads.items() if differ(random.grads[n], g, rtol=1e-2)}
    assert differing == set(exact.grads) - {"head.weight"} - KEY_BIASES


@pytest.mark.parametrize("rule", RULES)
def test_the_output_layer_is_exact_under_every_rule(rule):
    model = tiny_gpt()
    exact = signal_of(Backprop(), model)
    found = signal_of(rule.Config().build(model, Streams(0)), model)
    assert exact.grads["head.weight"].norm() > 1e-3
    assert same(found.grads["head.weight"], exact.grads["head.weight"])
    assert same(found.losses, exact.losses)


def test_head_only_is_backprop_restricted_to_the_readout():
    model = tiny_gpt()
    exact = signal_of(Backprop(), model).grads
    readout = signal_of(HeadOnly(), model).grads
    assert set(readout) == {"ln_f.weight", "ln_f.bias", "head.weight"}
    assert all(same(readout[name], exact[name]) for name in readout)
    more = signal_of(HeadOnly(embeddings="backprop"), model).grads
    assert set(more) == set(readout) | {"tok_emb.weight", "pos_emb.weight"}
    assert all(same(more[name], exact[name]) for name in more)


@pytest.mark.parametrize("rule", [FeedbackAlignment, DirectFeedback])
def test_elsewhere_says_how_embeddings_norms_and_gates_learn(rule):
    model = tiny_gpt()
    exact = signal_of(Backprop(), model).grads
    outside = set(elsewhere_names(model))
    assert {"tok_emb.weight", "pos_emb.weight", "ln_f.bias", "blocks.1.ln2.weight"} <= outside
    grads = {
        choice: signal_of(rule.Config(elsewhere=choice).build(model, Streams(0)), model).grads
        for choice in ("local", "backprop", "frozen")
    }
    assert set(grads["local"]) == set(grads["backprop"]) == set(exact)
    assert set(grads["frozen"]) == set(exact) - outside
    for name in outside:
        assert same(grads["backprop"][name], exact[name]), name
        assert not torch.allclose(grads["local"][name], exact[name], rtol=1e-2), name
    for name in exact.keys() - outside:  # the linear layers learn the same whatever happens elsewhere
        assert same(grads["local"][name], grads["frozen"][name]), name
        assert same(grads["local"][name], grads["backprop"][name]), name


def deep_net(activation: type[nn.Module] | None) -> nn.Sequential:
    torch.manual_seed(0)
    widths = (5, 7, 6, 4)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out)]
        layers += [activation()] if activation and fan_out != widths[-1] else []
    return nn.Sequential(*layers).double()


def direct_and_exact(net: nn.Sequential) -> tuple[dict, dict]:
    """Direct feedback with the product of the downstream weights, and the true gradient."""
    x, y = torch.randn(3, 2, 5).double(), torch.randn(3, 2, 4).double()
    layers = linear_layers(net)
    names = list(layers)
    feedback = {names[-1]: torch.eye(4).double()}
    product = torch.eye(4).double()
    for name, after in zip(names[-2::-1], names[:0:-1], strict=True):
        product = product @ layers[after].weight.detach()
        feedback[name] = product
    with torch.no_grad(), record_layers(net) as tape:
        out = net(x)
    direct = direct_gradients(tape, lambda record: 2 * (out - y) @ feedback[record.name])
    loss = (net(x) - y).square().sum()
    exact = dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))
    return direct, exact


def test_direct_feedback_with_the_product_of_downstream_weights_is_backprop_on_a_linear_net():
    direct, exact = direct_and_exact(deep_net(None))
    assert direct.keys() == exact.keys()
    assert all(gradient.norm() > 1e-3 for gradient in exact.values())
    assert all(same(direct[name], exact[name]) for name in exact)


def test_and_is_not_on_a_tanh_net():
    direct, exact = direct_and_exact(deep_net(nn.Tanh))
    assert not torch.allclose(direct["0.weight"], exact["0.weight"], rtol=1e-2)
    # The layer below the last has only its own tanh between it and the error: there direct feedback is exact.
    assert same(direct["2.weight"], exact["2.weight"])
    assert same(direct["4.weight"], exact["4.weight"])


def test_direct_feedback_uses_the_derivative_of_the_activation_behind_each_layer():
    direct, exact = direct_and_exact(deep_net(nn.GELU))
    assert same(direct["2.bias"], exact["2.bias"])
    net = deep_net(nn.GELU)
    with torch.no_grad(), record_layers(net) as tape:
        net(torch.randn(2, 5).double())
    assert [record.point for record in tape.records] == ["1", "3", "4"]


def test_local_gradients_of_embeddings_and_norms_are_exact_for_the_true_error():
    """Where the error at a layer's output is known, the tape's own gradients are the true ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    tokens = torch.tensor([[0, 2, 2], [4, 0, 1]])
    with torch.no_grad(), record_layers(net) as tape:
        net(tokens)
    hidden = net[0](tokens)
    normed = net[1](hidden)
    out = net[2](normed)
    loss = out.square().sum()
    hidden_error, normed_error = torch.autograd.grad(loss, [hidden, normed], retain_graph=True)
    exact = torch.autograd.grad(loss, list(net.parameters()))
    found = [
        gradient
        for record, error in zip(tape.records, [hidden_error, normed_error, 2 * out.detach()], strict=True)
        for _, gradient in tape.gradients(record, error)
    ]
    assert all(g.norm() > 1e-3 for g in exact)
    assert all(same(a, b) for a, b in zip(found, exact, strict=True))


def test_the_tape_computes_again_what_norms_and_activations_put_out():
    model = tiny_gpt()
    with torch.no_grad(), record_layers(model) as tape:
        model(tiny_batch().inputs)
    recomputed = {record.name for record in tape.records if record.source.maker is not None}
    assert {"blocks.0.attn.q", "blocks.0.mlp.fc", "blocks.1.mlp.proj", "head"} <= recomputed
    assert "blocks.0.attn.o" not in recomputed
