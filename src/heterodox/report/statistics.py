"""What a study may claim: means with intervals over seeds, and paired differences between recipes.

Every number here is over runs that finished with a finite loss. The others are counted, never averaged.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

import numpy as np
from scipy.special import stdtrit

Number = int | float

UNFINISHED = ("waiting", "running", "interrupted")
"""States of a run that is not over: it may still finish."""
MEDIANS = ("tokens", "meta_tokens", "flops", "seconds")
MEDIANS += ("activation_bytes", "peak_memory_bytes", "parameters", "active_parameters")


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and its Student-t confidence interval; `low` and `high` are None for n < 2."""

    mean: float
    low: float | None
    high: float | None
    n: int


def interval(values: Sequence[Number], confidence: float = 0.95) -> Interval:
    """Mean of `values` with the two-sided Student-t interval that holds the true mean with `confidence`.

    Raises ValueError when `values` is empty or holds a number that is not finite.
    """
    sample = np.asarray(values, dtype=float)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"an interval needs at least one value and only finite ones, got {list(values)}")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, None, None, 1)
    error = float(sample.std(ddof=1)) / math.sqrt(sample.size)
    half = float(stdtrit(sample.size - 1, 0.5 + confidence / 2)) * error
    return Interval(mean, mean - half, mean + half, sample.size)


def paired_difference(a: Mapping[int, Number], b: Mapping[int, Number], confidence: float = 0.95) -> Interval | None:
    """Interval of a − b over the seeds that both have, or None when they share none.

    `a` and `b` map seeds to a measure, such as the validation loss in nats per token. Pairing by seed removes
    what the two rules share: initial weights, data order and evaluation batches.
    """
    common = sorted(a.keys() & b.keys())
    return interval([a[seed] - b[seed] for seed in common], confidence) if common else None


BACKWARD_ONLY = (
    "softmax_backward",
    "straight_through_sigmoid",
    "straight_through_gelu",
    "norm_backward",
    "dropout",
    "frozen_embeddings",
)
"""Options of a model that leave its architecture and its initial weights as they are."""
CEILINGS = ("backprop", "bptt")
"""Rules that follow the exact gradient: the ceiling of a model of their own."""


def architecture(model: Mapping[str, Any] | None) -> str:
    """Return a text that two `model` sections share if, at one seed, they begin as the same function.

    It is empty where nothing is known of the model.
    """
    kept = {key: value for key, value in (model or {}).items() if key not in BACKWARD_ONLY}
    return json.dumps(kept, sort_keys=True) if kept else ""


def architectures(recipes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the `architecture` of each recipe of a `results.json`, by its name."""
    return {recipe["name"]: architecture((recipe.get("resolved") or {}).get("model")) for recipe in recipes}


def references(rows: Sequence[Mapping[str, Any]], baseline: str, models: Mapping[str, str]) -> dict[str, tuple]:
    """Return by recipe the names of its floor and its ceiling, each None if there is none on its model.

    `rows` are summaries. The floor is the first recipe whose credit is head_only; the ceiling is `baseline`, and on
    another model than the baseline's the first recipe of an exact rule.
    """
    credits = {row["recipe"]: row.get("credit") for row in rows}

    def first(names: Iterable[str], model: str) -> str | None:
        return next((name for name in names if models.get(name, "") == model), None)

    found: dict[str, tuple] = {}
    for name in credits:
        model = models.get(name, "")
        rules = CEILINGS if baseline in credits else ()
        exact = [other for rule in rules for other, credit in credits.items() if credit == rule]
        floor = first((other for other, credit in credits.items() if credit == "head_only"), model)
        found[name] = floor, first([baseline] if baseline in credits else [], model) or first(exact, model)
    return found


def table(
    rows: Sequence[Mapping[str, Any]], baseline: str, models: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One row per recipe, in the order in which `rows` (the summaries of the runs) first name them.

    `val_loss`, `test_loss` (nats per token) and `difference` (of the validation loss to `baseline`, paired by
    seed) are intervals as dicts; `tokens`, `meta_tokens`, `flops`, `seconds`, memory in bytes and parameter
    counts are medians. `gap_closed` is the share of the way from the floor to the ceiling of the recipe's own model
    (see `references`; `models` has the `architecture` of each recipe), both averaged over the seeds that all three
    have: 0 is head_only, 1 the ceiling, below 0 is worse than training the head alone. Where it is None, `gap_missing`
    says why. `failed` counts the runs that failed or diverged, `unfinished` those that did not end.
    """
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    finished = {name: [row for row in rows if row["recipe"] == name and usable(row)] for name in recipes}
    losses = {name: {row["seed"]: row["val_loss"] for row in runs} for name, runs in finished.items()}
    bounds = references(rows, baseline, models or {})

    def aggregate(name: str) -> dict[str, Any]:
        runs = finished[name]
        waiting = sum(row["recipe"] == name and row.get("status") in UNFINISHED for row in rows)
        bits = _finite(runs, "val_bits_per_byte")
        difference = paired_difference(losses[name], losses.get(baseline, {})) if name != baseline else None
        floor, ceiling = bounds[name]
        gap = gap_closed(losses[name], losses[floor], losses[ceiling]) if floor and ceiling else None
        return {
            "recipe": name,
            "seeds": len(runs),
            "failed": sum(row["recipe"] == name for row in rows) - len(runs) - waiting,
            "unfinished": waiting,
            "val_loss": _interval(_finite(runs, "val_loss")),
            "val_bits_per_byte": float(np.mean(bits)) if bits else None,
            "test_loss": _interval(_finite(runs, "test_loss")),
            "difference": asdict(difference) if difference else None,
            "gap_closed": gap,
            "gap_missing": None if gap is not None else _why_no_gap(floor, ceiling),
        } | {key: _median(_finite(runs, key)) for key in MEDIANS}

    return [aggregate(name) for name in recipes]


def _why_no_gap(floor: str | None, ceiling: str | None) -> str:
    lacking = [what for what, name in (("head_only", floor), ("exact gradient", ceiling)) if name is None]
    if lacking:
        return f"no run of {' and of '.join(lacking)} on this model"
    return f"{floor} does not end above {ceiling} at the seeds that have finished"


def gap_closed(rule: Mapping[int, Number], floor: Mapping[int, Number], ceiling: Mapping[int, Number]) -> float | None:
    """Share of the gap between `floor` and `ceiling` that `rule` closes; each maps seeds to a loss.

    A ratio of means over the common seeds, not a mean of ratios: one seed with a small gap must not decide.
    None when no seed is common or when the floor's mean is not above the ceiling's.
    """
    common = sorted(rule.keys() & floor.keys() & ceiling.keys())
    gap = sum(floor[seed] - ceiling[seed] for seed in common)
    return sum(floor[seed] - rule[seed] for seed in common) / gap if gap > 0 else None


def usable(row: Mapping[str, Any]) -> bool:
    """Whether a run's summary may enter an average: it finished with a finite validation loss."""
    return row.get("status") == "finished" and is_finite(row.get("val_loss"))


def is_finite(value: object) -> TypeGuard[Number]:
    """Whether `value` is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(rows: Iterable[Mapping[str, Any]], key: str) -> list[Number]:
    return [row[key] for row in rows if is_finite(row.get(key))]


def _interval(values: Sequence[Number]) -> dict[str, Any] | None:
    return asdict(interval(values)) if values else None


def _median(values: Sequence[Number]) -> Number | None:
    if not values:
        return None
    median = float(np.median(values))
    return round(median) if all(isinstance(value, int) for value in values) else median
