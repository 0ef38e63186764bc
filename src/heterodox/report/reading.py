"""The result in plain words, made from the numbers and from nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from heterodox.comparison.statistics import Number, is_finite, paired_difference
from heterodox.report import units
from heterodox.report.study import Study

FEW = 6  # rules that one sentence can hold


def headline(study: Study, table: Sequence[dict[str, Any]]) -> str:
    """One sentence: how much of the gap each rule closes, or how far from the baseline it ends."""
    rows = {row["recipe"]: row for row in table if row["val_loss"]}
    if not rows:
        return "No run finished, so there is nothing to compare."
    base, floor = study.baseline, head_only(study)
    if base in rows and floor in rows:
        closed = {
            name: row["gap_closed"]
            for name, row in rows.items()
            if name not in (base, floor) and row["gap_closed"] is not None and study.bounds[name] == (floor, base)
        }
        between = f"the gap between {_at(rows[floor])} and {_at(rows[base])}"
        if closed:
            return _gap(closed, between, floor, base)
        if len(rows) == 2:
            return f"Nothing stands yet in {between}: both are references."
        return f"The gap is not there to close: {_at(rows[floor])} does not end above {_at(rows[base])}."
    others = sorted((row for name, row in rows.items() if name != base), key=lambda r: r["val_loss"]["mean"])
    if base in rows and others:
        ends = [f"{row['recipe']} {_apart(row)}" for row in others[:FEW]]
        return f"Against {_at(rows[base])}, in nats per token: {'; '.join(ends)}."
    ends = [f"{row['recipe']} at {units.loss(row['val_loss']['mean'])}" for row in rows.values()]
    return f"Validation loss in nats per token: {'; '.join(ends[:FEW])}."


def remarks(study: Study, table: Sequence[dict[str, Any]], unigram: Number | None) -> list[str]:
    """What a careful reader would add: how many seeds, what is within chance, what failed, what cost more."""
    rows = [row for row in table if row["val_loss"]]
    said = [_seeds(rows)] if rows else []
    chance = [row["recipe"] for row in rows if _includes_zero(row["difference"])]
    if chance:
        said.append(f"Not told apart from {study.baseline}, as the interval includes 0: {', '.join(chance)}.")
    said += _untrained(study, rows)
    if head_only(study) is None and len(rows) > 1 and study.baseline is not None:
        said.append("No floor (head_only) in this study: the gap closed is not given.")
    elif study.baseline is not None:
        without: dict[str, list[str]] = {}
        for row in rows:
            if row["gap_missing"]:
                without.setdefault(row["gap_missing"], []).append(row["recipe"])
        said += [f"No gap closed for {', '.join(names)}: {reason}." for reason, names in without.items()]
    above = [row["recipe"] for row in rows if is_finite(unigram) and row["val_loss"]["mean"] >= unigram]
    if above:
        said.append(f"No better than guessing by token frequency alone (unigram entropy): {', '.join(above)}.")
    for word, reason in (("failed", "they failed or diverged"), ("unfinished", "they have not ended yet")):
        counts = [(row["recipe"], row[word], row["seeds"] + row["failed"] + row["unfinished"]) for row in table]
        left_out = [f"{name} ({number} of {every})" for name, number, every in counts if number]
        if left_out:
            said.append(f"Left out because {reason}: {', '.join(left_out)}.")
    charged = [(row["tokens"] or 0) + (row["meta_tokens"] or 0) for row in rows]
    if charged and max(charged) > 1.01 * min(charged):
        span = f"{units.count(min(charged))} to {units.count(max(charged))}"
        said.append(f"The runs did not consume equally many tokens ({span}): read the curves before the table.")
    windows = [text for text in dict.fromkeys(_windows(run.config) for run in study.runs) if text is not None]
    if len(windows) > 1:
        said.append(f"Not evaluated on the same windows ({'; '.join(windows)}): their losses cannot be compared.")
    return said


def head_only(study: Study) -> str | None:
    """Return the floor of the baseline's model: the first recipe on it whose blocks stay as initialised."""
    if study.baseline is None:
        return next((run.recipe for run in study.runs if run.summary.get("credit") == "head_only"), None)
    return study.bounds[study.baseline][0]


def _gap(closed: dict[str, Number], between: str, floor: str | None, base: str | None) -> str:
    ranked = sorted(closed.items(), key=lambda item: -item[1])
    parts = []
    for name, share in ranked[:FEW]:
        if share < -0.005:
            parts.append(f"{name} ends above {floor} ({units.percent(share)})")
        elif share > 1.005:
            parts.append(f"{name} ends below {base} ({units.percent(share)})")
        else:
            parts.append(f"{name} closes {units.percent(share)}")
    others = [share for _, share in ranked[FEW:]]
    ends = dict.fromkeys(units.percent(share) for share in (min(others), max(others))) if others else ()
    more = f"; {len(others)} more: {' to '.join(ends)}" if others else ""
    return f"Of {between}, {'; '.join(parts)}{more}."


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    numbers = sorted({row["seeds"] for row in rows})
    if numbers == [1]:
        return "One seed: no interval, so a small difference may be chance."
    many = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    fewer = "; at least 3 are needed for a claim" if numbers[0] < 3 else ""
    return f"{many} seeds per recipe; intervals are 95 % (Student t), differences paired by seed{fewer}."


def _untrained(study: Study, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name the rules whose loss is not below their model's head_only by more than chance, by the paired interval."""
    losses = {
        row["recipe"]: {run.seed: run.summary["val_loss"] for run in study.of(row["recipe"]) if run.finished}
        for row in rows
    }
    unproven: dict[str, list[str]] = {}
    for name, (floor, _) in study.bounds.items():
        if floor not in losses or name not in losses or name == floor:
            continue
        difference = paired_difference(losses[name], losses[floor])
        if difference is None or difference.mean >= 0 or (difference.high is not None and difference.high >= 0):
            unproven.setdefault(floor, []).append(name)
    return [
        f"Not shown to train the blocks (not below {floor} beyond chance): {', '.join(names)}."
        for floor, names in unproven.items()
    ]


def _windows(config: Mapping[str, Any]) -> str | None:
    """Which windows a run was evaluated on; None if its recipe does not say."""
    context, run = (config.get("model") or {}).get("context"), config.get("run") or {}
    if context is None or "eval_batches" not in run or "eval_batch_size" not in run:
        return None
    many = "all" if run["eval_batches"] is None else f"{run['eval_batches'] * run['eval_batch_size']:,}"
    return f"{many} of {context} tokens"


def _includes_zero(difference: dict[str, Any] | None) -> bool:
    return bool(difference) and difference["low"] is not None and difference["low"] <= 0 <= difference["high"]


def _at(row: dict[str, Any]) -> str:
    return f"{row['recipe']} ({units.loss(row['val_loss']['mean'])})"


def _apart(row: dict[str, Any]) -> str:
    difference = row["difference"]
    if difference is None:
        return f"ends at {units.loss(row['val_loss']['mean'])}, on other seeds"
    interval = f" [{units.signed(difference['low'])}, {units.signed(difference['high'])}]" * (difference["n"] > 1)
    return f"ends {units.signed(difference['mean'])}{interval}"
