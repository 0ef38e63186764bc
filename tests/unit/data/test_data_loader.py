from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heterodox.core.errors import CorpusError, RecipeError
from heterodox.core.rng import Streams
from heterodox.data import Loader, Split, evaluation_batches

Make = Callable[..., Split]


def ids(loader: Loader, batches: int) -> list[int]:
    return [i for _ in range(batches) for i in loader.next_batch().ids.tolist()]


def test_a_batch_holds_windows_and_their_continuation(counting_split: Make, streams: Streams):
    batch = Loader(counting_split(101), context=10, batch_size=4, streams=streams).next_batch()
    assert batch.inputs.shape == batch.targets.shape == (4, 10)
    assert batch.inputs.dtype == batch.targets.dtype == batch.ids.dtype == torch.int64
    expected = batch.ids[:, None] * 10 + torch.arange(10)
    assert torch.equal(batch.inputs, expected)
    assert torch.equal(batch.targets, expected + 1)


@given(st.integers(2, 400), st.integers(1, 20))
def test_windows_predict_every_token_once(counting_split, num_tokens, context):
    if num_tokens <= context:
        return
    batches = evaluation_batches(
        counting_split(num_tokens), context=context, batch_size=3, max_batches=None, streams=Streams(0)
    )
    targets = torch.cat([batch.targets.flatten() for batch in batches]).tolist()
    assert targets == list(range(1, (num_tokens - 1) // context * context + 1))


@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 5))
def test_each_epoch_is_an_order_of_its_own_of_all_examples(counting_split, examples, batch_size, seed):
    loader = Loader(counting_split(examples * 5 + 1), context=5, batch_size=batch_size, streams=Streams(seed))
    assert loader.examples_per_epoch == examples
    seen = ids(loader, 4 * examples // batch_size + 1)
    assert loader.epoch == len(seen) // examples
    for start in range(0, len(seen) - examples + 1, examples):
        assert sorted(seen[start : start + examples]) == list(range(examples))


def test_epochs_seeds_splits_and_orders_are_shuffled_independently(counting_split: Make):
    def order(seed: int = 0, name: str = "train", **options) -> list[int]:
        split = counting_split(1001, name)
        return ids(Loader(split, context=10, batch_size=50, streams=Streams(seed), **options), 4)

    base = order()
    assert base == order()
    assert base[:100] != base[100:]
    assert base[:100] != list(range(100))
    assert len({tuple(x) for x in (base, order(1), order(name="meta"), order(order="second"))}) == 4


@given(st.sampled_from([1, 2, 3, 6]), st.integers(1, 40))
def test_ranks_together_see_the_batches_of_one_rank_in_order(counting_split, world_size, examples):
    def loader(rank: int, world_size: int) -> Loader:
        return Loader(
            counting_split(examples * 4 + 1),
            context=4,
            batch_size=12,
            streams=Streams(3),
            rank=rank,
            world_size=world_size,
        )

    alone, ranks = loader(0, 1), [loader(rank, world_size) for rank in range(world_size)]
    for _ in range(6):
        whole, parts = alone.next_batch(), [rank.next_batch() for rank in ranks]
        assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))
        assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
    assert all(rank.state() == alone.state() == {"position": 72} for rank in ranks)


def test_the_state_resumes_in_the_middle_of_an_epoch(counting_split: Make, streams: Streams):
    def loader(batch_size: int = 7) -> Loader:
        return Loader(counting_split(201), context=10, batch_size=batch_size, streams=streams)

    first = loader()
    before = ids(first, 5)
    state = first.state()
    assert state == {"position": 35}
    after = ids(first, 9)
    resumed = loader()
    resumed.load_state(state)
    assert ids(resumed, 9) == after
    other = loader(batch_size=14)
    assert ids(other, 7) == before + after


def test_a_split_smaller_than_a_batch_repeats_within_it(counting_split: Make, streams: Streams):
    loader = Loader(counting_split(31), context=10, batch_size=9, streams=streams)
    seen = loader.next_batch().ids.tolist()
    assert [sorted(seen[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3
    assert loader.epoch == 3


@pytest.mark.parametrize("num_tokens", [0, 12, 64])
def test_a_split_without_a_window_is_refused_with_numbers(counting_split: Make, streams: Streams, num_tokens):
    message = rf"the val split has {num_tokens} tokens; context 64 needs at least 65"
    split = counting_split(num_tokens, "val")
    with pytest.raises(CorpusError, match=message):
        Loader(split, context=64, batch_size=2, streams=streams)
    with pytest.raises(CorpusError, match=message):
        evaluation_batches(split, context=64, batch_size=2, max_batches=1, streams=streams)
    assert Loader(counting_split(65), context=64, batch_size=2, streams=streams).examples_per_epoch == 1


def test_impossible_sizes_are_refused(counting_split: Make, streams: Streams):
    split = counting_split(100)
    with pytest.raises(RecipeError, match="batch of 5 examples cannot be shared equally by 2 processes"):
        Loader(split, context=4, batch_size=5, streams=streams, world_size=2)
    with pytest.raises(RecipeError, match="batch size is 0"):
        Loader(split, context=4, batch_size=0, streams=streams)
    with pytest.raises(RecipeError, match="context is 0"):
        Loader(split, context=0, batch_size=1, streams=streams)
    with pytest.raises(RecipeError, match="cannot evaluate on 0 batches"):
        evaluation_batches(split, context=4, batch_size=1, max_batches=0, streams=streams)


def test_evaluation_sees_all_windows_in_order_unless_limited(counting_split: Make, streams: Streams):
    split = counting_split(101)
    for limit in (None, 4, 99):
        batches = evaluation_batches(split, context=10, batch_size=3, max_batches=limit, streams=streams)
        assert [batch.ids.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
        assert len(batches) == 4


def test_limited_evaluation_is_a_fixed_choice(counting_split: Make):
    def chosen(seed: int) -> list[list[int]]:
        split = counting_split(1001, "val")
        batches = evaluation_batches(split, context=10, batch_size=8, max_batches=5, streams=Streams(seed))
        first = [batch.ids.tolist() for batch in batches]
        assert first == [batch.ids.tolist() for batch in batches], "it can be iterated again"
        assert [len(part) for part in first] == [8] * 5
        return first

    flat = np.array(chosen(0)).flatten()
    assert len(set(flat)) == 40
    assert flat.max() > 50
    assert chosen(0) == chosen(0) != chosen(1)


def test_ranks_share_the_evaluation_by_batch(counting_split: Make, streams: Streams):
    def share(rank: int, world_size: int) -> list[list[int]]:
        batches = evaluation_batches(
            counting_split(101),
            context=10,
            batch_size=3,
            max_batches=None,
            streams=streams,
            rank=rank,
            world_size=world_size,
        )
        return [batch.ids.tolist() for batch in batches]

    whole = share(0, 1)
    assert [share(rank, 3) for rank in range(3)] == [whole[0::3], whole[1::3], whole[2::3]]
    assert share(4, 5) == []


def test_evaluation_batches_can_be_sliced(counting_split: Make, streams: Streams):
    batches = evaluation_batches(counting_split(101), context=10, batch_size=3, max_batches=None, streams=streams)
    assert [batch.ids.tolist() for batch in batches[1:3]] == [[3, 4, 5], [6, 7, 8]]
    assert [batch.ids.tolist() for batch in islice(batches, 1)] == [[0, 1, 2]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_the_gpu(counting_split: Make, streams: Streams):
    options = {"context": 10, "batch_size": 4, "streams": streams}
    here = Loader(counting_split(101), **options).next_batch()
    there = Loader(counting_split(101), **options, device="cuda").next_batch()
    assert there.inputs.is_cuda
    assert torch.equal(here.inputs, there.inputs.cpu())
    assert torch.equal(here.ids, there.ids.cpu())
