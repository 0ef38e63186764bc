"""Alignment of each parameter's signal with the exact gradient, as matrices of parameters by steps."""

import itertools
import math
import re
from collections.abc import Iterable
from typing import Any

from heterodox.comparison.statistics import Number, is_finite
from heterodox.report.curves import thin
from heterodox.report.read import Run
from heterodox.report.study import Study

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
