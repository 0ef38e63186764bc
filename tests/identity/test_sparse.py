"""Sparse training at settings where it must be something that is known, in float64."""

import math

import pytest
import torch
from torch import nn

from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.credit import Backprop
from heterodox.learner.step import Gradient
from heterodox.objective import CrossEntropy
from heterodox.rating import Uniform
from heterodox.update import AdamW, Sparse
from heterodox.update.sparse.update import BurnIn
from tests.measured import exactly
from tests.tiny import tiny_batch, tiny_gpt
from tests.tiny_sparse import (
    assert_growth_follows_the_gradient,
    grown_after,
    masked_entries,
    options,
    sparse_learner,
    supply,
)

TOPOLOGIES = ["static", "magnitude", "set", "rigl", "sparsae"]


def plain_learner() -> Gradient:
    model = tiny_gpt()
    return Gradient(model, CrossEntropy(), Uniform(), Backprop(), AdamW(lr=0.01), Solo())


def walked(learner: Gradient, steps: int = 9) -> dict[str, torch.Tensor]:
    for step in range(1, steps + 1):
        learner.step(tiny_batch(seed=step))
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_density_one_is_dense_to_the_bit(topology):
    dense, sparse = walked(plain_learner()), walked(sparse_learner(options(topology), sparsity=0.0))
    assert all(torch.equal(dense[name], sparse[name]) for name in dense)
    other = walked(sparse_learner(options(topology), sparsity=0.5))
    assert not torch.equal(dense["head.weight"], other["head.weight"])


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.8])
def test_no_children_is_static_to_the_bit(sparsity):
    """At the default distribution and bounds, also where these would move the counts of layers or refuse them all."""
    static, none, some = (
        sparse_learner(section, sparsity=sparsity)
        for section in (
            options("static"),
            options("sparsae", children=0, bounds={}),
            options("sparsae", children=3, selection="random"),
        )
    )
    assert static.update.masks.counts() == none.update.masks.counts()
    weights, same, other = walked(static), walked(none), walked(some)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not all(torch.equal(weights[name], other[name]) for name in weights)


def test_the_clip_sees_masked_gradients_alone():
    learner = sparse_learner(options("static"))
    batch = tiny_batch(seed=1)
    exact = Backprop().signal(learner.model, batch, torch.ones(4).double(), CrossEntropy()).grads
    dense = torch.cat([g.flatten() for g in exact.values()]).norm()
    for name, gone in masked_entries(learner).items():
        exact[name] = exact[name].masked_fill(gone, 0)
    masked = torch.cat([g.flatten() for g in exact.values()]).norm()
    report = learner.step(batch)
    assert torch.allclose(report.grad_norm, masked, rtol=1e-12)
    assert masked < 0.99 * dense


def test_what_is_outside_of_the_masks_moves_as_it_always_does():
    """Weights, decay and moments of dense parameters are those of the inner update, given the same gradients."""
    learner, twin = sparse_learner(options("rigl")), AdamW(lr=0.01)
    for step in range(1, 8):
        learner.step(tiny_batch(seed=step))
    update, masked = learner.update, set(learner.update.masks.names)
    free = {
        name: nn.Parameter(p.detach().clone()) for name, p in learner.model.named_parameters() if name not in masked
    }
    assert len(free) > 10
    twin.load_state(update.around.state() | {"names": sorted(update.around.moments)})
    twin.moments = {n: {k: t.clone() for k, t in m.items()} for n, m in update.around.moments.items() if n in free}
    grads = {name: torch.ones_like(parameter) for name, parameter in learner.model.named_parameters()}
    update.apply(dict(learner.model.named_parameters()), grads)
    twin.apply(free, {name: torch.ones_like(parameter) for name, parameter in free.items()})
    assert all(torch.equal(free[name], learner.model.get_parameter(name)) for name in free)


def test_adam_corrects_its_bias_by_each_connections_age():
    """After it was forgotten, an entry moves as that of an optimizer which has just begun; the others go on."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4).double())
    update, fresh = AdamW(lr=0.1, weight_decay=0.2), AdamW(lr=0.1, weight_decay=0.2)
    plain = AdamW(lr=0.1, weight_decay=0.2)
    old = nn.Parameter(weight.detach().clone())
    for _ in range(5):
        gradient = torch.randn(3, 4).double()
        update.apply({"w": weight}, {"w": gradient})
        plain.apply({"w": old}, {"w": gradient})
    entries = torch.zeros(3, 4, dtype=torch.bool)
    entries[1, 2] = entries[0, 0] = True
    update.forget("w", entries)
    new = nn.Parameter(weight.detach().clone())
    for _ in range(4):
        gradient = torch.randn(3, 4).double()
        for rule, parameter in ((update, weight), (fresh, new), (plain, old)):
            rule.apply({"w": parameter}, {"w": gradient})
    assert torch.allclose(weight[entries], new[entries], rtol=1e-12, atol=0)
    assert torch.allclose(weight[~entries], old[~entries], rtol=1e-12, atol=0)
    assert not torch.allclose(weight[entries], old[entries], rtol=1e-2)


def test_burn_in_lengthens_the_steps_of_exactly_the_new_connections():
    """Against a twin without: new ones take 1, 1.25 and 1.5 times the step, then 1; all others the same step."""
    burning = sparse_learner(options("set", every=6), burn_in={"steps": 3, "peak": 1.5})
    plain = sparse_learner(options("set", every=6), burn_in={"steps": 0})
    born = grown_after(burning, 6)
    assert all(torch.equal(new, twin) for new, twin in zip(born.values(), grown_after(plain, 6).values(), strict=True))
    assert sum(int(new.sum()) for new in born.values()) > 5
    for expected in (1.0, 1.25, 1.5, 1.0):
        plain.model.load_state_dict(burning.model.state_dict())
        start = {name: p.detach().clone() for name, p in burning.model.named_parameters()}
        grads = {name: torch.ones_like(weight) for name, weight in start.items()}
        for learner in (burning, plain):
            learner.update.apply(dict(learner.model.named_parameters()), {n: g.clone() for n, g in grads.items()})
        for name, before in start.items():
            step = burning.model.get_parameter(name) - before
            twin = plain.model.get_parameter(name) - before
            new = born.get(name, torch.zeros_like(before, dtype=torch.bool))
            assert torch.equal(step[~new], twin[~new]), name
            assert torch.allclose(step[new], expected * twin[new], rtol=1e-9), (name, expected)
            assert twin[new].all()


def test_burn_in_rises_from_one_to_its_peak():
    five = BurnIn(steps=5, peak=1.5)
    assert exactly([five.factor(age) for age in range(1, 6)], [1.0, 1.125, 1.25, 1.375, 1.5])
    assert exactly(BurnIn(steps=1, peak=2.0).factor(1), 2.0)


@pytest.mark.parametrize(("new_weights", "share"), [("zero", 0.0), ("small", 0.1), ("he", 1.0)])
def test_new_connections_begin_as_they_should(new_weights, share):
    learner = sparse_learner(options("set", fraction=1.0, decay="constant"), new_weights=new_weights, sparsity=0.75)
    born = grown_after(learner, 3)
    name = max(born, key=lambda name: int(born[name].sum()))
    values = learner.model.get_parameter(name).detach()[born[name]]
    view = learner.update.masks.views[name]
    std = math.sqrt(2 / (view.shape[1] * float(view.double().mean())))
    assert len(values) > 20
    assert bool((values.abs() <= 2 * share * std / 0.879 + 1e-6).all())
    if share:
        assert 0.5 * share * std < float(values.std()) < 1.2 * share * std


def test_rigl_grows_where_the_dense_gradient_is_largest():
    assert_growth_follows_the_gradient(sparse_learner(options("rigl", every=4)))


def test_what_goes_is_what_is_smallest():
    for topology in ("set", "magnitude"):
        learner = sparse_learner(options(topology, every=4), burn_in={"steps": 0})
        for step in range(1, 4):
            learner.step(tiny_batch(seed=step))
        twin = AdamW(lr=0.01)
        twin.load_state(learner.update.around.state())
        twin.moments = {n: {k: t.clone() for k, t in m.items()} for n, m in twin.moments.items()}
        before = {n: v.clone() for n, v in learner.update.masks.views.items()}
        update = learner.update
        moved = {n: nn.Parameter(p.detach().clone()) for n, p in learner.model.named_parameters()}
        grads = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double() for n, p in moved.items()}
        masked = {n: g * before[n] if n in before else g for n, g in grads.items()}
        twin.apply(moved, masked)
        update.apply(dict(learner.model.named_parameters()), grads)
        dropped = 0
        for name, view in update.masks.views.items():
            gone, stayed = before[name] & ~view, before[name] & view
            dropped += int(gone.sum())
            if gone.any():
                assert moved[name].abs()[gone].max() <= moved[name].abs()[stayed].min(), (topology, name)
        assert dropped > 10


def test_a_pattern_makes_other_matrices_sparse():
    learner = sparse_learner(options("static"), layers=["blocks.0.mlp.*", "head"])
    assert learner.update.masks.names == ["blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight", "head.weight"]
    model = tiny_gpt()
    update = Sparse.Config.model_validate({"layers": ["blocks.7.*"], "topology": "static"}).build()
    with pytest.raises(RecipeError, match=r"'blocks\.7\.\*' matches none of the model's 15 matrices"):
        update.connect(Services(model, Streams(0), Solo(), supply, 10))
