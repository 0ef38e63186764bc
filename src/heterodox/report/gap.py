"""The share of the way from head_only to the baseline that each recipe has gone, against each cost."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from heterodox.comparison.statistics import Number, is_finite
from heterodox.report.charts import TITLES, cost_axis, plain
from heterodox.report.curves import COSTS, Rows, Span
from heterodox.report.reading import head_only
from heterodox.report.study import Study

LIMITS = (-0.5, 1.5)  # where two curves of the gap nearly touch a share says nothing; it would only flatten the rest


def gaps(study: Study, means: Sequence[dict[str, Any]]) -> dict[str, Rows]:
    """Data set `gaps`: recipe, step, `share` and `cost` for each kind of cost (`kind`), from the mean curves.

    The losses of head_only and of the baseline at a cost are read off their own curves, linearly between evaluations.
    There is no share where the baseline was not trained on, nor where head_only is not the higher one: a recipe that
    costs more FLOPs a token than the baseline is compared by FLOPs only as far as the baseline went. head_only, the
    cheapest and flattest, keeps its last loss beyond its end.
    """
    floor, base = head_only(study), study.baseline
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for row in means:
        by_recipe.setdefault(row["recipe"], []).append(row)
    if floor not in by_recipe or base not in by_recipe or floor == base:
        return {"gaps": []}
    found: Rows = []
    for kind in COSTS:
        for recipe, curve in by_recipe.items():
            if recipe in (floor, base) or study.bounds[recipe] != (floor, base):
                continue
            for row in curve:
                share = _share(row, kind, by_recipe[floor], by_recipe[base])
                if share is not None:
                    found.append(
                        {"recipe": recipe, "kind": kind, "step": row["step"], "cost": row[kind], "share": share}
                    )
    return {"gaps": found}


def gap_chart(cost: str, logarithmic: bool, styles: Sequence[dict[str, Any]], ends: Span) -> dict[str, Any]:
    """The share against `cost`, with axes as the loss chart has them; the page sets `shown`, the recipes."""
    recipes = [style["recipe"] for style in styles]
    shown = alt.param(name="shown", value=recipes)
    scale = alt.Scale(type="log" if logarithmic else "linear", domain=list(ends), nice=False)
    rows = alt.Chart(alt.NamedData(name="gaps")).transform_filter(
        f"datum.kind == '{cost}' && indexof(shown, datum.recipe) >= 0"
    )
    if logarithmic:
        rows = rows.transform_filter("datum.cost > 0")
    tooltip = [
        alt.Tooltip("recipe:N"),
        alt.Tooltip("share:Q", title="of the gap", format=".1%"),
        alt.Tooltip("cost:Q", title=cost, format=".3s"),
        alt.Tooltip("step:Q", format=","),
    ]
    lines = rows.mark_line(point=alt.OverlayMarkDef(size=36), strokeWidth=2.2, clip=True).encode(
        x=alt.X("cost:Q", scale=scale, axis=cost_axis(TITLES[cost])),
        y=alt.Y("share:Q", scale=alt.Scale(zero=True), axis=alt.Axis(title="share of the gap closed", format="%")),
        color=alt.Color("recipe:N", scale=alt.Scale(domain=recipes), legend=None),
        strokeDash=alt.StrokeDash(
            "recipe:N", scale=alt.Scale(domain=recipes, range=[style["dash"] for style in styles]), legend=None
        ),
        tooltip=tooltip,
    )
    chart = lines.properties(width="container", height=280, description=f"Share of the gap closed against {cost}")
    return plain(chart.add_params(shown))


def _share(row: dict[str, Any], kind: str, floor: Rows, base: Rows) -> Number | None:
    at = row[kind]
    low, high = _at(base, kind, at), _at(floor, kind, at, beyond=True)
    if low is None or high is None or high <= low:
        return None
    share = (high - row["loss"]) / (high - low)
    return share if LIMITS[0] <= share <= LIMITS[1] else None


def _at(curve: Rows, kind: str, cost: Number | None, beyond: bool = False) -> float | None:
    points = [(row[kind], row["loss"]) for row in curve if is_finite(row[kind])]
    if cost is None or len(points) < 2 or cost < points[0][0] or (cost > points[-1][0] and not beyond):
        return None
    costs, losses = zip(*points, strict=True)
    return float(np.interp(cost, costs, losses))
