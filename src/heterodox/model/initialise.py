"""How a GPT's weights and frozen bases are drawn."""

import math

import torch
from torch import nn

from heterodox.core.rng import Streams
from heterodox.model.attention import SigmoidMix
from heterodox.model.bottleneck import DirectionalVQ, FrozenSubspace


@torch.no_grad()
def initialise(model: nn.Module, streams: Streams, branches: int) -> None:
    """GPT-2's initialisation: normal with standard deviation 0.02, over √branches where a branch ends.

    Each parameter draws from a stream of its own name, so that a switch which adds one leaves all others as they were.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = 0.02 / math.sqrt(branches) if name.endswith(("attn.o.weight", "mlp.proj.weight")) else 0.02
        parameter.copy_(torch.randn(parameter.shape, generator=streams.generator("init", name)) * std)
    for name, module in model.named_modules():
        if isinstance(module, SigmoidMix):
            module.reset_parameters()
        elif isinstance(module, (DirectionalVQ, FrozenSubspace)):
            module.draw(streams.generator("init", name))
