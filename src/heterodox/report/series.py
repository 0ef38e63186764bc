"""Rows for the loss curves and for the chart of final losses.

The costs are those that a run is charged: tokens include meta tokens, FLOPs and seconds are the trainer's
own.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from heterodox.report.data import Run, Study
from heterodox.report.statistics import Number, interval, is_finite

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


# Alignment of each parameter's signal with the exact gradient, as matrices of parameters by steps.


MEASURES = ("cosine", "norm_ratio", "sign_agreement")
STEPS = 120


def alignment(study: Study) -> dict[str, dict[str, Any]]:
    """For each recipe that was probed: `steps`, `parameters` from input to output, `starts` of blocks, matrices.

    `matrix[parameter][step]` is the mean over the finished seeds (all seeds, if none finished) that measured
    it, or None. Parameters that nobody measured are left out. The norm ratio is averaged geometrically: 2 and
    ½ cancel.
    """
    found = {}
    for recipe in study.recipes:
        runs = [run for run in study.of(recipe) if run.probes]
        runs = [run for run in runs if run.finished] or runs
        if runs:
            found[recipe] = _matrices(runs)
    return found


def first_to_show(alignments: dict[str, dict[str, Any]]) -> str | None:
    """The first recipe whose signal is not the gradient everywhere, else the first one."""
    for recipe, found in alignments.items():
        if any(value is not None and value < 0.99 for row in found["cosine"] for value in row):
            return recipe
    return next(iter(alignments), None)


def norm_bound(alignments: dict[str, dict[str, Any]]) -> float:
    """The power of ten, from 10 to 1000, that bounds all norm ratios above and, inverted, below."""
    ratios = [value for found in alignments.values() for row in found["norm_ratio"] for value in row if value]
    largest = max((abs(math.log10(ratio)) for ratio in ratios), default=0)
    return 10.0 ** min(3, max(1, math.ceil(largest - 0.1)))


def by_depth(parameters: Iterable[str]) -> list[str]:
    """Parameter names from the input to the output: embeddings, blocks by number, final norm, head."""

    def depth(name: str) -> tuple[int, int]:
        block = block_of(name)
        if block is not None:
            return 1, block
        return (0 if "emb" in name else 3 if re.match(r"(lm_)?(head|out|unembed)", name) else 2), 0

    return sorted(dict.fromkeys(parameters), key=depth)


def block_of(name: str) -> int | None:
    """The number of the block that a parameter lies in, or None outside the blocks."""
    found = re.search(r"(?:^|\.)(?:blocks|layers|h)\.(\d+)\.", name)
    return int(found[1]) if found else None


def _matrices(runs: list[Run]) -> dict[str, Any]:
    steps = thin(sorted({probe["step"] for run in runs for probe in run.probes}), STEPS)
    values: dict[tuple[str, int, str], list[Number]] = {}
    names: list[str] = []
    for probe in (probe for run in runs for probe in run.probes):
        for name, measures in (probe.get("alignment") or {}).items():
            names.append(name)
            for measure in MEASURES:
                value = measures.get(measure)
                if is_finite(value):
                    values.setdefault((name, probe["step"], measure), []).append(value)
    measured = {name for name, _, _ in values}
    parameters = [name for name in by_depth(names) if name in measured]
    matrices: dict[str, Any] = {"steps": steps, "parameters": parameters, "starts": _starts(parameters)}
    for measure in MEASURES:
        matrices[measure] = [
            [_mean(values.get((name, step, measure), []), measure) for step in steps] for name in parameters
        ]
    return matrices


def _starts(parameters: list[str]) -> list[str]:
    """The first parameter of each block, and the first one behind the blocks."""
    pairs = itertools.pairwise(parameters)
    return [after for before, after in pairs if block_of(before) != block_of(after)]


def _mean(values: list[Number], measure: str) -> float | None:
    if measure == "norm_ratio":
        logs = [math.log(value) for value in values if value > 0]
        return float(f"{math.exp(sum(logs) / len(logs)):.4g}") if logs else None
    return float(f"{sum(values) / len(values):.4g}") if values else None
