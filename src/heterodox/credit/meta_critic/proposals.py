"""The networks of the rule: MLP_G, the fixed M_i, and the critics, each of one stage or shared by all blocks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.comm import Comm
from heterodox.core.rng import Streams
from heterodox.credit.meta_critic.forward import (
    Forward,
    Sight,
    TargetKind,
    draw_projection,
    normal,
    pool,
    spread,
    target_network,
)
from heterodox.credit.meta_critic.networks import (
    EMBEDDINGS,
    Form,
    Network,
    Stage,
    Structure,
    Transport,
    critic_of,
    largest,
    stage_of,
    units_kept,
)
from heterodox.credit.tape import Record, Tape

ID_WIDTH = 16


class Critics(nn.Module):
    """MLP_G, M_i and the critics of `stages`. Shared critics see a learned id of the block besides."""

    ids: nn.Parameter | None
    transport: Transport | None

    def __init__(
        self,
        stages: Sequence[Stage],
        streams: Streams,
        *,
        like: Tensor,
        width: int,
        target: TargetKind,
        target_width: int,
        target_hidden: int,
        local_width: int,
        local_density: float,
        form: Form,
        hidden: int,
        linear: bool,
        shared: bool,
        begins_as_stream: bool = False,
        transport: Transport | None = None,
    ) -> None:
        super().__init__()
        generator = streams.generator("rule", "target")
        self.transport = transport
        self.target = target_network(target, width, target_hidden, target_width, generator, like)
        self.parts: dict[int, dict[str, dict[str, int]]] = {}
        outputs: dict[str, int] = {}
        for stage in stages:
            parts: dict[str, dict[str, int]] = {}
            for slot, size in stage.slots.items():
                parts.setdefault(critic_of(slot, shared=shared), {})[slot] = size
            self.parts[stage.index] = parts
            outputs |= {key: sum(slots.values()) for key, slots in parts.items()}
            place = "blocks" if shared and stage.index != EMBEDDINGS else stage.index  # one critic, one M
            drawn = draw_projection(
                local_width, target_width, local_density, streams.generator("rule", "projection", place)
            )
            self.register_buffer(f"projection_{stage.key}", drawn.to(like))
        blocks = max((stage.index for stage in stages), default=EMBEDDINGS) + 1
        self.ids = None
        if shared:
            self.ids = nn.Parameter(torch.randn(blocks, ID_WIDTH, generator=streams.generator("rule", "ids")).to(like))
        self.nets = nn.ModuleDict()
        for key, size in outputs.items():
            self.nets[key] = Network(
                width + (ID_WIDTH if shared and key != "embeddings" else 0),
                local_width,
                hidden,
                size,
                form=form,
                linear=linear,
                generator=streams.generator("rule", "critic", key),
                like=like,
            )

        if begins_as_stream:
            for stage in stages:
                self._pass_on(stage)

    @torch.no_grad()
    def _pass_on(self, stage: Stage) -> None:
        """Let the linear paths to slots on the stream begin as M_iᵀ, so that they say what G is.

        A tall M_i has columns of square length rows/columns, which M_iᵀ M_i would multiply G by.
        """
        projection = self.get_buffer(f"projection_{stage.key}")
        back = projection.T / max(1.0, projection.shape[0] / projection.shape[1])
        for key, slots in self.parts[stage.index].items():
            linear = self.net(key).linear
            assert linear is not None
            for slot, rows in zip(slots, linear.split(list(slots.values())), strict=True):
                if slot in stage.on_stream:
                    rows.copy_(back)

    def net(self, key: str) -> Network:
        """The critic of this key."""
        net = self.nets[key]
        assert isinstance(net, Network)
        return net

    def local(self, stage: Stage, target: Float[Tensor, "*lead global"]) -> Float[Tensor, "*lead local"]:
        """LTF_i = M_i G."""
        return nn.functional.linear(target, self.get_buffer(f"projection_{stage.key}"))

    def outputs(
        self, stage: Stage, context: Tensor, target: Tensor, size: Tensor | None, *, mean: bool
    ) -> dict[str, Tensor]:
        """What the critics of a stage say in each of its slots: per token, or the mean over tokens."""
        local = self.local(stage, target)
        found: dict[str, Tensor] = {}
        for key, slots in self.parts[stage.index].items():
            y = self.net(key)(self._with_id(stage, key, context), local, size, mean=mean)
            found |= dict(zip(slots, y.split(list(slots.values()), dim=-1), strict=True))
        return found

    def _with_id(self, stage: Stage, key: str, context: Tensor) -> Tensor:
        if self.ids is None or key == "embeddings":
            return context
        return torch.cat([context, self.ids[stage.index].expand(*context.shape[:-1], -1)], dim=-1)

    def learning_for(self, stages: Iterable[Stage]) -> dict[str, nn.Parameter]:
        """The parameters that proposals for these stages depend on, by name."""
        used = {f"nets.{key}." for stage in stages for key in self.parts[stage.index]}
        starts = ("target.", "transport.", "ids", *used)
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith(starts)}


# The structure `outer`: ΔW = Σ_t δ_t x_tᵀ, with δ_t by the critic for each token and x_t the matrix's own input.
#
# A critic of this kind has as many outputs as a layer is wide, not as it has weights. δ enters at a layer's point: its
# own output (`point: output`), or, as in direct feedback, behind the branch's function that consumes it (`point:
# branch`): fc behind its GELU, q, k and v behind attention, by that function's own derivative and no weight. Biases,
# gains and embeddings learn from δ as they do from a true error.


def outer_products(
    tape: Tape, learns: Callable[[Record], bool], stage: int, errors: Mapping[str, Float[Tensor, "batch time width"]]
) -> dict[str, Tensor]:
    """ΔW by parameter name for the layers of a stage, differentiable in the errors at their points."""
    found: dict[str, Tensor] = {}
    for record in tape.records:
        if learns(record) and stage_of(record.name) == stage:
            found.update(tape.gradients(record, errors[record.point]))
    return found


def keep_tokens(error: Float[Tensor, "batch time width"], density: float) -> Float[Tensor, "batch time width"]:
    """The largest errors of each example, `density` of them, the others 0: each is a rank-one term of ΔW."""
    keep = units_kept(density, error.shape[1])
    if keep == error.shape[1]:
        return error
    return error * largest(error.detach().norm(dim=-1), keep).to(error.dtype)[..., None]


# From what critics say to proposals: first a summary that may be averaged over ranks, then ΔW.
#
# For `outer` the summary is ΔW itself, a sum over tokens. For the other structures it is the mean of the critic's
# outputs, from which ΔW is made when all ranks agree on it: mask and product are not linear.


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
