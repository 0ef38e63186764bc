"""What a step of the rule costs: exactly what PyTorch's counter finds, summed by hand."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from heterodox.core.protocols import ForwardFlops
from heterodox.credit.meta_critic.networks import EMBEDDINGS, Rows, Stage
from heterodox.credit.meta_critic.proposals import Proposals
from heterodox.model import GPT

ORDER = ("ln1", "attn.q", "attn.k", "attn.v", "attn.mix", "attn.o", "attn_gate", "ln2", "mlp.fc", "mlp.proj")
"""The layers of a block as the forward pass comes to them; q, k and v see the same."""
PLACE = {name: place for place, name in enumerate(ORDER)} | dict.fromkeys(("attn.q", "attn.k", "attn.v"), 1)


@dataclass
class StepFlops:
    """FLOPs of the parts of a step over `batch` windows of `time` tokens."""

    model: GPT
    proposals: Proposals
    branch: bool
    batch: int
    time: int
    activations: bool = False

    def __post_init__(self) -> None:
        self.tokens = self.batch * self.time
        self.forward: ForwardFlops = self.model.forward_flops(self.batch, self.time)
        num = len(self.model.blocks)
        self.linear, self.attention, self.fixed, self.lookup = (
            part // num
            for part in (self.forward.linear, self.forward.attention, self.forward.fixed, self.forward.lookup)
        )
        self._block = self.linear + self.attention + self.fixed + self.lookup
        one = self.proposals.target_kind == "pooled"
        self.of_target = Rows(*[1 if one else self.tokens] * 4)

    def main(self) -> int:
        """The main forward pass and the readout's gradients."""
        return self.forward.total + 2 * self.forward.head

    def phase_b(self, stages: Iterable[Stage], *, reuse: bool) -> int:
        """All proposals, and G unless it is reused."""
        stages = list(stages)
        target = 0 if reuse else 2 * self.proposals.critics.target.macs(self.of_target)
        target += self._transport(stages)[0]
        return target + sum(self._critics(stage) + self._proposal(stage) for stage in stages)

    def phase_a(self, stages: Iterable[Stage], *, partial: bool) -> int:
        """One meta-step on these stages, by partial forwards or by regression."""
        target = self.proposals.critics.target
        total = 2 * (target.macs(self.of_target) + target.backward_macs(self.of_target, context=False, signal=False))
        if not partial:
            total += self.forward.with_backward
        moves, stages = partial and self.activations, list(stages)
        total += sum(self._transport(stages))
        for stage in stages:
            total += self._critics(stage) + self._critics_back(stage)
            if not moves:
                total += self._proposal(stage) + self._proposal_back(stage)
            if partial:
                total += self._partial(stage, moves=moves)
        return total

    def gains(self, stages: Sequence[Stage]) -> int:
        """What proposals would do to the loss, one by one and together: forward passes alone."""
        num = len(self.model.blocks)
        passed = sum(num - max(stage.index, 0) for stage in stages)
        return self.forward.total + passed * self._block + len(stages) * self.forward.head

    def _transport(self, stages: list[Stage]) -> tuple[int, int]:
        """G on its way down to these stages, and the way back to P_j, Q_j and G."""
        transport = self.proposals.critics.transport
        if transport is None:
            return 0, 0
        passed = transport.passed(min(stage.index for stage in stages))
        products = (
            2 * self.tokens * sum(transport.inward[str(j)].numel() + transport.outward[str(j)].numel() for j in passed)
        )
        return products + len(passed) * 3 * self.attention // 2, 2 * products + len(passed) * self.attention // 2

    def _rows(self) -> Rows:
        """Rows in a stage's critics."""
        outer, pooled = self.proposals.structure is None, self.proposals.target_kind == "pooled"
        if not outer:
            many = 1 if pooled else self.tokens
            return Rows(many, many, 1, 1)
        return Rows(self.tokens, 1 if pooled else self.tokens, self.tokens, self.batch if pooled else self.tokens)

    def _local(self, stage: Stage) -> int:
        projection = self.proposals.critics.get_buffer(f"projection_{stage.key}")
        return 2 * self.of_target.outputs * projection.numel()

    def _critics(self, stage: Stage) -> int:
        critics = self.proposals.critics
        return self._local(stage) + 2 * sum(critics.net(key).macs(self._rows()) for key in critics.parts[stage.index])

    def _critics_back(self, stage: Stage) -> int:
        critics = self.proposals.critics
        return self._local(stage) + 2 * sum(
            critics.net(key).backward_macs(
                self._rows(), context=critics.ids is not None and key != "embeddings", signal=True
            )
            for key in critics.parts[stage.index]
        )

    def _products(self, stage: Stage) -> int:
        """As many as it takes to make the gradients of all matrices that learn, from errors and inputs."""
        if stage.index == EMBEDDINGS:
            return 0
        return 2 * self.tokens * sum(shape[0] * shape[1] for shape in stage.shapes.values() if len(shape) == 2)

    def _proposal(self, stage: Stage) -> int:
        structure = self.proposals.structure
        if structure is not None:
            return 2 * sum(structure.macs(shape) for shape in stage.shapes.values() if len(shape) == 2)
        learning = _learning(stage)
        if self.branch:
            again = 3 * self.attention if learning & {"attn.q", "attn.k", "attn.v"} else 0
        else:
            again = 3 * self.attention // 2 if "attn.mix" in learning else 0
        return self._products(stage) + again

    def _proposal_back(self, stage: Stage) -> int:
        if self.proposals.structure is not None:
            return 2 * self._proposal(stage)
        learning = _learning(stage)
        if self.branch:
            return self._products(stage) + self._mixing(learning)
        return self._products(stage) + (self.attention // 2 if "attn.mix" in learning else 0)

    def _mixing(self, learning: set[str]) -> int:
        """Attention's products on the way back to those of q, k and v that learn."""
        queries, keys, values = (f"attn.{name}" in learning for name in "qkv")
        scores = queries or keys or "attn.mix" in learning
        return (scores + queries + keys + values) * self.attention // 2

    def _partial(self, stage: Stage, *, moves: bool) -> int:
        """A partial forward pass and the way back to the stage's hypothetical weights, or to its moves."""
        above = len(self.model.blocks) - 1 - stage.index
        block = self._block
        suffix = above * (block + self.linear + 2 * self.attention + self.fixed) + 2 * self.forward.head
        if stage.index == EMBEDDINGS:
            return suffix
        return suffix + block + self.fixed + (self._back_to_moves(stage) if moves else self._back_to_weights(stage))

    def _back_to_weights(self, stage: Stage) -> int:
        learning = _learning(stage)
        mixing = 2 * self.attention if "ln1" in learning else self._mixing(learning)
        return self._products(stage) + self._inputs(stage, _lowest(learning)) + mixing

    def _back_to_moves(self, stage: Stage) -> int:
        learning = _learning(stage)
        if self.branch:
            learning = {"attn.mix" if PLACE.get(name) == PLACE["attn.q"] else name for name in learning}
        lowest = _lowest(learning)
        if lowest >= PLACE["attn.mix"]:
            return self._inputs(stage, lowest)
        return self._inputs(stage, lowest) + (2 * self.attention if "ln1" in learning else self._mixing(learning))

    def _inputs(self, stage: Stage, lowest: int) -> int:
        """The way back through the linear layers behind this place."""
        layers = self.model.blocks[stage.index].named_modules()
        weights = [m.weight.numel() for name, m in layers if isinstance(m, nn.Linear) and PLACE[name] > lowest]
        return 2 * self.tokens * sum(weights)


def _lowest(layers: set[str]) -> int:
    """The first place of these layers; that of a layer unknown to `ORDER` is behind all."""
    return min(PLACE.get(name, len(ORDER)) for name in layers)


def _learning(stage: Stage) -> set[str]:
    """The layers that learn in a stage, by their names within the block."""
    return {name.split(".", 2)[2].rsplit(".", 1)[0] for name in stage.shapes if stage.index != EMBEDDINGS}
