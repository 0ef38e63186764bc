"""Feedback alignment: errors travel back through fixed random matrices instead of the transposed weights."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.errors import CheckpointError
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.base import Elsewhere, elsewhere_refusals, feedback_manifest, through_feedback
from heterodox.credit.equilibrium.shared import block_parameters, product_flops
from heterodox.credit.feedback import FeedbackOptions, linear_layers
from heterodox.model.dynamics import Linearisation, Matmuls, per_example

# GrAPE, gradient-aligned projected error: feedback matrices are turned towards the weights that they stand in for.
#
#     v_p ~ N(0, I),   u_p = J v_p by forward mode (J = W for a linear layer),   p = 1 … P
#     B ← B + r ‖B‖² ∂c/∂B,   then to its norm
#
#     cosine: jacobian   c = cos(B, Ĵ),    Ĵ = mean_p u_p v_pᵀ, an unbiased estimate of J of rank P
#                        ‖B‖ ∂c/∂B = Ĵ/‖Ĵ‖ − c B/‖B‖
#     cosine: probes     c = cos(BV, JV),  V = [v_1 … v_P], which both answer
#                        ‖BV‖ ∂c/∂B = (JV/‖JV‖ − c BV/‖BV‖) Vᵀ
#
# Every step, for every linear layer. The layer is only ever run forwards; no weight is transposed and no error touches
# W. `jacobian` is the literal form. Ĵ is noisy: E‖Ĵ‖² = ‖J‖² (1 + (fan_in + 1)/P), and the noise stays however well B
# has aligned. In `probes` (ours, and the default) B answers the same probes, so that the noise is common to both and
# vanishes as they align; it costs one more product per probe.
#
# r = `rate` · P/(P + fan_in + 1), a share of the step that reduces the expected squared error of B most. The matrix
# keeps its norm (`norm: keep`), or takes the one that the probes show W to have, ‖W‖² = E‖Wv‖² (`norm: match`).
#
# Reference: Caillon, Fagnou, Delattre and Allauzen, "Scaling direct feedback learning with Jacobian alignment
# guarantees", ICLR 2026. The rank-1 estimates by forward mode and the cosine are theirs, for direct feedback and with a
# step of backpropagation now and then; here each layer's own matrix is aligned, and nothing is ever backpropagated.


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


class FeedbackAlignment:
    """Feedback alignment: errors travel back through fixed random matrices instead of the transposed weights.

        δ_l = B_{l+1}ᵀ δ_{l+1} ⊙ f'(a_l)   in place of   δ_l = W_{l+1}ᵀ δ_{l+1} ⊙ f'(a_l)

    Nothing else changes: norms, attention and residual additions pass the error on by their own exact derivative. The
    forward weights come to align with the feedback, so that Bᵀδ turns into a descent direction. With `grape` the
    feedback comes to align with the weights, too, by forward-mode probes (credit/feedback_alignment.py).

    Reference: Lillicrap, Cownden, Tweed and Akerman, "Random synaptic feedback weights support error backpropagation
    for deep learning", Nature Communications 2016.

    Every linear layer sends its error down through its own matrix B, of the shape of W.
    """

    class Config(FeedbackOptions):
        name: Literal["feedback_alignment"] = "feedback_alignment"
        grape: Grape.Config | None = Field(
            None, description="align the matrices with the weights; `{}`: at the defaults"
        )
        elsewhere: Elsewhere = "local"

        @model_validator(mode="after")
        def _grape_leaves_it(self) -> "FeedbackAlignment.Config":
            """What GrAPE would undo at its first step is refused."""
            if self.grape is None:
                return self
            reasons = []
            if self.feedback == "sparse":
                reasons.append("feedback is 'sparse', but grape fills every entry at its first step; leave one out")
            if self.sparse_k is not None:
                reasons.append(f"sparse_k is {self.sparse_k}, but grape makes rows dense; leave one out")
            if self.grape.norm == "match" and self.feedback_std is not None:
                reasons.append("feedback_std has no effect where grape.norm is match; leave it out, or keep the norm")
            if self.grape.norm == "match" and self.feedback == "orthogonal_he":
                reasons.append(
                    "the gain of orthogonal_he has no effect where grape.norm is match, which matches the norm to the "
                    "weights'; use orthogonal, or keep the norm"
                )
            if reasons:
                raise ValueError("; ".join(reasons))
            return self

        def refusals(self, recipe: config.Config) -> list[str]:
            return super().refusals(recipe) + elsewhere_refusals(self.name, self.elsewhere, recipe)

        def build(self, model: LanguageModel, streams: Streams) -> "FeedbackAlignment":
            grape = None if self.grape is None else self.grape.build(streams)
            return FeedbackAlignment(self.draw_all(model, streams), grape=grape, elsewhere=self.elsewhere)

    def __init__(
        self,
        feedback: Mapping[str, Float[Tensor, "fan_out fan_in"]],
        *,
        grape: Grape | None = None,
        elsewhere: Elsewhere = "local",
    ) -> None:
        self.feedback = dict(feedback)
        self.grape = grape
        self.elsewhere: Elsewhere = elsewhere

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        probing = self.grape.align(linear_layers(model), self._aligned()) if self.grape else 0
        signal = through_feedback(model, batch, weights, objective, self.feedback, self.elsewhere)
        signal.cost += Cost(flops=probing)
        return signal

    def _aligned(self) -> dict[str, Tensor]:
        """Return the matrices that GrAPE turns: those of the hidden layers, and the output layer's if it is told to."""
        assert self.grape is not None
        return {name: matrix for name, matrix in self.feedback.items() if name != "head" or self.grape.head}

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return feedback_manifest(model, self.elsewhere)

    def state(self) -> Tree:
        return {"feedback": self.feedback} | ({"grape": self.grape.state()} if self.grape else {})

    def load_state(self, tree: Tree) -> None:
        restore(self.feedback, tree.get("feedback", {}), "feedback matrix")
        if self.grape:
            self.grape.load_state(tree.get("grape", {}))


# A penalty on the Jacobian of the force, which keeps a long run on the contractive side.
#
#     R = γ · E ‖J_Gᵀ u‖²/‖u‖²
#
# G is what drives the state, and u a vector per example: drawn from N(0, 1), which makes R = γ·‖J_G‖²_F/d (Hutchinson's
# estimator), and then multiplied by J_Gᵀ a few times, which turns it towards the eigenvectors of the largest
# eigenvalues. The former is the penalty of Bai, Koltun and Kolter, "Stabilizing equilibrium models by Jacobian
# regularization", ICML 2021; but contraction is lost in single directions that a norm over all of them hardly sees, so
# the latter is the default. z* and u count as given, so that only the blocks' parameters feel it.


class JacobianPenalty:
    """Finds a direction per step and differentiates the penalty. One draw serves the whole batch, on every rank."""

    def __init__(self, strength: float, streams: Streams, powers: int = 4) -> None:
        self.strength = strength
        self.streams = streams
        self.powers = powers
        self.draws = 0

    def aim(self, linear: Linearisation) -> None:
        """Point `linear` at the next u; nothing without a penalty."""
        if not self.strength:
            return
        self.draws += 1
        generator = self.streams.generator("rule", "jacobian", self.draws)
        u = torch.randn(linear.z.shape[2:], generator=generator).to(linear.z).expand_as(linear.z)
        for _ in range(self.powers):
            u = linear.vjp(u)
            u = u / per_example(u, u).sqrt().clamp_min(torch.finfo(u.dtype).tiny)
        linear.aim(u)

    def gradients(
        self, model: LanguageModel, linear: Linearisation, weights: Float[Tensor, " batch"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Its gradient for the blocks' parameters, and ‖J_Gᵀu‖/‖u‖ for the log; empty without a penalty."""
        if not self.strength:
            return {}, {}
        with torch.enable_grad():
            pulled, u = linear.pulled, linear.probe.detach()
            squares = (per_example(pulled, pulled) / per_example(u, u)).flatten()
            penalty = self.strength * (squares * weights.to(squares)).mean()
        parameters = block_parameters(model)
        grads = torch.autograd.grad(penalty, list(parameters.values()), retain_graph=True, allow_unused=True)
        found = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
        return found, {"jacobian_growth": squares.detach().mean().sqrt()}

    def flops(self, cost: Matmuls) -> int:
        """FLOPs of the powers and of `gradients`: back through J_Gᵀu, and from there through what it uses of G."""
        inner = 3 * (cost.linear - cost.leaving) - cost.entering
        once = cost.linear + inner + 5 * cost.attention
        return self.powers * product_flops(cost) + once if self.strength else 0

    def remarks(self) -> list[str]:
        """That the blocks also learn from an exact gradient, where they do."""
        if not self.strength:
            return []
        return [
            f"with credit.jacobian_penalty {self.strength:g} the blocks also get the penalty's exact gradient, by "
            "double backpropagation through one evaluation of the force"
        ]

    def state(self) -> Tree:
        return {"draws": self.draws} if self.strength else {}

    def load_state(self, tree: Tree) -> None:
        if not self.strength:
            return
        if "draws" not in tree:
            raise CheckpointError("the checkpoint lacks the number of Jacobian probes: it belongs to another recipe")
        self.draws = tree["draws"]


def penalty_refusals(credit: Any) -> list[str]:
    """A refusal of powers for the probe of a penalty that is off."""
    if credit.jacobian_penalty or credit.jacobian_powers == type(credit).model_fields["jacobian_powers"].default:
        return []
    return [
        f"credit.jacobian_powers is {credit.jacobian_powers}, but they aim the probe of a penalty, and "
        "credit.jacobian_penalty is 0; make it positive, such as 0.1, or leave out the powers"
    ]
