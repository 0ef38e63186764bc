"""A tiny GPT under a sparse update, without a corpus: batches of its own are random tokens."""

from typing import Any

import torch

from heterodox.core.comm import Solo
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.core.types import Batch
from heterodox.credit import Backprop
from heterodox.learner.step import Gradient
from heterodox.model import GPT
from heterodox.objective import CrossEntropy
from heterodox.rating import Uniform
from heterodox.update import Sparse
from tests.tiny import tiny_batch, tiny_gpt


class RandomBatches:
    """Endless batches of random tokens; the state is how many have been taken."""

    def __init__(self, batch_size: int, first: int = 0) -> None:
        self.batch_size, self.taken, self.first = batch_size, 0, first

    @property
    def examples_per_epoch(self) -> int:
        return 1000

    def next_batch(self) -> Batch:
        self.taken += 1
        return tiny_batch(self.batch_size, seed=self.first + self.taken)

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state(self, tree: dict[str, Any]) -> None:
        self.taken = tree["taken"]


def supply(
    split: str, batch_size: int, order: str | int = 0, *, whole: bool = False, without: torch.Tensor | None = None
) -> RandomBatches:
    assert split in ("train", "meta")
    return RandomBatches(batch_size, first=1000 * (1 + len(str(order))))


SPARSAE = {
    "name": "sparsae", "every": 3, "until": 1.0, "mutation": 0.1, "margin": 0.0,
    "micro_batch": 4, "reset": {"batch": 4},
}  # fmt: skip


def options(topology: str, **changes: Any) -> dict[str, Any]:
    """A topology's section with an event every three steps until the end."""
    if topology == "static":
        return {"name": "static"}
    if topology == "sparsae":
        return SPARSAE | {"bounds": {"min_sparsity": 0.0}} | changes
    return {"name": topology, "every": 3, "until": 1.0} | changes


def sparse_learner(
    topology: dict[str, Any], *, steps: int = 30, model: GPT | None = None, seed: int = 0, **section: Any
) -> Gradient:
    """A learner that has begun: a tiny GPT in float64, backprop, and the sparse update."""
    model = model or tiny_gpt()
    config = Sparse.Config.model_validate({"lr": 0.01, "burn_in": {"steps": 2}, "topology": topology} | section)
    update = config.build()
    update.connect(Services(model, Streams(seed), Solo(), supply, steps))
    learner = Gradient(model, CrossEntropy(), Uniform(), Backprop(), update, Solo())
    learner.begin()
    return learner


def masked_entries(learner: Gradient) -> dict[str, torch.Tensor]:
    """By name, the entries that do not exist."""
    return {name: ~view for name, view in learner.update.masks.views.items()}


def grown_after(learner: Gradient, steps: int, norms: list[float] | None = None) -> dict[str, torch.Tensor]:
    """The connections that the last step's event has brought; `norms` is told the signal's before the clip."""
    for step in range(1, steps):
        learner.step(tiny_batch(seed=step))
    before = {name: view.clone() for name, view in learner.update.masks.views.items()}
    report = learner.step(tiny_batch(seed=steps))
    if norms is not None:
        norms.append(float(report.grad_norm))
    return {name: view & ~before[name] for name, view in learner.update.masks.views.items()}


def assert_growth_follows_the_gradient(learner: Gradient) -> None:
    """An event of step 4 grows, in each layer, the missing connections whose exact gradient is largest."""
    for step in range(1, 4):
        learner.step(tiny_batch(seed=step))
    batch, before = tiny_batch(seed=4), {n: v.clone() for n, v in learner.update.masks.views.items()}
    exact = Backprop().signal(learner.model, batch, torch.ones(4).double(), CrossEntropy()).grads
    learner.step(batch)
    grew = 0
    for name, view in learner.update.masks.views.items():
        born, left_out = view & ~before[name], ~view & ~before[name]
        assert int(view.sum()) == int(before[name].sum())
        grew += int(born.sum())
        if born.any() and left_out.any():
            assert exact[name].abs()[born].min() >= exact[name].abs()[left_out].max(), name
    assert grew > 10


def events_of(learner, steps: int) -> list[dict]:
    return [event for step in range(1, steps + 1) for event in learner.step(tiny_batch(seed=step)).events]
