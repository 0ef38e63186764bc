"""What a study may claim: means with intervals over seeds, and paired differences between recipes.

Every number here is over runs that finished with a finite loss. The others are counted, never averaged.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

import numpy as np
from scipy.special import stdtrit

Number = int | float

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


def table(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One row per recipe, in the order in which `rows` (the summaries of the runs) first name them.

    `val_loss`, `test_loss` (nats per token) and `difference` (of the validation loss to `baseline`, paired by
    seed) are intervals as dicts; `tokens`, `meta_tokens`, `flops`, `seconds`, memory in bytes and parameter
    counts are medians. `gap_closed` is the share of the way from the recipe whose `credit` is head_only to
    `baseline`, both averaged over the seeds that all three have: 0 is head_only, 1 the baseline, below 0 is
    worse than training the head alone. It is None when there is no such recipe or when head_only does not lie
    above the baseline. `failed` counts the runs left out.
    """
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    finished = {name: [row for row in rows if row["recipe"] == name and usable(row)] for name in recipes}
    losses = {name: {row["seed"]: row["val_loss"] for row in runs} for name, runs in finished.items()}
    floor = next((row["recipe"] for row in rows if row.get("credit") == "head_only"), None)

    def aggregate(name: str) -> dict[str, Any]:
        runs = finished[name]
        bits = _finite(runs, "val_bits_per_byte")
        difference = paired_difference(losses[name], losses.get(baseline, {})) if name != baseline else None
        gap = gap_closed(losses[name], losses[floor], losses.get(baseline, {})) if floor else None
        return {
            "recipe": name,
            "seeds": len(runs),
            "failed": sum(row["recipe"] == name for row in rows) - len(runs),
            "val_loss": _interval(_finite(runs, "val_loss")),
            "val_bits_per_byte": float(np.mean(bits)) if bits else None,
            "test_loss": _interval(_finite(runs, "test_loss")),
            "difference": asdict(difference) if difference else None,
            "gap_closed": gap,
        } | {key: _median(_finite(runs, key)) for key in MEDIANS}

    return [aggregate(name) for name in recipes]


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
