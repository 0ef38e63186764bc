"""How well scores tell known noise from what is clean."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def auc(
    clean: Float[np.ndarray, " clean"] | Sequence[float], noise: Float[np.ndarray, " noise"] | Sequence[float]
) -> float | None:
    """The probability that a clean example scores above a noisy one, ties counting half.

    None without either, or where a score is not finite.
    """
    scores = np.concatenate([clean, noise])
    if not len(clean) or not len(noise) or not np.isfinite(scores).all():
        return None
    from scipy.stats import rankdata  # takes half a second to import

    ranks = rankdata(scores)[: len(clean)]
    return float((ranks.sum() - len(clean) * (len(clean) + 1) / 2) / (len(clean) * len(noise)))


def auc_by_kind(
    scores: Float[np.ndarray, " examples"], labels: Int[np.ndarray, " examples"], kinds: Sequence[str]
) -> dict[str, float]:
    """By the name of each kind that occurs. Label 0 is clean, label k + 1 the kind number k."""
    found = {kind: auc(scores[labels == 0], scores[labels == number]) for number, kind in enumerate(kinds, start=1)}
    return {kind: value for kind, value in found.items() if value is not None}
