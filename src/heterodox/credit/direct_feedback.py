"""Direct feedback alignment: every layer gets the output error through a fixed random matrix of its own.

    δ_l = (e B_l) ⊙ f'(a_l),   e = ∂L/∂logits

There is no backward pass through the blocks, and no graph: the forward pass keeps each linear layer's input, and once
the error is known all layers learn independently of each other. The output layer is exact.

Reference: Nøkland, "Direct feedback alignment provides learning in deep neural networks", NeurIPS 2016; for
transformers Launay, Poli, Boniface and Krzakala, "Direct feedback alignment scales to modern deep learning tasks and
architectures", NeurIPS 2020 (who backpropagate within a block; here nothing is backpropagated).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from heterodox.core import config
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.elsewhere import Elsewhere, backprop_elsewhere, feedback_manifest
from heterodox.credit.feedback import gaussian
from heterodox.credit.tape import Tape, record_layers


class DirectFeedback:
    """Each layer but the head has a fixed matrix from the logits' error to its own output."""

    class Config(config.Config):
        name: Literal["direct_feedback"] = "direct_feedback"
        feedback: Literal["gaussian"] = "gaussian"
        feedback_std: float = Field(0.02, gt=0, description="standard deviation of B's entries")
        elsewhere: Elsewhere = "local"

        def build(self, model: LanguageModel, streams: Streams) -> "DirectFeedback":
            vocab = model.head.out_features
            matrices = {
                name: gaussian(vocab, width, self.feedback_std, streams, name).to(model.head.weight)
                for name, width in output_widths(model).items()
                if self.elsewhere == "local" or isinstance(model.get_submodule(name), nn.Linear)
            }
            return DirectFeedback(matrices, elsewhere=self.elsewhere)

    def __init__(self, feedback: Mapping[str, Float[Tensor, "vocab width"]], *, elsewhere: Elsewhere = "local") -> None:
        self.feedback = dict(feedback)
        self.elsewhere = elsewhere

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        with torch.no_grad(), record_layers(model) as tape:
            logits = model(batch.inputs)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = objective.losses(leaf, batch)
            loss = (losses * weights).mean()
            (error,) = torch.autograd.grad(loss, leaf)
        with torch.no_grad():
            grads = direct_gradients(tape, error, self.feedback | {"head": None})
        cost = Cost(tokens=batch.num_tokens, flops=self._flops(model, batch))
        if self.elsewhere == "backprop":
            exact, extra = backprop_elsewhere(model, batch, weights, objective)
            grads |= exact
            cost += extra
        return Signal(grads, loss.detach(), losses.detach(), cost)

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        return feedback_manifest(model, self.elsewhere)

    def _flops(self, model: LanguageModel, batch: Batch) -> int:
        forward = model.forward_flops(*batch.inputs.shape)
        projections = 2 * batch.num_tokens * sum(matrix.numel() for matrix in self.feedback.values())
        return forward.total + forward.linear + forward.head + projections

    def state(self) -> Tree:
        return {"feedback": self.feedback}

    def load_state(self, tree: Tree) -> None:
        restore(self.feedback, tree.get("feedback", {}), "feedback matrix")


def output_widths(model: LanguageModel) -> dict[str, int]:
    """Width of the output of every layer with parameters but the head, by layer name."""
    widths: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.head:
            widths[name] = module.out_features
        elif isinstance(module, nn.LayerNorm):
            widths[name] = module.normalized_shape[-1]
        elif isinstance(module, nn.Embedding):
            widths[name] = module.embedding_dim
    return widths


def direct_gradients(
    tape: Tape,
    error: Float[Tensor, "*lead out"],
    feedback: Mapping[str, Float[Tensor, "out width"] | None],
) -> dict[str, Tensor]:
    """Each named layer's parameter gradients, from `error` at the output and the layer's `feedback`.

    `None` as a feedback hands the error over as it is (for the output layer). Layers that `feedback` does not name
    get none. Usable on the tape of any module; see `heterodox.credit.tape.record_layers`.
    """
    grads: dict[str, Tensor] = {}
    for record in tape.records:
        if record.name in feedback:
            matrix = feedback[record.name]
            delta = error if matrix is None else error @ matrix.to(error.dtype)
            grads.update(tape.gradients(record, delta))
    return grads
