"""Every chart that a study has something to show in: specifications by name, and the data sets that they name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heterodox.report import facts as context
from heterodox.report.charts import (
    alignment_chart,
    auc_chart,
    course_chart,
    decision_chart,
    density_chart,
    final_chart,
    loss_chart,
    monitor_chart,
    pareto,
    pareto_charts,
    scores_chart,
    styles,
)
from heterodox.report.data import Study
from heterodox.report.series import COSTS, MEASURES, alignment, curves, finals, norm_bound, span
from heterodox.report.tables import COURSES, gap_chart, gaps, mask_courses, masks, monitor, raters


@dataclass(frozen=True)
class Drawings:
    """`charts` are Vega-Lite specifications without data; `data` holds their rows by the names that they use.

    What is drawn for one recipe at a time comes as matrices instead: `alignments` and `masks` by recipe, and
    `monitored`, a list of recipe and quantity.
    """

    charts: dict[str, dict[str, Any]]
    data: dict[str, list[dict[str, Any]]]
    alignments: dict[str, dict[str, Any]]
    masks: dict[str, dict[str, Any]]
    monitored: list[dict[str, Any]]


def drawings(study: Study, rows: Sequence[dict[str, Any]]) -> Drawings:
    """All of a study's charts; `rows` are its table."""
    ordered = [row["recipe"] for row in by_loss(rows) if row["val_loss"]]
    data = curves(study) | finals(study, rows) | {"references": context.references(study), "pareto": pareto(rows)}
    data |= raters(study) | gaps(study, data["means"])
    alignments, masked, monitored = alignment(study), masks(study), monitor(study)
    charts = _losses(study, data, ordered) | pareto_charts(data["pareto"], study.recipes)
    charts |= {f"alignment/{name}": alignment_chart(name, norm_bound(alignments)) for name in MEASURES}
    if masked:
        data |= mask_courses(study) | {"zero": [{"change": 0}]}
        charts |= {"masks/layers": density_chart(), "masks/decisions": decision_chart(study.recipes)}
        charts |= {f"masks/{name}": course_chart(name, study.recipes) for name in COURSES}
    if monitored:
        charts["monitor"] = monitor_chart()
    if data["aucs"]:
        charts["rater/auc"] = auc_chart(study.recipes)
    if data["scores"]:
        charts["rater/scores"] = scores_chart()
    return Drawings(charts, data, alignments, masked, monitored)


def by_loss(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows, the best first, those without a finished run last."""
    return sorted(rows, key=lambda row: row["val_loss"]["mean"] if row["val_loss"] else float("inf"))


def alignment_cells(found: dict[str, Any], measure: str) -> list[dict[str, Any]]:
    """One recipe's matrix of `alignment` as the rows that its chart draws."""
    starts = set(found["starts"])
    return [
        {"parameter": name, "row": row, "step": step, "value": value, "first": column == 0 and name in starts}
        for row, name in enumerate(found["parameters"])
        for column, (step, value) in enumerate(zip(found["steps"], found[measure][row], strict=True))
    ]


def density_cells(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One recipe's matrix of `masks` as the rows that its chart draws."""
    return [
        {"layer": name, "row": row, "step": step, "density": density}
        for row, name in enumerate(found["layers"])
        for step, density in zip(found["steps"], found["density"][row], strict=True)
    ]


def _losses(study: Study, data: dict[str, Any], ordered: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The charts of losses over costs and of final losses."""
    charts = {}
    entropies = [row["loss"] for row in data["references"]]
    # Finished runs alone decide how high the axis goes: a diverging one would flatten all others.
    losses = span([row["loss"] for row in data["means"] or data["seeds"]] + entropies, margin=0.02)
    if losses and data["seeds"]:
        unigram = context.reference(study, "unigram_loss")
        zoomed = unigram if unigram and unigram > losses[0] else losses[1]
        for cost in COSTS:
            costs = [row[cost] for row in data["seeds"]]
            for scale, ends in (("linear", span(costs)), ("log", span(c for c in costs if c and c > 0))):
                chart = loss_chart(cost, scale == "log", styles(study), ends or (1, 10), losses, zoomed)
                charts[f"loss/{cost}/{scale}"] = chart
                if data["gaps"]:
                    charts[f"gap/{cost}/{scale}"] = gap_chart(cost, scale == "log", styles(study), ends or (1, 10))
    ends = [row[key] for row in data["finals"] for key in ("mean", "low", "high")]
    shown = span(ends + [row["loss"] for row in data["singles"]] + entropies, margin=0.04)
    if shown and data["finals"]:
        charts["final"] = final_chart(study.recipes, ordered, shown)
    return charts
