"""Named random streams, each a pure function of the run's seed and a name.

Nothing here has a state: a generator is made where it is needed, from names and counters that the checkpoint holds
anyway. Two rules at one seed therefore draw the same initial weights and the same data, whatever else they draw.
"""

import hashlib
from typing import Literal

import torch

Stream = Literal["init", "data", "rule", "eval", "dropout"]


def derive_seed(seed: int, stream: Stream, *names: str | int) -> int:
    """A 63-bit seed for `names` within `stream`."""
    text = "/".join([str(seed), stream, *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Streams:
    """The random streams of one run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def derive(self, stream: Stream, *names: str | int) -> int:
        return derive_seed(self.seed, stream, *names)

    def generator(self, stream: Stream, *names: str | int) -> torch.Generator:
        """A fresh CPU generator for `names` within `stream`; the same names give the same numbers."""
        return torch.Generator().manual_seed(self.derive(stream, *names))
