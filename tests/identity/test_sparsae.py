"""What Sparsae's search sees and does, where that must be something that is known, in float64."""

import dataclasses
import math

import pytest
import torch

from heterodox.core.state import split
from heterodox.credit import Backprop
from heterodox.objective import CrossEntropy
from heterodox.update.sparse import SET
from heterodox.update.sparse.topology import Change, DecayingSchedule, Sight
from tests.measured import exactly, unheard
from tests.tiny import tiny_batch, tiny_gpt
from tests.tiny_sparse import (
    assert_growth_follows_the_gradient,
    grown_after,
    options,
    sparse_learner,
)


def test_a_look_through_the_window_leaves_no_trace():
    model = tiny_gpt(dropout=0.2)
    learner = sparse_learner(options("sparsae"), model=model)
    learner.step(tiny_batch(seed=1))
    learner.model.train()
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    remembered = [tensor.clone() for tensor in learner.update.around.moments["head.weight"].values()]
    storage = {name: p.data_ptr() for name, p in learner.model.named_parameters()}
    random = torch.get_rng_state()
    window, batch = learner.update.window, tiny_batch(seed=5)
    zeros = {name: torch.zeros_like(p) for name, p in learner.model.named_parameters()}
    flat = window.losses(batch, zeros).mean()
    assert flat == pytest.approx(math.log(11), abs=1e-12)  # all logits 0
    loss, grads = window.signal(batch, {})
    assert loss != flat
    losses = window.losses(batch, {})
    assert losses.shape == (4,)
    assert losses.mean() == loss
    model.eval()
    exact = Backprop().signal(model, batch, torch.ones(4).double(), CrossEntropy()).grads
    assert all(torch.equal(grads[name], exact[name]) for name in exact)
    model.train()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert storage == {name: p.data_ptr() for name, p in model.named_parameters()}
    now = learner.update.around.moments["head.weight"].values()
    assert all(torch.equal(a, b) for a, b in zip(remembered, now, strict=True))
    forward = model.forward_flops(4, 6)
    assert window.cost.meta_tokens == 3 * batch.num_tokens
    assert window.cost.flops == 2 * forward.total + forward.with_backward


class Lookout(SET):
    """SET, and what was to be seen in its last event."""

    seen: Sight

    def change(self, sight: Sight) -> Change | None:
        self.seen = dataclasses.replace(sight, weights=sight.weights.clone())
        return super().change(sight)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("around", [{"name": "adamw", "weight_decay": 0.3}, {"name": "sgd", "momentum": 0.9}])
def test_looking_ahead_tells_the_step_that_follows(around, clip):
    """Of connections with a past and of those that have just come, clipped alike; and nothing moves by being asked."""
    learner = sparse_learner(options("set", every=4), around=around | {"lr": 0.01}, burn_in={"steps": 0})
    update = learner.update
    update.topology = Lookout(update.topology.schedule)
    learner.clip = clip
    norms = []
    born = grown_after(learner, 4, norms)
    ahead, masks = update.topology.seen.ahead, update.masks
    factor = ahead.clip
    with unheard():  # to the clip's epsilon
        assert float(factor) == pytest.approx(1.0 if clip is None else clip / norms[-1], rel=1e-4)
    assert clip is None or factor < 0.5
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    tensors = {path: tensor.clone() for path, tensor in split(update.state())[0].items()}
    generator = torch.Generator().manual_seed(0)
    grads = {name: torch.randn(weight.shape, generator=generator).double() for name, weight in before.items()}
    flat = masks.join(grads)
    told = masks.split(ahead.present(flat))
    new = masks.join(born).nonzero().squeeze(1)
    told_new = ahead.newborn(masks.join(before)[new], flat[new])
    assert all(torch.equal(before[name], p) for name, p in learner.model.named_parameters())
    assert all(torch.equal(tensor, tensors[path]) for path, tensor in split(update.state())[0].items())
    update.apply(dict(learner.model.named_parameters()), {name: factor * grad for name, grad in grads.items()})
    for name, values in told.items():
        now = learner.model.get_parameter(name).detach()
        assert torch.equal(values, now), name
        assert not torch.equal(now, before[name]), name
    now = masks.join({name: p.detach() for name, p in learner.model.named_parameters() if name in told})
    assert len(new) > 10
    assert torch.allclose(told_new, now[new], rtol=1e-12, atol=0)
    assert not torch.allclose(ahead.newborn(masks.join(before)[new], -flat[new]), now[new], rtol=1e-2)


def scored(steps: int) -> tuple[list[float], float]:
    """The losses of a parent and two children in step 3 of so many, and the parent's without a step."""
    reset = {"probability": 0.0, "batch": 4}
    learner = sparse_learner(options("sparsae", children=2, mutation=0.4, reset=reset), steps=steps)
    window, seen = learner.update.window, []
    real = window.losses

    def spy(batch, weights):
        losses = real(batch, weights)
        seen.append((losses.mean(), real(batch, {}).mean()))
        return losses

    window.losses = spy
    for step in range(1, 4):
        learner.step(tiny_batch(seed=step))
    return [float(loss) for loss, _ in seen[:3]], float(seen[0][1])


def test_all_candidates_take_the_same_step(monkeypatch):
    """A child that exchanges nothing scores what its parent scores; that is not what the weights score as they are."""
    assert len(set(scored(30)[0])) == 3
    monkeypatch.setattr(DecayingSchedule, "decayed", lambda *_: 0.0)
    losses, without = scored(30)
    assert exactly(losses[1:], [losses[0]] * 2)
    assert without not in losses


def test_aimed_children_grow_where_the_training_signal_is_largest():
    search = {"children": 1, "grow": "activity", "pool": 1.0, "reset": {"probability": 0, "batch": 4}}
    assert_growth_follows_the_gradient(sparse_learner(options("sparsae", every=4, **search)))


def test_one_child_that_grows_by_the_signal_is_rigl_to_the_bit():
    """Weights and masks; so are four, if no other may win. Another kind of growth makes it another rule."""
    schedule = {"every": 3, "until": 0.9}
    search = schedule | {"children": 1, "reset": {"probability": 0, "batch": 4}, "mutation": 0.3}
    rigl, same, alone, other = (
        sparse_learner(options(name, **section), sparsity=0.7)
        for name, section in (
            ("rigl", schedule | {"fraction": 0.3}),
            ("sparsae", search | {"grow": "activity"}),
            ("sparsae", search | {"children": 4, "margin": 1e30}),
            ("sparsae", search | {"grow": "relative"}),
        )
    )
    changed = []
    for step in range(1, 13):
        before = rigl.update.masks.flat.clone()
        for learner in (rigl, same, alone, other):
            learner.step(tiny_batch(seed=step))
        changed.append(int((before ^ rigl.update.masks.flat).sum()))
        for twin in (same, alone):
            assert torch.equal(rigl.update.masks.flat, twin.update.masks.flat), step
            for (name, p), q in zip(rigl.model.named_parameters(), twin.model.parameters(), strict=True):
                assert torch.equal(p, q), (step, name)
    assert sum(changed) > 40
    assert changed[2] < 2 * round(0.3 * sum(rigl.update.masks.counts())), "some that went came back"
    assert not torch.equal(rigl.update.masks.flat, other.update.masks.flat)
