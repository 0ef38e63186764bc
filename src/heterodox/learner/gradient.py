"""The step that all rules share: weights, signal, mean over ranks, clip, update."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.utils import get_total_norm

from heterodox.core import config
from heterodox.core.comm import Comm
from heterodox.core.protocols import Costly, Credit, Foretold, LanguageModel, Objective, Rating, Selecting, Update
from heterodox.core.state import Tree, map_tensors, split
from heterodox.core.types import Alignment, Batch, Cost, Diagnosis, LabelledBatch, Origin, Signal, StepReport
from heterodox.probe.alignment import alignment, exact_gradients
from heterodox.probe.memory import activation_bytes


class Gradient:
    """One step: `batch → rating → credit.signal → comm.mean → clip → update.apply`."""

    class Config(config.Config):
        name: Literal["gradient"] = "gradient"
        clip: float | None = Field(1.0, gt=0, description="largest global norm of the signal; null: no clip")

        def build(
            self,
            *,
            model: LanguageModel,
            objective: Objective,
            rating: Rating,
            credit: Credit,
            update: Update,
            comm: Comm,
        ) -> "Gradient":
            return Gradient(model, objective, rating, credit, update, comm, clip=self.clip)

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        rating: Rating,
        credit: Credit,
        update: Update,
        comm: Comm,
        *,
        clip: float | None = 1.0,
    ) -> None:
        self.model = model
        self.objective = objective
        self.rating = rating
        self.credit = credit
        self.update = update
        self.comm = comm
        self.clip = clip
        self._parameters = dict(model.named_parameters())

    def step(
        self, batch: Batch, *, lr_scale: float = 1.0, probe: bool = False, dropout_seed: int | None = None
    ) -> StepReport:
        """Learn from `batch`, this rank's share of the global batch.

        `probe` also compares the signal with the exact gradient on the same batch, before the update. A
        `dropout_seed` seeds the global random generator for the forward pass, and for the probe's alike.
        """
        drawn = batch
        batch, weights = self.rate(drawn)
        _seed(dropout_seed)
        signal = self.credit.signal(self.model, batch, weights, self.objective)
        self.comm.mean_([*_tensors(signal), signal.loss, *signal.metrics.values()])
        compared, seconds = self._compare(signal, batch, weights, dropout_seed) if probe else (None, 0.0)
        norm = _clip(signal, self.clip)
        self.update.apply(self._parameters | signal.own_parameters, signal.grads | signal.own_grads, lr_scale)
        cost = signal.cost + self._cost_of_rating(drawn)
        return StepReport(signal.loss, norm, cost, signal.metrics, compared, seconds, signal.limits)

    def rate(self, batch: Batch) -> tuple[Batch, Float[Tensor, " kept"]]:
        """What of `batch` is learned from, and how much each example counts."""
        if isinstance(self.rating, Selecting):
            batch = self.rating.select(batch)
        return batch, self.rating.weights(batch)

    def _unrated(self, batch: Batch) -> tuple[Batch, Float[Tensor, " kept"]]:
        """As many examples of `batch` as are learned from, each with weight 1, without asking the rating."""
        if isinstance(self.rating, Selecting):
            size = self.rating.kept(len(batch.ids))
            batch = Batch(batch.inputs[:size], batch.targets[:size], batch.ids[:size])
        return batch, torch.ones(batch.ids.shape, device=batch.inputs.device)

    def _cost_of_rating(self, drawn: Batch) -> Cost:
        return self.rating.cost(drawn) if isinstance(self.rating, Costly) else Cost()

    @property
    def lr(self) -> float:
        return self.update.lr

    def settle(self) -> None:
        pass

    def manifest(self) -> Mapping[str, Origin]:
        return self.credit.manifest(self.model)

    def held_bytes(self, batch: Batch) -> int:
        untouched = map_tensors(self.credit.state(), torch.clone)
        held = activation_bytes(self.model, *self._unrated(batch), self.objective, self.credit)
        self.credit.load_state(untouched)
        return held

    def foretell(self, batch: Batch) -> Foretold:
        rule_state, drawn = _bytes(self.credit.state()), batch
        batch, weights = self._unrated(drawn)
        held = activation_bytes(self.model, batch, weights, self.objective, self.credit)
        signal = self.credit.signal(self.model, batch, weights, self.objective)
        self.update.apply(self._parameters | signal.own_parameters, signal.grads | signal.own_grads, 1.0)
        sizes = {
            "weights": _bytes(dict(self.model.state_dict())),
            "signal": _bytes(signal.grads),
            "update_state": _bytes(self.update.state()),
            "rule_state": rule_state,
            "activations": held,
        }
        cost = signal.cost + self._cost_of_rating(drawn)
        return Foretold(cost, sizes, sum(g.numel() for g in signal.grads.values()))

    def examine(self, examples: Sequence[LabelledBatch]) -> Diagnosis:
        return Diagnosis()

    def _compare(
        self, signal: Signal, batch: Batch, weights: Tensor, dropout_seed: int | None
    ) -> tuple[Alignment, float]:
        """The signal's alignment with the exact gradient, and the seconds that finding out took."""
        if signal.loss.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        _seed(dropout_seed)
        exact = exact_gradients(self.model, batch, weights, self.objective, self.comm)
        return alignment(signal.grads, exact), time.perf_counter() - began

    def state(self) -> Tree:
        parts = {
            "objective": self.objective, "rating": self.rating, "credit": self.credit, "update": self.update,
        }  # fmt: skip
        return {name: part.state() for name, part in parts.items()}

    def load_state(self, tree: Tree) -> None:
        self.objective.load_state(tree.get("objective", {}))
        self.rating.load_state(tree.get("rating", {}))
        self.credit.load_state(tree.get("credit", {}))
        self.update.load_state(tree.get("update", {}))


def _bytes(tree: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in split(tree)[0].values())


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)


def _tensors(signal: Signal) -> list[Tensor]:
    """Every gradient of the signal once, however many names it has."""
    return list({id(tensor): tensor for tensor in (*signal.grads.values(), *signal.own_grads.values())}.values())


def _clip(signal: Signal, limit: float | None) -> Float[Tensor, ""]:
    """Scale the signal in place so that the model's part has a global norm of at most `limit`; its norm before."""
    norm = get_total_norm(list(signal.grads.values()))
    if limit is not None:
        torch._foreach_mul_(_tensors(signal), torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm
