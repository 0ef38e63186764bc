"""State trees: what goes into a checkpoint comes out of it, and what does not fit is named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterodox.core.errors import CheckpointError, nearest
from heterodox.core.state import join, map_tensors, restore, split

keys = st.text("abc._ é0", min_size=1, max_size=3)
leaves = st.one_of(st.integers(), st.booleans(), keys, st.none(), st.lists(st.integers(), max_size=3))
values = st.recursive(
    st.one_of(leaves, st.builds(lambda n: torch.arange(n), st.integers(0, 4))),
    lambda inner: st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def same(a, b) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(keys, values, max_size=4))
def test_join_inverts_split(tree):
    tensors, others = split(tree)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    assert same(join(tensors, others), tree)


def test_mapping_tensors_leaves_the_rest():
    tree = {"a": {"b": torch.ones(2), "c": 3}, "d": "x"}
    doubled = map_tensors(tree, lambda tensor: 2 * tensor)
    assert torch.equal(doubled["a"]["b"], torch.full((2,), 2.0))
    assert (doubled["a"]["c"], doubled["d"]) == (3, "x")
    assert torch.equal(tree["a"]["b"], torch.ones(2))


def test_restore_copies_in_place():
    weight = torch.zeros(2)
    restore({"w": weight}, {"w": torch.ones(2)}, "weight")
    assert torch.equal(weight, torch.ones(2))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "lacks weight 'w'"),
        ({"w": torch.ones(2), "x": torch.ones(1)}, "has an unknown weight 'x'"),
        ({"w": torch.ones(3)}, r"weight 'w' has shape \(3,\), the recipe's model needs \(2,\)"),
    ],
)
def test_restore_names_what_does_not_fit(saved, message):
    weight = torch.zeros(2)
    with pytest.raises(CheckpointError, match=message):
        restore({"w": weight}, saved, "weight")
    assert torch.equal(weight, torch.zeros(2))


def test_nearest():
    assert nearest("layres", ["layers", "heads"]) == "; did you mean 'layers'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
