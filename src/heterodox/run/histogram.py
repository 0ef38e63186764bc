"""What a run's rater thinks of held-out examples: a histogram of scores by kind, for the report."""

from typing import Any

import numpy as np

from heterodox.core.learner import Scoring
from heterodox.meta.auc import auc_by_kind
from heterodox.run.session import Session

BINS = 40


def score_histogram(session: Session) -> dict[str, Any] | None:
    """Edges of the bins, counts by kind, AUC by kind of noise; None for a learner whose scores are none, or not finite.

    The examples are those of val, with the noise of train planted in them where there is any.
    """
    learner = session.learner
    if not isinstance(learner, Scoring):
        return None
    known = session.labelled_batches
    batches = [entry.batch for entry in known] if known else [b.to(session.device) for b in session.val_batches]
    if not batches:
        return None
    scores = np.concatenate([learner.scores(batch).double().cpu().numpy() for batch in batches])
    if not np.isfinite(scores).all():
        return None
    edges = np.histogram_bin_edges(scores, BINS)
    if not known:
        return {"edges": edges.tolist(), "counts": {"all": np.histogram(scores, edges)[0].tolist()}, "auc": {}}
    labels, kinds = np.concatenate([entry.labels.cpu().numpy() for entry in known]), known[0].kinds
    counts = {
        name: np.histogram(scores[labels == number], edges)[0].tolist() for number, name in enumerate(("clean", *kinds))
    }
    return {"edges": edges.tolist(), "counts": counts, "auc": auc_by_kind(scores, labels, kinds)}
