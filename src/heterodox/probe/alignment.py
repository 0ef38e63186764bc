"""How close a rule's signal comes to the exact gradient.

For each parameter, between its signal and the gradient of the same objective on the same batch at the same weights:
the cosine, the ratio of norms (signal over gradient), and the share of entries whose signs agree.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.comm import Comm
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.types import Alignment, Batch
from heterodox.credit.backprop import differentiate, trainable


def exact_gradients(
    model: LanguageModel,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    objective: Objective,
    comm: Comm,
) -> dict[str, Tensor]:
    """Autograd's gradient of the weighted loss for every trainable parameter, averaged over the ranks."""
    grads = differentiate(model, batch, weights, objective, trainable(model)).grads
    comm.mean_(list(grads.values()))
    return grads


@torch.no_grad()
def alignment(signal: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Alignment:
    """Cosine, norm ratio and sign agreement by parameter name, for those that have a signal.

    A measure that is not defined (a zero vector has no direction) is `None`.
    """
    report: Alignment = {}
    for name in signal:
        s, g = signal[name].double().flatten(), exact[name].double().flatten()
        norm_s, norm_g = float(s.norm()), float(g.norm())
        known = math.isfinite(norm_s) and math.isfinite(norm_g) and norm_g > 0
        report[name] = {
            "cosine": float(s @ g) / (norm_s * norm_g) if known and norm_s > 0 else None,
            "norm_ratio": norm_s / norm_g if known else None,
            "sign_agreement": float((s.sign() == g.sign()).double().mean()) if known and norm_s > 0 else None,
        }
    return report
