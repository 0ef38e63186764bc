"""Random streams: pure functions of seed and names."""

import torch

from heterodox.core.rng import Streams, derive_seed


def test_the_same_names_give_the_same_numbers_and_others_do_not():
    seeds = {
        derive_seed(seed, stream, *names)
        for seed in (0, 1)
        for stream in ("init", "data", "rule", "eval", "dropout")
        for names in ((), ("a",), ("b",), ("a", "b"), ("a", 1), ("a", 2))
    }
    assert len(seeds) == 2 * 5 * 6
    assert derive_seed(3, "init", "w") == Streams(3).derive("init", "w")
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_stream_does_not_depend_on_what_else_is_drawn():
    streams = Streams(0)
    alone = torch.rand(3, generator=streams.generator("init", "w"))
    torch.rand(100)
    streams.generator("init", "v").seed()
    assert torch.equal(torch.rand(3, generator=streams.generator("init", "w")), alone)


def test_streams_are_those_of_the_first_release():
    """A change here changes every result: bump the version and say so."""
    assert derive_seed(0, "init", "head.weight") == 543422168210205445
