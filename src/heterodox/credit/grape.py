"""GrAPE, gradient-aligned projected error: feedback matrices are turned towards the weights that they stand in for.

    v_p ~ N(0, I),   u_p = J v_p by forward mode (J = W for a linear layer),   p = 1 … P
    B ← B + r ‖B‖² ∂c/∂B,   then to its norm

    cosine: jacobian   c = cos(B, Ĵ),    Ĵ = mean_p u_p v_pᵀ, an unbiased estimate of J of rank P
                       ‖B‖ ∂c/∂B = Ĵ/‖Ĵ‖ − c B/‖B‖
    cosine: probes     c = cos(BV, JV),  V = [v_1 … v_P], which both answer
                       ‖BV‖ ∂c/∂B = (JV/‖JV‖ − c BV/‖BV‖) Vᵀ

Every step, for every linear layer. The layer is only ever run forwards; no weight is transposed and no error touches W.
`jacobian` is the literal form. Ĵ is noisy: E‖Ĵ‖² = ‖J‖² (1 + (fan_in + 1)/P), and the noise stays however well B has
aligned. In `probes` (ours, and the default) B answers the same probes, so that the noise is common to both and vanishes
as they align; it costs one more product per probe.

r = `rate` · P/(P + fan_in + 1), a share of the step that reduces the expected squared error of B most. The matrix keeps
its norm (`norm: keep`), or takes the one that the probes show W to have, ‖W‖² = E‖Wv‖² (`norm: match`).

Reference: Caillon, Fagnou, Delattre and Allauzen, "Scaling direct feedback learning with Jacobian alignment
guarantees", ICLR 2026. The rank-1 estimates by forward mode and the cosine are theirs, for direct feedback and with a
step of backpropagation now and then; here each layer's own matrix is aligned, and nothing is ever backpropagated.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from heterodox.core import config
from heterodox.core.errors import CheckpointError
from heterodox.core.rng import Streams
from heterodox.core.state import Tree

Cosine = Literal["probes", "jacobian"]
Norm = Literal["match", "keep"]


class Grape:
    """Aligns feedback matrices with linear layers by forward-mode probes; remembers how often it has."""

    class Config(config.Config):
        probes: int = Field(32, ge=1, description="random directions a step, shared by layers of one fan-in")
        rate: float = Field(0.5, gt=0, lt=2, description="step, as a share of the best one for so many probes")
        cosine: Cosine = Field("probes", description="which cosine rises; jacobian: to the letter, noisier")
        head: bool = Field(False, description="align the output layer's matrix, too; the source leaves it as drawn")
        norm: Norm = Field("match", description="of the matrices: as the probes show the weights' to be; or as drawn")

        def build(self, streams: Streams) -> "Grape":
            return Grape(
                streams, probes=self.probes, rate=self.rate, cosine=self.cosine, norm=self.norm, head=self.head
            )

    def __init__(
        self,
        streams: Streams,
        *,
        probes: int = 32,
        rate: float = 0.5,
        cosine: Cosine = "probes",
        norm: Norm = "match",
        head: bool = False,
    ) -> None:
        self.streams = streams
        self.probes = probes
        self.rate = rate
        self.cosine: Cosine = cosine
        self.norm: Norm = norm
        self.head = head
        self.step = 0

    @torch.no_grad()
    def align(self, layers: Mapping[str, nn.Linear], feedback: Mapping[str, Float[Tensor, "fan_out fan_in"]]) -> int:
        """Turn each matrix towards its layer, in place; returns the FLOPs of it."""
        drawn: dict[int, Tensor] = {}
        for name, matrix in feedback.items():
            fan_in = matrix.shape[1]
            if fan_in not in drawn:
                drawn[fan_in] = self._draw(fan_in).to(matrix)
            probes = drawn[fan_in]
            answers = tangent(layers[name], probes)
            length = matrix.norm()
            gradient = cosine_gradient(matrix, probes, answers, self.cosine)
            rate = self.rate * self.probes / (self.probes + fan_in + 1)
            matrix.addcmul_(gradient, length.square(), value=rate)
            target = norm_estimate(answers) if self.norm == "match" else length
            now = matrix.norm()
            matrix.mul_(torch.where(now > 0, torch.where(target > 0, target, length) / now, 1.0))
        self.step += 1
        products = {"probes": 3, "jacobian": 2}[self.cosine]
        return 2 * products * self.probes * sum(matrix.numel() for matrix in feedback.values())

    def _draw(self, fan_in: int) -> Float[Tensor, "probes fan_in"]:
        """This step's probes: the same on every rank, and again after a resume."""
        generator = self.streams.generator("rule", "grape", self.step, fan_in)
        return torch.randn(self.probes, fan_in, generator=generator)

    def state(self) -> Tree:
        return {"step": self.step}

    def load_state(self, tree: Tree) -> None:
        if "step" not in tree:
            raise CheckpointError("the checkpoint lacks the step of GrAPE's probes: it belongs to another recipe")
        self.step = tree["step"]


def tangent(layer: nn.Linear, probes: Float[Tensor, "*lead fan_in"]) -> Float[Tensor, "*lead fan_out"]:
    """The layer's derivative along `probes`: what forward mode (`torch.func.jvp`) gives at any input."""
    return F.linear(probes, layer.weight)


def norm_estimate(answers: Float[Tensor, "probes fan_out"]) -> Float[Tensor, ""]:
    """The Frobenius norm of the matrix that gave these answers to normal probes."""
    return answers.norm() / math.sqrt(len(answers))


def cosine_gradient(
    feedback: Float[Tensor, "fan_out fan_in"],
    probes: Float[Tensor, "probes fan_in"],
    answers: Float[Tensor, "probes fan_out"],
    cosine: Cosine,
) -> Float[Tensor, "fan_out fan_in"]:
    """∂c/∂B for either cosine c; see the module. Zero where all answers are, and where B is."""
    if cosine == "probes":
        return _of_cosine(F.linear(probes, feedback), answers).T @ probes
    return _of_cosine(feedback, answers.T @ probes)


def _of_cosine(a: Tensor, b: Tensor) -> Tensor:
    """The gradient of cos(a, b) by a; zero where either is."""
    length, other = a.norm(), b.norm()
    defined = (length > 0) & (other > 0)
    length, other = (torch.where(defined, x, 1.0) for x in (length, other))
    direction = b / other
    cosine = (a * direction).sum() / length
    return torch.where(defined, (direction - a * (cosine / length)) / length, 0.0)
