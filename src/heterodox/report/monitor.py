"""What rules report of themselves beside loss and gradient norm, as curves over steps.

A metric `quantity/part` is one of several curves in the chart of its quantity; one without a part has a chart alone.
"""

from typing import Any

from heterodox.comparison.statistics import Number, is_finite
from heterodox.report.curves import thin
from heterodox.report.read import Run
from heterodox.report.study import Study

USUAL = {"kind", "step", "tokens", "meta_tokens", "flops", "sparse_flops", "seconds", "lr", "loss", "grad_norm"}
POINTS = 200  # per curve


def monitor(study: Study) -> list[dict[str, Any]]:
    """A chart for each recipe and quantity: `recipe`, `quantity`, `parts` in order, `rows` of part, step and value.

    Values are means over the finished seeds (all seeds, if none finished) that logged a finite one at that step.
    """
    found = []
    for recipe in study.recipes:
        runs = [run for run in study.of(recipe) if run.finished] or study.of(recipe)
        for quantity, parts in _quantities(runs).items():
            rows = [
                {"part": part, "step": step, "value": value}
                for part, curve in parts.items()
                for step, value in thin(curve, POINTS)
            ]
            found.append({"recipe": recipe, "quantity": quantity, "parts": list(parts), "rows": rows})
    return found


def _quantities(runs: list[Run]) -> dict[str, dict[str, list[tuple[int, Number]]]]:
    values: dict[tuple[str, str], dict[int, list[Number]]] = {}
    for row in (row for run in runs for row in run.steps):
        for key, value in row.items():
            if key not in USUAL and is_finite(value):
                quantity, _, part = key.partition("/")
                values.setdefault((quantity, part), {}).setdefault(row["step"], []).append(value)
    quantities: dict[str, dict[str, list[tuple[int, Number]]]] = {}
    for (quantity, part), by_step in values.items():
        curve = [(step, sum(found) / len(found)) for step, found in sorted(by_step.items())]
        quantities.setdefault(quantity, {})[part] = curve
    return quantities
