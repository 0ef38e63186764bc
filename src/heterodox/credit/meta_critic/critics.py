"""The networks of the rule: MLP_G, the fixed M_i, and the critics, each of one stage or shared by all blocks."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.rng import Streams
from heterodox.credit.meta_critic.layout import EMBEDDINGS, Stage, critic_of
from heterodox.credit.meta_critic.network import Form, Network
from heterodox.credit.meta_critic.target import TargetKind, draw_projection, target_network
from heterodox.credit.meta_critic.transport import Transport

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
