"""The models that rules train, and their parts, each usable alone."""

from heterodox.model.attention import CausalMix, CausalSelfAttention, FusedSoftmaxMix, SigmoidMix
from heterodox.model.block import Block, ResidualGate
from heterodox.model.bottleneck import DirectionalVQ, FrozenSubspace, HardTopK, hard_top_k
from heterodox.model.equilibrium import Equilibrium
from heterodox.model.generate import generate
from heterodox.model.gpt import GPT
from heterodox.model.norm import LayerNorm, layer_norm
from heterodox.model.softmax_value import softmax_value
from heterodox.model.straight_through import (
    StraightThroughGELU,
    StraightThroughSigmoid,
    straight_through,
    straight_through_gelu,
    straight_through_sigmoid,
)

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
