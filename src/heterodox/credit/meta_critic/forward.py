"""Phase A's first half: the main forward pass without a graph, and the readout's exact local gradient."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.held import hold
from heterodox.core.protocols import Objective
from heterodox.core.types import Batch
from heterodox.credit.meta_critic.layout import EMBEDDINGS
from heterodox.credit.operation import RandomState, draws, random_state
from heterodox.credit.tape import Tape, record_layers
from heterodox.model import GPT


@dataclass
class Forward:
    """One forward pass: each stage's input and output, the tape, the readout's gradients, the error at h_N.

    `inputs` and `outputs` are by stage; the embeddings' input is the tokens. `before` holds the random state ahead of
    each stage if the model draws dropout masks, else nothing.
    """

    batch: Batch
    weights: Float[Tensor, " batch"]
    tape: Tape
    inputs: dict[int, Tensor]
    outputs: dict[int, Float[Tensor, "batch time width"]]
    before: dict[int, RandomState]
    logits: Float[Tensor, "batch time vocab"]
    losses: Float[Tensor, " batch"]
    loss: Float[Tensor, ""]
    error: Float[Tensor, "batch time width"]
    readout_grads: dict[str, Tensor]

    @property
    def last(self) -> Float[Tensor, "batch time width"]:
        """h_N."""
        return self.outputs[max(self.outputs)]


def run_stage(model: GPT, index: int, x: Tensor) -> Float[Tensor, "batch time width"]:
    """The embeddings of tokens, or a block and the stream's bottleneck behind it."""
    return model.embed(x) if index == EMBEDDINGS else model.subspace(model.blocks[index](x))


def main_forward(
    model: GPT,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    objective: Objective,
    operations: tuple[type[nn.Module], ...],
) -> Forward:
    """Run `model` on `batch`, keeping what critics and partial forwards need."""
    device = model.head.weight.device
    random = any(draws(module) for module in model.modules())
    inputs, outputs, before = {}, {}, {}
    with torch.no_grad(), record_layers(model, operations) as tape, model.autocast():
        x = batch.inputs
        for index in range(EMBEDDINGS, len(model.blocks)):
            if random:
                before[index] = random_state(device)
            inputs[index] = x
            x = outputs[index] = hold(run_stage(model, index, x))
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = model.readout(leaf.view_as(leaf))  # PyTorch's FLOP counter cannot follow a leaf into a module
        losses = objective.losses(logits, batch)
        loss = (losses * weights).mean()
        names = [name for name in sorted(model.readout_names) if model.get_parameter(name).requires_grad]
        error, *grads = torch.autograd.grad(loss, [leaf, *map(model.get_parameter, names)])
    return Forward(
        batch=batch,
        weights=weights,
        tape=tape,
        inputs=inputs,
        outputs=outputs,
        before=before,
        logits=logits.detach(),
        losses=losses.detach(),
        loss=loss.detach(),
        error=error,
        readout_grads=dict(zip(names, grads, strict=True)),
    )
