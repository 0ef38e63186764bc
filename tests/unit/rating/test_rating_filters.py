"""Ratings that keep a part of a batch: how much, which, at what cost, again after a resume."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.app.session import open_session
from heterodox.core.comm import Solo
from heterodox.core.errors import CheckpointError
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.objective import CrossEntropy
from heterodox.rating import Perplexity, Random
from tests.tiny import tiny_batch, tiny_gpt, tiny_recipe

KEEPS = [0.5, 0.7, 0.85, 1.0, 1 / 3]


def connected(rating):
    rating.connect(Services(tiny_gpt(), Streams(0), Solo()))
    return rating


@pytest.mark.parametrize("keep", KEEPS)
def test_what_is_kept_of_what_is_drawn_is_a_batch(keep):
    config = Random.Config(keep=keep)
    rating = config.build()
    for size in range(1, 100):
        drawn = config.drawn(size)
        assert rating.kept(drawn) == size
        assert size <= drawn <= size / keep + 1


def test_perplexity_keeps_what_is_easy_in_the_order_in_which_it_was_drawn():
    batch, rating = tiny_batch(10), connected(Perplexity(keep=0.5))
    losses = CrossEntropy().losses(rating.model(batch.inputs), batch)
    kept = rating.select(batch)
    assert kept.ids.tolist() == sorted(losses.argsort()[:5].tolist())
    assert torch.equal(kept.inputs, batch.inputs[kept.ids])
    assert torch.equal(kept.targets, batch.targets[kept.ids])
    assert rating.weights(kept).tolist() == [1.0] * 5
    middle = connected(Perplexity(keep=0.5, skip=0.2)).select(batch)
    assert middle.ids.tolist() == sorted(losses.argsort()[2:7].tolist())


def test_random_draws_anew_and_goes_on_where_it_was():
    batch, rating, other = tiny_batch(10), connected(Random(keep=0.5)), connected(Random(keep=0.5))
    first, second = rating.select(batch).ids, rating.select(batch).ids
    assert not torch.equal(first, second)
    other.load_state({"count": 1})
    assert torch.equal(other.select(batch).ids, second)
    with pytest.raises(CheckpointError, match="lacks the random rating's count"):
        other.load_state({})


@pytest.mark.parametrize(
    "rating",
    [
        {"name": "perplexity", "keep": 0.5},
        {"name": "random", "keep": 0.5},
        {"name": "data_rater", "keep": 0.5, "train": {"rounds": 1, "batch_size": 4, "val_batch_size": 4}},
    ],
)
def test_a_step_costs_what_torch_counts(rating):
    session = open_session(tiny_recipe(rating=rating, run={"precision": "float64"}), Solo(), "cpu")
    for number in range(2):
        batch = session.loader.next_batch()
        assert len(batch.ids) == 16
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            report = session.learner.step(batch)
        assert report.cost.flops == counter.get_total_flops() > 0
        first = rating["name"] == "data_rater" and number == 0
        assert report.cost.tokens == 8 * 16 + first * 2 * 4 * 16
        assert report.cost.meta_tokens == 8 * 16 + first * 2 * 4 * 16


@pytest.mark.parametrize("config", [Perplexity.Config, Perplexity])
def test_perplexity_keeps_nothing_that_it_skips(config):
    with pytest.raises(
        ValueError, match=r"skip 0\.4 and keep 0\.7 are more than a batch together.*skip to 0\.3 or less"
    ):
        config(keep=0.7, skip=0.4)
    batch, rating = tiny_batch(10), connected(Perplexity(keep=0.7, skip=0.3))
    losses = CrossEntropy().losses(rating.model(batch.inputs), batch)
    assert rating.select(batch).ids.tolist() == sorted(losses.argsort()[3:].tolist())
