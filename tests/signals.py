"""A rule's signal on the tiny batch, in float64, and what to compare it with."""

import torch
from torch import Tensor

from heterodox.core.protocols import Credit, LanguageModel
from heterodox.core.types import Batch, Signal
from heterodox.objective import CrossEntropy
from tests.tiny import tiny_batch

WEIGHTS = torch.tensor([0.5, 1.5, 0.25, 1.75], dtype=torch.float64)
KEY_BIASES = {"blocks.0.attn.k.bias", "blocks.1.attn.k.bias"}
"""Softmax does not see them: no gradient."""


def signal_of(rule: Credit, model: LanguageModel, batch: Batch | None = None, weights: Tensor = WEIGHTS) -> Signal:
    return rule.signal(model, batch or tiny_batch(), weights, CrossEntropy())


def grads_of(rule: Credit, model: LanguageModel, weights: Tensor = WEIGHTS) -> dict[str, Tensor]:
    return signal_of(rule, model, weights=weights).grads


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding in float64."""
    return torch.allclose(a, b, rtol=1e-10, atol=1e-13)
