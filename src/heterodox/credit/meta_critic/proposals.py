"""From what critics say to proposals: first a summary that may be averaged over ranks, then ΔW.

For `outer` the summary is ΔW itself, a sum over tokens. For the other structures it is the mean of the critic's
outputs, from which ΔW is made when all ranks agree on it: mask and product are not linear.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.comm import Comm
from heterodox.credit.meta_critic.critics import Critics
from heterodox.credit.meta_critic.forward import Forward
from heterodox.credit.meta_critic.layout import Stage
from heterodox.credit.meta_critic.outer import keep_tokens, outer_products
from heterodox.credit.meta_critic.structure import Structure
from heterodox.credit.meta_critic.target import Sight, TargetKind, normal, pool, spread
from heterodox.credit.tape import Record


class Told(NamedTuple):
    """G as it comes to a stage, and the size that goes onto its critics' outputs."""

    signal: Float[Tensor, "#batch #time global"]
    size: Float[Tensor, "#batch #time 1"] | None


class Proposals:
    """Makes ΔW for stages; `structure` None is `outer`, with `density` of the tokens."""

    def __init__(
        self,
        critics: Critics,
        stages: Sequence[Stage],
        learns: Callable[[Record], bool],
        *,
        target: TargetKind,
        structure: Structure | None,
        density: float = 1.0,
    ) -> None:
        self.critics = critics
        self.stages = list(stages)
        self.learns = learns
        self.target_kind: TargetKind = target
        self.structure = structure
        self.density = density

    @property
    def dtype(self) -> torch.dtype:
        return self.critics.target.output.dtype

    def target(self, sight: Sight) -> Float[Tensor, "#batch #time global"]:
        """G_T."""
        return self.critics.target(sight.context, sight.signal)

    def contexts(self, seen: Forward, stages: Sequence[Stage], comm: Comm) -> dict[int, Tensor]:
        """What the critics of each stage see of it: its output, per token, or pooled where one answer is all."""
        found = {stage.index: normal(seen.outputs[stage.index], self.dtype) for stage in stages}
        if self._pooled:
            weights = seen.weights.to(self.dtype)[:, None, None]
            found = {index: pool(hidden, weights, comm) for index, hidden in found.items()}
        return found

    def tell(self, seen: Forward, stages: Sequence[Stage], sight: Sight, target: Tensor) -> dict[int, Told]:
        """G as it comes down to each stage, and the size that is to go onto its critics' outputs.

        Behind a norm an error is as large as the stream is short.
        """
        transport, brought = self.critics.transport, {}
        if transport is not None:
            brought = transport(seen.tape, target * sight.size, min(stage.index for stage in stages))
        found = {}
        for stage in stages:
            signal, size = target, sight.size
            if stage.index in brought:
                signal = brought[stage.index]
                size = torch.linalg.vector_norm(signal, dim=-1, keepdim=True) / signal.shape[-1] ** 0.5
                signal = signal / size.clamp_min(torch.finfo(size.dtype).tiny)
            if self.target_kind == "error":
                size = size * spread(seen.last) / spread(seen.outputs[stage.index])
            found[stage.index] = Told(signal, None if self._pooled else size)
        return found

    def summary(self, seen: Forward, stage: Stage, context: Tensor, told: Told) -> dict[str, Tensor]:
        """By parameter name what this rank proposes, differentiable in the critics and in `target`."""
        if self.structure is not None:
            return self.critics.outputs(stage, context, told.signal, told.size, mean=True)
        share = 1 / seen.batch.num_tokens
        errors = {slot: y * share for slot, y in self.errors(seen, stage, context, told).items()}
        return outer_products(seen.tape, self.learns, stage.index, errors)

    def errors(
        self, seen: Forward, stage: Stage, context: Tensor, told: Told
    ) -> dict[str, Float[Tensor, "batch time width"]]:
        """By slot what `outer`'s critics take for B·T ∂L/∂a, with a what comes out there; 0 for tokens left out."""
        del seen
        outputs = self.critics.outputs(stage, context, told.signal, told.size, mean=False)
        return {slot: keep_tokens(y, self.density) for slot, y in outputs.items()}

    def matrices(self, stage: Stage, summary: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ΔW by parameter name, from summaries that all ranks share."""
        structure = self.structure
        if structure is None:
            return dict(summary)
        return {
            name: structure.matrix(raw, stage.shapes[name])
            if len(stage.shapes[name]) == 2
            else raw.view(stage.shapes[name])
            for name, raw in summary.items()
        }

    @property
    def _pooled(self) -> bool:
        return self.target_kind == "pooled" and self.structure is not None
