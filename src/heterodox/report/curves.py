"""Rows for the loss curves and for the chart of final losses.

The costs are those that a run is charged: tokens include meta tokens, FLOPs and seconds are the trainer's
own.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from heterodox.comparison.statistics import Number, interval, is_finite
from heterodox.report.read import Run
from heterodox.report.study import Study

Rows = list[dict[str, Any]]
Span = tuple[Number, Number]
T = TypeVar("T")

COSTS = ("tokens", "flops", "seconds")
POINTS = 600  # per curve: more points than pixels only make the page heavy


def curves(study: Study) -> dict[str, Rows]:
    """Data sets of the loss curves: `means` over seeds with intervals, single `seeds`, `ends` of unfinished runs.

    A recipe's mean is over its finished runs, at the steps that all of them evaluated; so is its cost there.
    Two seeds get no interval here: at 12.7 standard errors it would hide the other recipes' curves.
    """
    means: Rows = []
    seeds: Rows = []
    ends: Rows = []
    for recipe in study.recipes:
        runs = study.of(recipe)
        means += thin(_mean_curve(recipe, [_curve(run) for run in runs if run.finished]))
        for run in runs:
            curve = _curve(run)
            seeds += thin(curve)
            if curve and not run.finished:
                ends.append(curve[-1] | {"status": run.summary.get("status")})
    return {"means": means, "seeds": seeds, "ends": ends}


def finals(study: Study, table: Sequence[dict[str, Any]]) -> dict[str, Rows]:
    """Data sets of the chart of final losses: `finals` by recipe, `singles` by finished run."""
    rows = [{"recipe": row["recipe"]} | row["val_loss"] for row in table if row["val_loss"]]
    singles = [
        {"recipe": run.recipe, "seed": run.seed, "loss": run.summary["val_loss"]} for run in study.runs if run.finished
    ]
    return {"finals": rows, "singles": singles}


def span(values: Iterable[Number | None], margin: float = 0.0) -> Span | None:
    """The least and the greatest of the finite `values`, moved apart by a share `margin` of their distance."""
    finite = [value for value in values if is_finite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    room = margin * (high - low) or 0.01 * abs(high) or 1.0
    return (low - room, high + room) if margin or low == high else (low, high)


def thin(rows: Sequence[T], points: int = POINTS) -> list[T]:
    """At most `points` of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= points:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (points - 1))] for i in range(points)]


def _curve(run: Run) -> Rows:
    rows = []
    for row in run.evals:
        if not is_finite(row.get("val_loss")):
            continue
        tokens = row.get("tokens")
        charged = tokens + (row.get("meta_tokens") or 0) if is_finite(tokens) else None
        point = {"recipe": run.recipe, "seed": run.seed, "step": row.get("step"), "loss": row["val_loss"]}
        rows.append(point | {"tokens": charged, "flops": row.get("flops"), "seconds": row.get("seconds")})
    return rows


def _mean_curve(recipe: str, curves: Sequence[Rows]) -> Rows:
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    common = set.intersection(*({row["step"] for row in curve} for curve in curves))
    points: dict[int, Rows] = {step: [] for step in sorted(common)}
    for row in (row for curve in curves for row in curve):
        if row["step"] in points:
            points[row["step"]].append(row)
    means = []
    for step, rows in points.items():
        loss = interval([row["loss"] for row in rows])
        mean = {"recipe": recipe, "step": step, "loss": loss.mean, "n": loss.n}
        mean |= {"low": loss.low, "high": loss.high} if loss.n > 2 else {"low": None, "high": None}
        for cost in COSTS:
            values = [row[cost] for row in rows if is_finite(row[cost])]
            mean[cost] = sum(values) / len(values) if values else None
        means.append(mean)
    return means
