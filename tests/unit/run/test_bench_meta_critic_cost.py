"""The bench of what learned critics cost: its variants can be read, and its checkpointed backprop is backprop."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from heterodox.app.recipe import load_recipe
from heterodox.core.memory import activation_bytes
from heterodox.credit import Backprop
from heterodox.objective import CrossEntropy
from tests.signals import WEIGHTS, grads_of, same
from tests.tiny import tiny_batch, tiny_gpt

SPEC = spec_from_file_location("meta_critic_cost", Path(__file__).parents[3] / "bench" / "meta_critic_cost.py")
assert SPEC is not None
assert SPEC.loader is not None
BENCH = module_from_spec(SPEC)
SPEC.loader.exec_module(BENCH)


@pytest.mark.parametrize("overrides", BENCH.VARIANTS.values(), ids=BENCH.VARIANTS)
def test_every_variant_can_be_read(overrides):
    load_recipe(BENCH.RECIPE, ["data.path=text.txt", *overrides])


def held(model) -> int:
    return activation_bytes(model, tiny_batch(), WEIGHTS, CrossEntropy(), Backprop())


def test_recomputed_blocks_give_the_same_gradient_and_hold_one_graph_at_a_time():
    """A block more costs its input alone, beside the largest graph at any time."""
    sizes = {}
    for layers in (3, 4, 5):
        model = tiny_gpt(layers=layers)
        exact, whole = grads_of(Backprop(), model), held(model)
        BENCH.recompute_blocks(model)
        found = grads_of(Backprop(), model)
        assert all(same(found[name], exact[name]) for name in exact)
        sizes[layers] = (whole, held(model))
    stream = 8 * tiny_batch().num_tokens * model.head.weight.shape[1]
    graph = sizes[5][0] - sizes[4][0]
    assert [sizes[layers + 1][1] - sizes[layers][1] for layers in (3, 4)] == [stream, stream]
    assert graph > 5 * stream
    assert sizes[5][1] > graph + 3 * stream
