"""Timing steps against each other on a machine that may not be quiet."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from heterodox.core.types import Batch

Step = Callable[[Batch], object]


def options(description: str) -> argparse.ArgumentParser:
    """The options that both benchmarks have: the model's size, the batch, how often."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sizes = {"layers": 4, "heads": 4, "width": 128, "context": 64, "batch": 12, "vocab": 65}
    for name, default in (sizes | {"threads": 2, "rounds": 200, "warmup": 20}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def random_batches(vocab: int, batch: int, context: int, count: int = 8) -> list[Batch]:
    """A few batches of random tokens; how long a step takes does not depend on the text."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(vocab, (batch, context + 1), generator=generator) for _ in range(count)]
    return [Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(batch)) for tokens in drawn]


def alternate(steps: Mapping[str, Step], batches: Sequence[Batch], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each round. Everyone steps once a round, the first one in turn, so that whatever
    else the machine does meets all of them alike."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            steps[name](batches[number % len(batches)])
            if number >= warmup:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over the rounds of a's time over b's in the same round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
