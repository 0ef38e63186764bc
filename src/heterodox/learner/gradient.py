"""The step that all rules share: weights, signal, mean over ranks, clip, update."""

import time
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.utils import get_total_norm

from heterodox.core import config
from heterodox.core.comm import Comm
from heterodox.core.protocols import Credit, LanguageModel, Objective, Rating, Update
from heterodox.core.state import Tree
from heterodox.core.types import Alignment, Batch, Signal, StepReport
from heterodox.probe.alignment import alignment, exact_gradients


class Gradient:
    """One step: `batch → rating.weights → credit.signal → comm.mean → clip → update.apply`."""

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
        _seed(dropout_seed)
        weights = self.rating.weights(batch)
        signal = self.credit.signal(self.model, batch, weights, self.objective)
        self.comm.mean_([*_tensors(signal), signal.loss, *signal.metrics.values()])
        compared, seconds = self._compare(signal, batch, weights, dropout_seed) if probe else (None, 0.0)
        norm = _clip(signal, self.clip)
        self.update.apply(self._parameters | signal.own_parameters, signal.grads | signal.own_grads, lr_scale)
        return StepReport(signal.loss, norm, signal.cost, signal.metrics, compared, seconds, signal.limits)

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
