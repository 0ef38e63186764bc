"""Self-distillation: the student also learns from a slow average of itself."""

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.protocols import LanguageModel
from heterodox.core.services import Services
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost
from heterodox.objective.cross_entropy import CrossEntropy


class SelfDistillation:
    """Self-distillation: the student also learns from a slow average of itself.

        L = CE + α_t · KL(student ‖ teacher),   teacher weights ← β · teacher + (1 − β) · student

        α_t = 0 until the warm-up is over, then α_end + ½ (α_start − α_end)(1 + cos(π · min(1, t / T))), t from there on

    The teacher is the average of the weights as they are after each step; where an update masks them, of W ⊙ M, so that
    it is dense where masks have moved. It runs without dropout and without a graph, once for each batch from the end of
    the warm-up on: a forward pass that `flops` counts. Between ranks nothing is exchanged, as all hold the same
    weights.

    Reference: `KL` in this order and the schedule are those of the Sparsae protocol; averaged teachers: Tarvainen and
    Valpola, "Mean teachers are better role models", NeurIPS 2017.

    Cross-entropy, and the divergence from an averaged teacher.
    """

    class Config(config.Config):
        name: Literal["self_distillation"] = "self_distillation"
        start: float = Field(0.5, ge=0, description="weight of the divergence when the warm-up is over, α_start")
        end: float = Field(0.1, ge=0, description="weight at the end of the annealing, α_end")
        anneal: float = Field(0.7, gt=0, le=1, description="share of the run's steps that the annealing takes")
        warmup_steps: int = Field(500, ge=0, description="steps before the teacher is asked")
        decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights, β")

        def build(self) -> "SelfDistillation":
            return SelfDistillation(
                start=self.start, end=self.end, anneal=self.anneal, warmup_steps=self.warmup_steps, decay=self.decay
            )

        def refusals(self, recipe: config.Config) -> list[str]:
            budget = recipe.run.budget  # pyrefly: ignore[missing-attribute]
            if budget.steps is None:
                return [f"objective self_distillation anneals over the run's steps; run.budget is in {budget.unit}"]
            if self.warmup_steps >= budget.steps:
                return [
                    f"objective.warmup_steps is {self.warmup_steps}, expected below the {budget.steps} steps of the "
                    "run: the teacher would never be asked"
                ]
            return []

    def __init__(
        self,
        *,
        start: float = 0.5,
        end: float = 0.1,
        anneal: float = 0.7,
        warmup_steps: int = 500,
        decay: float = 0.999,
    ) -> None:
        self.start, self.end, self.anneal = start, end, anneal
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.step = 0
        self._cross_entropy = CrossEntropy()
        self._asked: tuple[Batch, Tensor] | None = None
        self._divergence: Tensor | None = None
        self._flops: dict[tuple[int, ...], int] = {}

    def connect(self, services: Services) -> None:
        assert services.steps is not None, "the annealing needs to know how many steps there are"
        self.anneal_steps = max(1, round(self.anneal * services.steps))
        self.model = services.model
        # Tensors are handed to the copy, as fake ones (of a plan) cannot be copied by it; buffers are constants.
        tensors = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.model.parameters()}
        shared = {id(buffer): buffer for buffer in self.model.buffers()}
        self.teacher: LanguageModel = copy.deepcopy(self.model, tensors | shared).eval()
        self._averaged: dict[str, Tensor] = {name: p.data for name, p in self.teacher.named_parameters()}

    @property
    def alpha(self) -> float:
        """The weight of the divergence in the coming step."""
        return self._alpha_of(self.step)

    def _alpha_of(self, step: int) -> float:
        if step < self.warmup_steps:
            return 0.0
        done = min(1.0, (step - self.warmup_steps) / self.anneal_steps)
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * done))

    def losses(self, logits: Float[Tensor, "batch time vocab"], batch: Batch) -> Float[Tensor, " batch"]:
        losses = self._cross_entropy.losses(logits, batch)
        if not self.alpha:
            return losses
        divergence = kl_divergence(logits, self._teacher_says(batch))
        self._divergence = divergence.detach().mean()
        return losses + self.alpha * divergence

    def token_losses(self, logits: Float[Tensor, "batch time vocab"], batch: Batch) -> Float[Tensor, "batch time"]:
        losses = self._cross_entropy.token_losses(logits, batch)
        if not self.alpha:
            return losses
        return losses + self.alpha * token_divergence(logits, self._teacher_says(batch))

    @torch.no_grad()
    def _teacher_says(self, batch: Batch) -> Float[Tensor, "batch time vocab"]:
        """The teacher's logits, computed once for a batch."""
        if self._asked is None or self._asked[0] is not batch:
            self._asked = batch, self.teacher(batch.inputs)
        return self._asked[1]

    def cost(self, batch: Batch) -> Cost:
        return self.step_cost(batch, self.step)

    def step_cost(self, batch: Batch, step: int) -> Cost:
        if not self._alpha_of(step):
            return Cost()
        shape = batch.inputs.shape
        if shape not in self._flops:
            self._flops[shape] = self.teacher.forward_flops(*shape).total
        return Cost(flops=self._flops[shape])

    def begin(self) -> None:
        for name, parameter in self.model.named_parameters():
            self._averaged[name].copy_(parameter.detach())

    @torch.no_grad()
    def advance(self) -> dict[str, Tensor]:
        alpha, divergence = self.alpha, self._divergence
        own: list[Tensor] = [parameter.data for parameter in self.model.parameters()]
        torch._foreach_lerp_(list(self._averaged.values()), own, 1 - self.decay)
        self.step += 1
        self._asked = self._divergence = None
        told = {"distillation_weight": torch.tensor(alpha)}
        return told if divergence is None else told | {"distillation_divergence": divergence}

    def state(self) -> Tree:
        return {"step": self.step, "teacher": self._averaged}

    def load_state(self, tree: Tree) -> None:
        restore(self._averaged, tree.get("teacher", {}), "teacher's weight")
        self.step = tree["step"]


def kl_divergence(
    student: Float[Tensor, "batch time vocab"], teacher: Float[Tensor, "batch time vocab"]
) -> Float[Tensor, " batch"]:
    """KL(student ‖ teacher) of two rows of logits in nats, averaged over the positions of each example."""
    return token_divergence(student, teacher).mean(dim=1)


def token_divergence(
    student: Float[Tensor, "batch time vocab"], teacher: Float[Tensor, "batch time vocab"]
) -> Float[Tensor, "batch time"]:
    """KL(student ‖ teacher) of each position."""
    wide = [logits if logits.dtype.itemsize >= 4 else logits.float() for logits in (student, teacher)]
    log_student, log_teacher = (F.log_softmax(logits, dim=-1) for logits in wide)
    return (log_student.exp() * (log_student - log_teacher)).sum(dim=-1)
