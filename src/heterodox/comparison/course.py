"""What results.json keeps of a run's way, so that a study without its run folders still has curves."""

from statistics import mean
from typing import Any

from heterodox.report.read import Run

KEPT = ("step", "tokens", "meta_tokens", "flops", "seconds", "val_loss")


def course(run: Run) -> dict[str, Any]:
    """`evals`: each evaluation's loss and costs. `alignment`, of a probed run: parameter → mean cosine and norm ratio.

    The means are over the probes of the run's second half, the parameters those that were probed in all of these.
    """
    evals = [{key: row[key] for key in KEPT if key in row} for row in run.evals]
    half = (run.summary.get("steps") or 0) / 2
    late = [row["alignment"] for row in run.probes if row.get("alignment") and row.get("step", 0) > half]
    if not late:
        return {"evals": evals}
    common = [name for name in late[0] if all(name in probe for probe in late)]
    return {"evals": evals, "alignment": {name: _mean([probe[name] for probe in late]) for name in common}}


def _mean(probes: list[dict[str, Any]]) -> dict[str, float | None]:
    found = {}
    for measure in ("cosine", "norm_ratio"):
        values = [probe[measure] for probe in probes if probe.get(measure) is not None]
        found[measure] = round(mean(values), 4) if values else None
    return found
