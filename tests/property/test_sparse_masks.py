"""Masks keep their promises for random models, densities, bounds and sequences of events."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.core.state import join, split
from heterodox.model import GPT
from heterodox.update.sparse.children import (
    Bounds,
    BoundsOptions,
    apply_swap,
    favoured,
    most,
    pools,
    swap,
    swap_in_layers,
)
from heterodox.update.sparse.masks import Masks, distribute, num_active, within_caps
from tests.tiny import tiny_batch
from tests.tiny_sparse import masked_entries, options, sparse_learner

few = settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
fewer = settings(few, max_examples=8)

sides = st.integers(1, 12)
shapes = st.lists(st.tuples(sides, sides), min_size=1, max_size=6).map(
    lambda pairs: {f"layer{i}": torch.Size(pair) for i, pair in enumerate(pairs)}
)
sparsities = st.floats(0.0, 0.97)


@few
@given(shapes=shapes, sparsity=sparsities, distribution=st.sampled_from(["uniform", "erk"]), data=st.data())
def test_a_distribution_meets_the_count_exactly_and_the_bounds(shapes, sparsity, distribution, data):
    sizes = [shape.numel() for shape in shapes.values()]
    lower = [data.draw(st.integers(1, size)) for size in sizes]
    upper = [data.draw(st.integers(low, size)) for low, size in zip(lower, sizes, strict=True)]
    total = num_active(sparsity, sum(sizes))
    if total < len(sizes) or not sum(lower) <= total <= sum(upper):
        with pytest.raises(RecipeError, match=str(total)):
            distribute(shapes, sparsity, distribution, lower, upper)
        return
    counts = distribute(shapes, sparsity, distribution, lower, upper)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(lower, counts, upper, strict=True))


def test_erk_makes_small_layers_denser_and_uniform_does_not():
    shapes = {"small": torch.Size([8, 8]), "large": torch.Size([64, 64])}
    small, large = distribute(shapes, 0.9, "erk")
    assert small / 64 > 4 * large / 4096
    assert small / large == pytest.approx(16 / 128, rel=0.05)
    small, large = distribute(shapes, 0.75, "uniform")
    assert (small, large) == (16, 1024)


@few
@given(layers=st.lists(st.integers(0, 4), max_size=40), caps=st.lists(st.integers(0, 6), min_size=5, max_size=5))
def test_within_caps_takes_the_first_of_each_layer(layers, caps):
    kept = within_caps(torch.tensor(layers, dtype=torch.long), caps).tolist()
    seen = [0] * 5
    for layer, is_kept in zip(layers, kept, strict=True):
        assert is_kept == (seen[layer] < caps[layer])
        seen[layer] += 1


def drawn_masks(shapes: dict[str, torch.Size], counts: list[int], generator: torch.Generator) -> Masks:
    masks = Masks(shapes)
    for view, count in zip(masks.views.values(), counts, strict=True):
        kept = torch.randperm(view.numel(), generator=generator)[:count]
        view.view(-1).fill_(False)[kept] = True
    return masks


@few
@given(
    shapes=shapes,
    sparsity=st.floats(0.05, 0.95),
    slack=st.floats(0.0, 0.3),
    count=st.integers(1, 200),
    aimed=st.tuples(st.booleans(), st.booleans()),
    in_layers=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_swap_keeps_the_count_and_no_layer_leaves_its_bounds(shapes, sparsity, slack, count, aimed, in_layers, seed):
    sizes = [shape.numel() for shape in shapes.values()]
    limits = {"min_sparsity": max(sparsity - slack, 0.0), "max_sparsity": min(sparsity + slack + 0.01, 0.99)}
    bounds = Bounds(BoundsOptions.model_validate(limits), sizes, sparsity)
    try:
        counts = distribute(shapes, sparsity, "erk", bounds.lower, bounds.upper)
    except RecipeError:
        return
    generator = torch.Generator().manual_seed(seed)
    masks = drawn_masks(shapes, counts, generator)
    values = torch.rand(masks.size, generator=generator)
    quotas = [min(count, size) for size in sizes]
    wide = [2 * quota for quota in quotas] if in_layers else 2 * count
    among = (masks.flat, ~masks.flat)
    chosen = pools(
        masks, *(favoured(values, a, masks, wide) if aim else None for aim, a in zip(aimed, among, strict=True))
    )
    if in_layers:
        change = swap_in_layers(masks, chosen, quotas, generator)
    else:
        change = swap(masks, bounds, chosen, min(count, most(masks, bounds)), generator)
    assert len(change.dropped) == len(change.grown) == len(change.dropped.unique()) == len(change.grown.unique())
    assert bool(masks.flat[change.dropped].all())
    assert not bool(masks.flat[change.grown].any())
    after = masks.counts(apply_swap(masks.flat, change))
    assert sum(after) == sum(counts)
    assert after == counts or not in_layers
    assert all(low <= have <= high for low, have, high in zip(bounds.lower, after, bounds.upper, strict=True))


def test_a_swap_reaches_the_count_where_the_bounds_leave_room():
    shapes = {"a": torch.Size([20, 20]), "b": torch.Size([20, 20])}
    bounds = Bounds(BoundsOptions.model_validate({"min_sparsity": 0.5, "max_sparsity": 0.9}), [400, 400], 0.8)
    generator = torch.Generator().manual_seed(0)
    masks = drawn_masks(shapes, [80, 80], generator)
    assert len(swap(masks, bounds, pools(masks), 30, generator).dropped) == 30
    quotas = [5, 30]
    change = swap_in_layers(masks, pools(masks), quotas, generator)
    assert masks.count(change.dropped) == masks.count(change.grown) == quotas
    tight = Bounds(BoundsOptions.model_validate({"min_sparsity": 0.8, "max_sparsity": 0.8}), [400, 400], 0.8)
    assert most(masks, tight) == 0
    assert len(swap(masks, tight, pools(masks), 30, generator).dropped) == 0


TOPOLOGIES = ["static", "magnitude", "set", "rigl", "sparsae"]
cases: dict[str, st.SearchStrategy[Any]] = {
    "sparsity": st.floats(0.1, 0.9),
    "distribution": st.sampled_from(["uniform", "erk"]),
    "new_weights": st.sampled_from(["zero", "small", "he"]),
    "around": st.sampled_from(["adamw", "sgd"]),
    "burn_in": st.integers(0, 3),
    "judge": st.sampled_from(["at_once", "look_ahead"]),
    "selection": st.sampled_from(["proxy", "ce_only", "random"]),
    "survival": st.sampled_from(["plus", "comma"]),
    "scope": st.sampled_from(["layer", "global", "mixed"]),
    "grow": st.sampled_from(["uniform", "activity", "relative", "mixed"]),
    "drop": st.sampled_from(["uniform", "magnitude"]),
    "margin": st.sampled_from([0.0, 1.0]),
    "slack": st.floats(0.05, 0.4),
    "signal": st.sampled_from(["training", "micro_batch"]),
    "width": st.sampled_from([4, 8]),
    "seed": st.integers(0, 1000),
}


def learner_of(name: str, case: dict[str, Any]):
    topology = options(name)
    if name == "sparsae":
        topology |= {key: case[key] for key in ("judge", "selection", "survival", "scope", "grow", "drop", "signal")}
        topology["children"] = 2
        topology["reset"] = {"probability": 0.3, "batch": 4}
        lowest, highest = max(case["sparsity"] - case["slack"], 0.0), min(case["sparsity"] + case["slack"], 0.99)
        topology["bounds"] = {"min_sparsity": lowest, "max_sparsity": highest}
        if (case["judge"], case["signal"]) != ("at_once", "micro_batch"):
            topology["margin"] = case["margin"]
    around = {"name": "adamw"} if case["around"] == "adamw" else {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}
    model = GPT.Config(layers=1, heads=2, width=case["width"], context=6, bias=True)
    return sparse_learner(
        topology,
        steps=9,
        model=model.build(11, Streams(case["seed"])).double(),
        seed=case["seed"],
        around=around,
        sparsity=case["sparsity"],
        distribution=case["distribution"],
        new_weights=case["new_weights"],
        burn_in={"steps": case["burn_in"]},
    )


@pytest.mark.parametrize("topology", TOPOLOGIES)
@fewer
@given(case=st.fixed_dictionaries(cases))
def test_a_run_keeps_every_invariant(topology, case):
    try:
        learner = learner_of(topology, case)
    except RecipeError:  # a distribution that its bounds forbid
        return
    update, total = learner.update, learner.update.num_active
    inner, moved = update.around.apply, []

    def apply(parameters, grads, scale=1.0):
        """The inner update, which must not see a signal where nothing is, and sees one elsewhere."""
        for name, gone in masked_entries(learner).items():
            assert not grads[name][gone].any(), name
            moved.append(bool(grads[name].any()))
        inner(parameters, grads, scale)

    update.around.apply = apply
    for step in range(1, 10):
        learner.step(tiny_batch(seed=step))
        assert sum(update.masks.counts()) == update.num_active
        assert update.num_active == total or topology == "magnitude"
        kept = update.around.moments if case["around"] == "adamw" else update.around.velocity
        for name, gone in masked_entries(learner).items():
            weight = learner.model.get_parameter(name)
            assert not weight[gone].any(), (step, name)
            remembered = [kept[name][key] for key in ("first", "second")] if case["around"] == "adamw" else [kept[name]]
            assert not any(bool(tensor[gone].any()) for tensor in remembered), (step, name)
        if topology == "sparsae":
            bounds, counts = update.topology.bounds, update.masks.counts()
            assert all(low <= have <= high for low, have, high in zip(bounds.lower, counts, bounds.upper, strict=True))
    assert any(moved)
    if topology == "magnitude":
        size = update.masks.size
        assert update.num_active == num_active(case["sparsity"], size) < total


@pytest.mark.parametrize("topology", TOPOLOGIES)
@fewer
@given(case=st.fixed_dictionaries(cases), cut=st.integers(1, 8))
def test_a_run_that_is_cut_goes_on_to_the_bit(topology, case, cut):
    try:
        whole, first, second = (learner_of(topology, case) for _ in range(3))
    except RecipeError:
        return
    check_a_cut(whole, first, second, cut)


@pytest.mark.parametrize("topology", ["set", "rigl", "sparsae"])
@pytest.mark.parametrize("age", [1, 2])
def test_a_run_that_is_cut_in_a_burn_in_goes_on_to_the_bit(topology, age):
    """After an event in step 3, so many of three steps into it; a connection that forgets its age goes elsewhere."""
    changes = {"survival": "comma"} if topology == "sparsae" else {}
    whole, first, second, forgetful = (
        sparse_learner(options(topology, **changes), steps=12, burn_in={"steps": 3, "peak": 2.0}) for _ in range(4)
    )
    check_a_cut(whole, first, second, 3 + age)
    assert sum(len(entries) for entries in first.update.nursery.entries.values()) > 10
    assert first.update.nursery.age == age
    forgetful.model.load_state_dict(first.model.state_dict())
    forgetful.load_state(first.state())
    forgetful.update.nursery.age = 0
    for step in range(4 + age, 10):
        forgetful.step(tiny_batch(seed=step))
    mine, other = (dict(run.model.state_dict()) for run in (forgetful, whole))
    assert not all(torch.equal(mine[name], other[name]) for name in mine)


def check_a_cut(whole, first, second, cut: int) -> None:
    """`second` goes on from where `first` is cut, and ends where `whole` ends."""
    for step in range(1, 10):
        whole.step(tiny_batch(seed=step))
    for step in range(1, cut + 1):
        first.step(tiny_batch(seed=step))
    tensors, values = split(first.state())
    second.model.load_state_dict(first.model.state_dict())
    second.load_state(join({path: tensor.clone() for path, tensor in tensors.items()}, values))
    for step in range(cut + 1, 10):
        second.step(tiny_batch(seed=step))
    mine, other = (split({"model": dict(run.model.state_dict()), **run.state()})[0] for run in (second, whole))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
