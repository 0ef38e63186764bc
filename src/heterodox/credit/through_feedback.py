"""The signal that all rules with a backward pass through feedback matrices share."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.types import Batch, Cost, Signal
from heterodox.credit.backprop import differentiate
from heterodox.credit.elsewhere import Elsewhere, backprop_elsewhere, feedback_manifest
from heterodox.credit.feedback import feedback_path
from heterodox.credit.operation import random_state


def through_feedback(
    model: LanguageModel,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    objective: Objective,
    feedback: Mapping[str, Float[Tensor, "fan_out fan_in"]],
    elsewhere: Elsewhere,
) -> Signal:
    """What autograd says if each linear layer named by `feedback` sends errors back through that matrix, not its own.

    The head's gradient does not depend on any of them. `elsewhere` says how embeddings and norms learn.
    """
    names = [n for n, origin in feedback_manifest(model, elsewhere).items() if origin in ("feedback", "exact")]
    before = random_state(model.head.weight.device)
    with feedback_path(model, feedback):
        signal = differentiate(model, batch, weights, objective, names)
    signal.cost = Cost(tokens=batch.num_tokens, flops=model.forward_flops(*batch.inputs.shape).with_backward)
    if elsewhere == "backprop":
        grads, cost = backprop_elsewhere(model, batch, weights, objective, before)
        signal.grads |= grads
        signal.cost += cost
    return signal
