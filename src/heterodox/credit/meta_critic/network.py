"""The small networks of the rule: MLP_G and the critics.

    mlp     y = ρ (A s + O φ(U c + V s + b))
    gated   y = ρ (A s + O (φ(U c + b) ⊙ V s))        φ = GELU

c is the context (what a layer knows of itself), s the signal (what it is told), ρ the signal's size. `mlp` with no A is
the source's two-layer critic on [c ‖ s]. A true error is linear in the output error, with a matrix that depends on the
activations: `gated` has just that form, and with h hidden units it contains the backward pass of an MLP of h units.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Form = Literal["gated", "mlp"]


class Network(nn.Module):
    """One of the forms above, of the dtype and on the device of `like`. `signal` 0 leaves y = ρ O φ(U c + b)."""

    def __init__(
        self,
        context: int,
        signal: int,
        hidden: int,
        outputs: int,
        *,
        form: Form,
        linear: bool,
        generator: torch.Generator,
        like: Tensor,
        output_gain: float = 0.1,
        identity: bool = False,
    ) -> None:
        super().__init__()

        def matrix(fan_out: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
            drawn = torch.randn(fan_out, fan_in, generator=generator) * (gain / math.sqrt(fan_in))
            return nn.Parameter(drawn.to(like))

        self.form: Form = form
        self.context = matrix(hidden, context)
        self.bias = nn.Parameter(torch.zeros(hidden).to(like))
        self.signal = matrix(hidden, signal) if signal else None
        self.output = matrix(outputs, hidden, output_gain)
        self.linear = matrix(outputs, signal, output_gain) if linear and signal else None
        if identity and self.linear is not None:
            nn.init.eye_(self.linear)

    def forward(
        self,
        context: Float[Tensor, "*#lead context"],
        signal: Float[Tensor, "*#lead signal"] | None = None,
        size: Float[Tensor, "*#lead 1"] | None = None,
        *,
        mean: bool = False,
    ) -> Tensor:
        """y for each token, or, with `mean`, its mean over all tokens, for which the output layer runs but once."""
        inner = F.linear(context, self.context, self.bias)
        if self.signal is None or signal is None:
            inner = F.gelu(inner)
        elif self.form == "gated":
            inner = F.gelu(inner) * F.linear(signal, self.signal)
        else:
            inner = F.gelu(inner + F.linear(signal, self.signal))
        if size is not None:
            inner = inner * size
        y = F.linear(_mean(inner) if mean else inner, self.output)
        if self.linear is None or signal is None:
            return y
        sized = signal if size is None else signal * size
        return y + F.linear(_mean(sized) if mean else sized, self.linear)

    def macs(self, rows: "Rows") -> int:
        """Multiply–adds of a call."""
        return sum(count * matrix.numel() for count, matrix in self._products(rows))

    def backward_macs(self, rows: "Rows", *, context: bool, signal: bool) -> int:
        """Multiply–adds of the way back to the matrices and, where they learn, to context and signal."""
        entering = [(context, self.context)] + [(signal, matrix) for matrix in (self.signal, self.linear)]
        passed = {id(matrix) for through, matrix in entering if not through}
        return sum((1 if id(matrix) in passed else 2) * n * matrix.numel() for n, matrix in self._products(rows))

    def _products(self, rows: "Rows") -> Iterator[tuple[int, Tensor]]:
        yield rows.contexts, self.context
        yield rows.outputs, self.output
        if self.signal is not None:
            yield rows.signals, self.signal
        if self.linear is not None:
            yield rows.linear, self.linear


class Rows(NamedTuple):
    """How many rows pass each matrix of a network in a call."""

    contexts: int
    signals: int
    outputs: int
    linear: int


def _mean(x: Float[Tensor, "*lead width"]) -> Float[Tensor, " width"]:
    return x.flatten(0, -2).mean(0)
