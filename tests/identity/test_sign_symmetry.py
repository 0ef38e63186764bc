"""Sign symmetry against backprop, in float64."""

import pytest
import torch

from heterodox.core.rng import Streams
from heterodox.credit import Backprop, SignSymmetry
from heterodox.credit.feedback import linear_layers
from tests.measured import differ, on_average
from tests.signals import KEY_BIASES, grads_of, same
from tests.tiny import tiny_gpt
from tests.tiny_sparse import options, sparse_learner


def equal_sized_gpt(size: float | None = None):
    """Within each layer, all weights have one size; across layers too if `size` says which."""
    model = tiny_gpt()
    with torch.no_grad():
        for number, layer in enumerate(linear_layers(model).values()):
            layer.weight.copy_(layer.weight.sign() * (0.1 + 0.02 * number if size is None else size))
    return model


def test_where_all_weights_of_a_layer_have_one_size_it_is_backprop():
    model = equal_sized_gpt()
    exact, mirrored = grads_of(Backprop(), model), grads_of(SignSymmetry(), model)
    assert exact.keys() == mirrored.keys()
    for name, gradient in exact.items():
        assert (gradient.norm() > 1e-6) == (name not in KEY_BIASES), f"degenerate: {name} has no gradient"
        assert same(mirrored[name], gradient), name


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_under_masks_it_is_backprop_where_all_active_weights_have_one_size(sparsity):
    model = equal_sized_gpt()
    masks = sparse_learner(options("static"), model=model, sparsity=sparsity, distribution="uniform").update.masks
    assert len(masks.views) == 12
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in masks.views)
    assert zeros == masks.size - round((1 - sparsity) * masks.size)
    exact, mirrored = grads_of(Backprop(), model), grads_of(SignSymmetry(), model)
    for name, gradient in exact.items():
        assert (gradient.norm() > 1e-6) == (name not in KEY_BIASES), f"degenerate: {name} has no gradient"
        assert same(mirrored[name], gradient), name


def test_a_layer_of_zeros_sends_nothing_back():
    model = tiny_gpt()
    with torch.no_grad():
        model.blocks[1].mlp.proj.weight.zero_()
    assert not SignSymmetry().feedback(model)["blocks.1.mlp.proj"].any()
    grads = grads_of(SignSymmetry(), model)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in grads.values())
    assert not grads["blocks.1.mlp.fc.weight"].any()
    assert grads["blocks.1.mlp.proj.weight"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_zeros_the_magnitude_is_the_mean_of_all_to_the_bit(dtype):
    model = tiny_gpt(dtype, width=24)
    for name, layer in linear_layers(model).items():
        mean = layer.weight.detach().norm(1) / float(layer.weight.numel())
        assert torch.equal(SignSymmetry().feedback(model)[name], layer.weight.detach().sign() * mean), name


def test_and_elsewhere_it_is_not():
    model = tiny_gpt()
    exact, mirrored = grads_of(Backprop(), model), grads_of(SignSymmetry(), model)
    differing = {n for n, g in exact.items() if differ(mirrored[n], g, rtol=1e-2)}
    assert differing == set(exact) - {"head.weight"} - KEY_BIASES


def test_a_fixed_magnitude_is_backprop_where_it_is_the_weights_own():
    model = equal_sized_gpt(0.15)
    exact = grads_of(Backprop(), model)
    for std, equal in ((0.15, True), (0.05, False)):
        rule = SignSymmetry.Config(magnitude="fixed", feedback_std=std).build(model, Streams(0))
        grads = grads_of(rule, model)
        assert same(grads["head.weight"], exact["head.weight"])
        assert same(grads["blocks.0.mlp.fc.weight"], exact["blocks.0.mlp.fc.weight"]) == equal


def test_one_magnitude_may_be_a_whole_number():
    model = tiny_gpt()
    whole, mean = (SignSymmetry(size).feedback(model)["head"] for size in (1, None))
    assert torch.equal(whole, SignSymmetry(1.0).feedback(model)["head"])
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    assert not torch.allclose(whole, mean)


def test_the_wrong_sign_is_noticed():
    model = equal_sized_gpt()
    exact = grads_of(Backprop(), model)
    sizes = {name: -layer.weight.abs().detach() for name, layer in linear_layers(model).items()}
    assert not same(grads_of(SignSymmetry(sizes), model)["ln_f.weight"], exact["ln_f.weight"])
    right = {name: -size for name, size in sizes.items()}
    assert all(same(gradient, exact[name]) for name, gradient in grads_of(SignSymmetry(right), model).items())


@pytest.mark.parametrize("magnitude", ["mean", "fixed", "random"])
def test_the_matrices_have_the_signs_and_the_magnitudes_that_were_asked_for(magnitude):
    model = tiny_gpt()
    layers = linear_layers(model)
    with torch.no_grad():
        layers["blocks.0.attn.q"].weight[0, 0] = 0.0
    std = {} if magnitude == "mean" else {"feedback_std": 0.3}
    rule = SignSymmetry.Config(magnitude=magnitude, **std).build(model, Streams(0))
    before = rule.feedback(model)
    assert before["blocks.0.attn.q"][0, 0] == 0
    for name, matrix in before.items():
        assert torch.equal(matrix.sign(), layers[name].weight.sign()), name
        sizes = matrix[matrix != 0].abs()
        if magnitude == "random":
            assert sizes.std() > 0.1, name
        else:
            there = layers[name].weight[matrix != 0].abs()
            wanted = there.mean() if magnitude == "mean" else torch.tensor(0.3).double()
            assert torch.allclose(sizes, wanted.expand_as(sizes)), name
    if magnitude == "random":
        sizes = torch.cat([matrix[matrix != 0] for matrix in before.values()])
        assert on_average(sizes.square().mean().sqrt(), torch.tensor(0.3).double(), rtol=0.05)
    with torch.no_grad():  # they follow the signs; random magnitudes stay with their places
        for layer in layers.values():
            layer.weight.mul_(-2)
    for name, matrix in rule.feedback(model).items():
        assert torch.allclose(matrix, -before[name] * (2 if magnitude == "mean" else 1)), name
