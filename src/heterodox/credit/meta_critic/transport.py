"""G on its way down along the attention of the blocks above.

    r_i = ρ G + Σ_{j>i} Q_j A_jᵀ P_j ρ G

An error at a token is also an error of the earlier tokens that it attended to, which a critic of single tokens cannot
know. A_jᵀ carries it there: the derivative of block j's attention by its values, which depends on the attention weights
of this very forward pass and on no weight matrix. P_j and Q_j, of the blocks above the lowest stage, are learned with
MLP_G.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from heterodox.core.rng import Streams
from heterodox.credit.tape import Record, Tape

GAIN = 0.1


class Transport(nn.Module):
    """P_j and Q_j of each of `blocks`, for a G of `target_width` in a model of `width`."""

    def __init__(self, blocks: Iterable[int], width: int, target_width: int, streams: Streams, like: Tensor) -> None:
        super().__init__()
        self.blocks = sorted(blocks, reverse=True)
        self.inward, self.outward = nn.ParameterDict(), nn.ParameterDict()
        for block in self.blocks:
            generator = streams.generator("rule", "transport", block)
            inward = torch.randn(width, target_width, generator=generator) / math.sqrt(target_width)
            outward = torch.randn(target_width, width, generator=generator) * (GAIN / math.sqrt(width))
            self.inward[str(block)] = nn.Parameter(inward.to(like))
            self.outward[str(block)] = nn.Parameter(outward.to(like))

    def forward(
        self, tape: Tape, error: Float[Tensor, "batch time global"], lowest: int
    ) -> dict[int, Float[Tensor, "batch time global"]]:
        """r_i by stage, down to stage `lowest`, from ρ G."""
        values = {record.name: record for record in tape.records}
        found = {max(self.blocks): error}
        for block in self.passed(lowest):
            inward = nn.functional.linear(error, self.inward[str(block)])
            back = _to_values(values[f"blocks.{block}.attn.v"], inward)
            found[block - 1] = found[block] + nn.functional.linear(back, self.outward[str(block)])
        return found

    def passed(self, lowest: int) -> list[int]:
        """The blocks that an error passes on its way down to stage `lowest`, from the top."""
        return [block for block in self.blocks if block > lowest]


def _to_values(record: Record, error: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
    """The error at the values of an attention whose output has this one; differentiable in the error."""
    mix = record.consumer
    assert mix is not None
    inputs = [x.detach() for x in mix.inputs]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only kernel with a second derivative
        inputs[record.slot].requires_grad_()
        output = mix.run(*inputs)
        return torch.autograd.grad(
            output, inputs[record.slot], error.to(output.dtype), create_graph=error.requires_grad
        )[0].to(error.dtype)
