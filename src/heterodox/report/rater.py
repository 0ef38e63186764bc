"""What the raters of a study have learned: AUC by kind of known noise over the run, and how scores are spread."""

from typing import Any

from heterodox.comparison.statistics import is_finite
from heterodox.report.curves import thin
from heterodox.report.study import Study

AUC = "auc_"


def raters(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Data sets: `aucs` by recipe, seed, kind and step; `scores`, bins by recipe and kind of its first run."""
    aucs = [
        {"recipe": run.recipe, "seed": run.seed, "step": row["step"], "kind": key.removeprefix(AUC), "auc": value}
        for run in study.runs
        for row in thin(run.evals)
        for key, value in row.items()
        if key.startswith(AUC) and is_finite(value)
    ]
    scores = []
    for recipe in study.recipes:
        found: dict[str, Any] = next((run.scores for run in study.of(recipe) if run.scores), {})
        edges = found.get("edges", [])
        for kind, counts in found.get("counts", {}).items():
            total = sum(counts) or 1
            bins = zip(edges, edges[1:], counts, strict=False)
            rows = [{"low": low, "high": high, "share": count / total} for low, high, count in bins]
            scores += [{"recipe": recipe, "kind": kind} | row for row in rows]
    return {"aucs": aucs, "scores": scores}
