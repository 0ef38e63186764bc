"""A rule's signal on the tiny batch, in float64, and what to compare it with."""

import torch
from torch import Tensor

from heterodox.core.protocols import Credit, LanguageModel
from heterodox.core.rng import Streams
from heterodox.core.types import Batch, Signal
from heterodox.credit import Backprop, DirectFeedback
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


def mirrored_direct_feedback(model: LanguageModel, **mirrored: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Direct feedback through the stream of a block with its weights themselves as feedback, and the true gradient.

    `mirrored` replaces some of the feedback. Both see the same dropout masks.
    """
    rule = DirectFeedback.Config().build(model, Streams(0))
    assert set(rule.feedback) == {"stream", "blocks.0.attn.mix", "blocks.0.mlp.act"}
    rule.feedback |= {
        "stream": model.head.weight.detach(),
        "blocks.0.attn.mix": model.get_parameter("blocks.0.attn.o.weight").detach(),
        "blocks.0.mlp.act": model.get_parameter("blocks.0.mlp.proj.weight").detach(),
    } | mirrored
    signals = []
    for credit in (rule, Backprop()):
        torch.manual_seed(0)
        signals.append(signal_of(credit, model))
    assert torch.equal(signals[0].losses, signals[1].losses)
    return signals[0].grads, signals[1].grads
