"""The step that all rules share: weights, signal, mean over ranks, clip, update."""

import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.utils import get_total_norm

from heterodox.core import slot as config
from heterodox.core.comm import Comm
from heterodox.core.errors import RecipeError
from heterodox.core.memory import activation_bytes
from heterodox.core.protocols import (
    Credit,
    EvolvingObjective,
    Foretold,
    LanguageModel,
    Objective,
    Rating,
    Remarking,
    StructuralUpdate,
    Update,
)
from heterodox.core.state import Tree, map_tensors
from heterodox.core.types import (
    Alignment,
    Batch,
    Cost,
    Diagnosis,
    LabelledBatch,
    Origin,
    Signal,
    StepReport,
    UpdateReport,
)
from heterodox.learner import cost as rated
from heterodox.learner.cost import foretell
from heterodox.learner.probe import ModelWindow, alignment, exact_gradients


class Gradient:
    """The step that all rules share: weights, signal, mean over ranks, clip, update.

    One step: `batch → rating → credit.signal → comm.mean → clip → update.apply`.

    An update that decides which weights there are selects from the signal before the clip.
    """

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
        outside = model.embedding_names | model.readout_names
        self._num_multiplying = sum(p.numel() for n, p in self._parameters.items() if p.ndim == 2 and n not in outside)
        self._structure = update if isinstance(update, StructuralUpdate) else None
        self._evolving = objective if isinstance(objective, EvolvingObjective) else None
        if self._structure:
            _require_moving(self._structure, credit.manifest(model))
            self._structure.watch(ModelWindow(model, credit, comm))

    def begin(self) -> None:
        """Bring a freshly drawn model to where the parts start from; a resumed run does not begin."""
        if self._structure:
            self._structure.begin(self._parameters)
        if self._evolving:
            self._evolving.begin()

    def prepare(self) -> bool:
        return rated.prepare(self.rating)

    @property
    def prepared_whole(self) -> bool:
        return rated.prepared_whole(self.rating)

    @property
    def num_masked(self) -> int:
        """Weights that the update holds at zero."""
        return self._structure.num_masked if self._structure else 0

    @property
    def search_seconds(self) -> float:
        """What changing the update's structure has taken, of the seconds of training."""
        return self._structure.search_seconds if self._structure else 0.0

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
        if self._structure:
            self._structure.select(signal.grads)
        norm, factor = _clip(signal, self.clip)
        if self._structure:
            self._structure.clipped(factor)
        cost = signal.cost + self._spared(signal.cost.flops, batch)
        self.update.apply(self._parameters | signal.own_parameters, signal.grads | signal.own_grads, lr_scale)
        told = self._structure.report() if self._structure else UpdateReport()
        if self._evolving:
            cost += self._evolving.cost(batch)
            told.metrics |= self._evolving.advance()
        cost += rated.rating_cost(self.rating, drawn)
        report = StepReport(signal.loss, norm, cost + told.cost, signal.metrics | told.metrics, compared, seconds)
        report.limits, report.events = signal.limits, told.events
        return report

    def _spared(self, flops: int, batch: Batch) -> Cost:
        """The FLOPs among a rule's that multiply masked weights, by their share in a forward pass.

        Where the update needs the signal of masked weights too, the third of it that makes weight gradients is dense.
        """
        if not self.num_masked or self._structure is None:
            return Cost()
        forward = self.model.forward_flops(*batch.inputs.shape)
        masked = forward.linear * min(self.num_masked / self._num_multiplying, 1.0)
        share = masked / forward.total * (2 / 3 if self._structure.saw_dense else 1)
        return Cost(masked_flops=round(share * flops))

    def rate(self, batch: Batch) -> tuple[Batch, Float[Tensor, " kept"]]:
        """What of `batch` is learned from, and how much each example counts."""
        return rated.rate_examples(self.rating, batch)

    @property
    def lr(self) -> float:
        return self.update.lr

    def settle(self) -> None:
        pass

    def manifest(self) -> Mapping[str, Origin]:
        return self.credit.manifest(self.model)

    def remarks(self) -> list[str]:
        return self.credit.remarks() if isinstance(self.credit, Remarking) else []

    def held_bytes(self, batch: Batch) -> int:
        untouched = map_tensors(self.credit.state(), torch.clone)
        held = activation_bytes(self.model, *rated.unrated(self.rating, batch), self.objective, self.credit)
        self.credit.load_state(untouched)
        return max(held, rated.rating_held_bytes(self.rating, batch))

    def foretell(self, batch: Batch) -> Foretold:
        return foretell(self.model, self.objective, self.rating, self.credit, self.update, batch)

    def examine(self, examples: Sequence[LabelledBatch]) -> Diagnosis:
        return rated.rating_diagnosis(self.rating)

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


def _require_moving(structure: StructuralUpdate, manifest: Mapping[str, Origin]) -> None:
    """Raise `RecipeError` where an update would take weights away that the rule leaves as they are."""
    if frozen := [name for name in structure.structured if manifest[name] == "frozen"]:
        raise RecipeError(
            f"the update would mask {frozen[0]}, which the credit rule leaves as it is ({len(frozen)} such "
            f"{'matrix' if len(frozen) == 1 else 'matrices'}); name others in update.layers, or take another rule"
        )


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)


def _tensors(signal: Signal) -> list[Tensor]:
    """Every gradient of the signal once, however many names it has."""
    return list({id(tensor): tensor for tensor in (*signal.grads.values(), *signal.own_grads.values())}.values())


def _clip(signal: Signal, limit: float | None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Scale the signal in place so that the model's part has a global norm of at most `limit`.

    Returns its norm before, and what it was multiplied by.
    """
    norm = get_total_norm(list(signal.grads.values()))
    if limit is None:
        return norm, torch.ones_like(norm)
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(_tensors(signal), factor)
    return norm, factor
