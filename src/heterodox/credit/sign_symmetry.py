"""Sign symmetry: errors travel back through the signs of the forward weights, not through their sizes."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Origin, Signal
from heterodox.credit.base import Elsewhere, elsewhere_refusals, feedback_manifest, through_feedback
from heterodox.credit.feedback import NATURAL_STD, draw_feedback, linear_layers


class SignSymmetry:
    """Sign symmetry: errors travel back through the signs of the forward weights, not through their sizes.

        δ_l = (m ⊙ sign(W_{l+1}))ᵀ δ_{l+1} ⊙ f'(a_l)   in place of   δ_l = W_{l+1}ᵀ δ_{l+1} ⊙ f'(a_l)

        magnitude: mean     m = the mean |W| of the layer's weights that are not 0, at every step
        magnitude: fixed    m = feedback_std
        magnitude: random   M_ij = |N(0, feedback_std²)|, drawn once

    A way back that knows each synapse's sign needs far less transport than one that knows its weight. Where all |W| of
    each layer are equal, `mean` is backpropagation. A weight of exactly zero sends nothing back, and does not count for
    the mean: where an update masks most weights, the others keep their size.

    References: Liao, Leibo and Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016; Xiao, Chen,
    Liao and Poggio, "Biologically-plausible learning algorithms can scale to large datasets", ICLR 2019. `mean` and
    `fixed` are their uniform magnitudes, `random` their random ones.

    Every linear layer sends its error down through the signs of its own weights.
    """

    class Config(config.Config):
        name: Literal["sign_symmetry"] = "sign_symmetry"
        magnitude: Literal["mean", "fixed", "random"] = Field(
            "mean", description="of the way back: the layer's mean; `feedback_std`; or drawn once for each weight"
        )
        feedback_std: float | None = Field(
            None, gt=0, description="fixed magnitude, or root mean square of random ones; null: 0.02"
        )
        elsewhere: Elsewhere = "local"

        @model_validator(mode="after")
        def _mean_has_its_own_scale(self) -> "SignSymmetry.Config":
            if self.feedback_std is not None and self.magnitude == "mean":
                raise ValueError("feedback_std is for magnitude fixed or random; mean takes the weights' own")
            return self

        def refusals(self, recipe: config.Config) -> list[str]:
            return super().refusals(recipe) + elsewhere_refusals(self.name, self.elsewhere, recipe)

        def build(self, model: LanguageModel, streams: Streams) -> "SignSymmetry":
            std = NATURAL_STD if self.feedback_std is None else self.feedback_std
            if self.magnitude == "mean":
                return SignSymmetry(elsewhere=self.elsewhere)
            if self.magnitude == "fixed":
                return SignSymmetry(std, elsewhere=self.elsewhere)
            magnitudes = {}
            for name, layer in linear_layers(model).items():
                generator = streams.generator("rule", name)
                drawn = draw_feedback("gaussian", layer.out_features, layer.in_features, generator, std=std)
                magnitudes[name] = drawn.abs().to(layer.weight)
            return SignSymmetry(magnitudes, elsewhere=self.elsewhere)

    def __init__(
        self,
        magnitudes: Mapping[str, Float[Tensor, "fan_out fan_in"]] | float | int | None = None,
        *,
        elsewhere: Elsewhere = "local",
    ) -> None:
        """`magnitudes`: of each weight's way back, by layer; one for all; or None, a layer's mean non-zero |W|."""
        self.uniform = float(magnitudes) if isinstance(magnitudes, (float, int)) else None
        self.magnitudes = dict(magnitudes) if isinstance(magnitudes, Mapping) else {}
        self.elsewhere: Elsewhere = elsewhere

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        return through_feedback(model, batch, weights, objective, self.feedback(model), self.elsewhere)

    @torch.no_grad()
    def feedback(self, model: LanguageModel) -> dict[str, Float[Tensor, "fan_out fan_in"]]:
        """The matrices that the present weights make."""
        layers = linear_layers(model)
        weights = [layer.weight for layer in layers.values()]
        signs = torch._foreach_sign(weights)
        if self.uniform is not None:
            torch._foreach_mul_(signs, self.uniform)
        elif self.magnitudes:
            torch._foreach_mul_(signs, [self.magnitudes[name] for name in layers])
        else:
            sums = torch._foreach_norm(weights, 1)
            counts = [torch.count_nonzero(weight).clamp(min=1).to(weight.dtype) for weight in weights]
            torch._foreach_mul_(signs, torch._foreach_div(sums, counts))
        return dict(zip(layers, signs, strict=True))

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return feedback_manifest(model, self.elsewhere)

    def state(self) -> Tree:
        return {"magnitudes": self.magnitudes} if self.magnitudes else {}

    def load_state(self, tree: Tree) -> None:
        restore(self.magnitudes, tree.get("magnitudes", {}), "feedback magnitudes")
