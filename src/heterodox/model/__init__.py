"""The models that rules train, and their parts, each usable alone."""

from heterodox.model.attention import CausalMix, CausalSelfAttention, FusedSoftmaxMix, SigmoidMix, softmax_value
from heterodox.model.equilibrium import Equilibrium
from heterodox.model.gpt import GPT, Block, ResidualGate, generate
from heterodox.model.local_backward import (
    DirectionalVQ,
    FrozenSubspace,
    HardTopK,
    StraightThroughGELU,
    StraightThroughSigmoid,
    hard_top_k,
    straight_through,
    straight_through_gelu,
    straight_through_sigmoid,
)
from heterodox.model.norms import LayerNorm, layer_norm

__all__ = [
    "GPT",
    "Block",
    "CausalMix",
    "CausalSelfAttention",
    "DirectionalVQ",
    "Equilibrium",
    "FrozenSubspace",
    "FusedSoftmaxMix",
    "HardTopK",
    "LayerNorm",
    "ResidualGate",
    "SigmoidMix",
    "StraightThroughGELU",
    "StraightThroughSigmoid",
    "generate",
    "hard_top_k",
    "layer_norm",
    "softmax_value",
    "straight_through",
    "straight_through_gelu",
    "straight_through_sigmoid",
]
