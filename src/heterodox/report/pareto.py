"""Final loss against what it cost: which recipes no other beats on both."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from heterodox.comparison.statistics import Number, is_finite
from heterodox.report.charts import plain
from heterodox.report.curves import Span, span

COSTS = {
    "flops": ("FLOPs", "floating-point operations"),
    "activation_bytes": ("activations", "bytes that a step holds for its backward half"),
    "tokens": ("tokens", "tokens consumed, meta tokens included"),
    "seconds": ("seconds", "seconds of training"),
}
"""By column of the table: the name of the control, and the title of the axis."""


MOST_LABELS = 8
"""Recipes of a chart that names every dot; of more, the names would cover each other, and none has one."""


def pareto(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe with finished runs: `loss` with `low` and `high`, costs, and `front_COST`.

    `front_COST` says whether no other recipe has both a lower mean loss and no higher cost, or the same loss for less.
    """
    rows = []
    for row in table:
        if row["val_loss"]:
            costs = {cost: row[cost] for cost in COSTS}
            if is_finite(costs["tokens"]):
                costs["tokens"] += row.get("meta_tokens") or 0
            loss = {"loss": row["val_loss"]["mean"], "low": row["val_loss"]["low"], "high": row["val_loss"]["high"]}
            rows.append({"recipe": row["recipe"]} | loss | costs)
    for cost in COSTS:
        known = [row for row in rows if is_finite(row[cost])]
        for row in known:
            row[f"front_{cost}"] = not any(_beats(other, row, cost) for other in known)
    return rows


def _beats(other: Mapping[str, Any], row: Mapping[str, Any], cost: str) -> bool:
    no_worse = other["loss"] <= row["loss"] and other[cost] <= row[cost]
    return no_worse and (other["loss"] < row["loss"] or other[cost] < row[cost])


def pareto_charts(rows: Sequence[Mapping[str, Any]], recipes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A chart for each cost that is known and differs: specifications without data, by `pareto/COST`."""
    losses = span([row[key] for row in rows for key in ("loss", "low", "high")], margin=0.06)
    found = {}
    for cost in COSTS:
        values = [row[cost] for row in rows if is_finite(row[cost]) and row[cost] > 0]
        if losses and len(set(values)) > 1:
            found[f"pareto/{cost}"] = pareto_chart(cost, recipes, _around(values), losses)
    return found


def _around(values: Sequence[Number]) -> Span:
    """The ends of a logarithmic axis that holds `values`, with room for names beside the points."""
    room = (max(values) / min(values)) ** 0.08
    return min(values) / room, max(values) * room


def pareto_chart(cost: str, recipes: Sequence[str], costs: Span, losses: Span) -> dict[str, Any]:
    """Final validation loss against one cost, on a logarithmic axis: points with intervals, and the front as steps."""
    ticks = alt.Axis(title=COSTS[cost][1], format="~s", grid=False, labelOverlap="greedy", tickCount=6)
    x = alt.X(f"{cost}:Q", scale=alt.Scale(type="log", domain=list(costs), nice=False), axis=ticks)
    scale = alt.Scale(domain=list(losses), zero=False, nice=False)
    y = alt.Y("loss:Q", scale=scale, axis=alt.Axis(title="validation loss, nats per token"))
    color = alt.Color("recipe:N", scale=alt.Scale(domain=list(recipes)), legend=None)
    rows = alt.Chart(alt.NamedData(name="pareto")).transform_filter(f"isValid(datum.{cost}) && datum.{cost} > 0")
    front = rows.transform_filter(f"datum.front_{cost}")
    steps = front.mark_line(interpolate="step-after", strokeDash=[3, 3], strokeWidth=1.2, opacity=0.6)
    bars = rows.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=color)
    tooltip = [
        alt.Tooltip("recipe:N"), alt.Tooltip("loss:Q", format=".3f"), alt.Tooltip("flops:Q", format=".3s"),
        alt.Tooltip("activation_bytes:Q", title="held, bytes", format=".3s"), alt.Tooltip("tokens:Q", format=".3s"),
        alt.Tooltip("seconds:Q", format=".3s"),
    ]  # fmt: skip
    dots = rows.mark_point(filled=True, size=90, opacity=1).encode(x=x, y=y, color=color, tooltip=tooltip)
    labelled = rows if len(recipes) <= MOST_LABELS else rows.transform_filter("false")
    names = labelled.mark_text(align="left", baseline="top", dx=7, dy=5).encode(x=x, y=y, text="recipe:N")
    described = f"Final validation loss against {COSTS[cost][1]}"
    layers = alt.layer(steps.encode(x=x, y=y), bars, dots, names)
    return plain(layers.properties(width="container", height=360, description=described))
