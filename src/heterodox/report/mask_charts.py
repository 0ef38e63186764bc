"""The charts of sparse runs, as specifications without data."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from heterodox.report.charts import plain

COURSES = {
    "explored": "connections that have ever been active, share of all",
    "overlap": "connections that an event left, share",
    "density": "density of the masked matrices",
    "dead": "units without incoming, or outgoing, connections, of all matrices",
}


def density_chart() -> dict[str, Any]:
    """Heat map of one recipe: steps across, layers down, how dense each is. The page sets the height."""
    scale = alt.Scale(scheme="viridis", domainMin=0, interpolate="lab")
    legend = alt.Legend(title="density", orient="top", gradientLength=200, titleOrient="left", gradientThickness=10)
    steps = alt.Axis(title="step", labelAngle=0, labelOverlap="greedy", labelSeparation=6, ticks=False, domain=False)
    label = "replace(replace(datum.label, 'blocks.', ''), '.weight', '')"
    names = alt.Axis(title=None, labelExpr=label, ticks=False, domain=False, labelPadding=6)
    y = alt.Y("layer:N", sort=alt.EncodingSortField("row", op="min"), axis=names)
    tooltip = ["layer:N", "step:O", alt.Tooltip("density:Q", format=".3f")]
    color = alt.Color("density:Q", scale=scale, legend=legend)
    cells = alt.Chart(alt.NamedData(name="cells")).mark_rect()
    chart = cells.encode(x=alt.X("step:O", axis=steps), y=y, color=color, tooltip=tooltip)
    return plain(chart.properties(width="container", description="Density of each layer over the steps"))


def course_chart(measure: str, recipes: Sequence[str]) -> dict[str, Any]:
    """One measure of all sparse runs over their steps."""
    color = alt.Color("recipe:N", scale=alt.Scale(domain=list(recipes)), legend=None)
    y = alt.Y(f"{measure}:Q", axis=alt.Axis(title=COURSES[measure]), scale=alt.Scale(zero=False))
    tooltip = ["recipe:N", "seed:N", "step:Q", alt.Tooltip(f"{measure}:Q", format=".4f")]
    rows = alt.Chart(alt.NamedData(name="courses")).transform_filter(f"isValid(datum.{measure})")
    lines = rows.mark_line(point=True, strokeWidth=1.6).encode(
        x=alt.X("step:Q", axis=alt.Axis(grid=False)), y=y, color=color, detail="seed:N", tooltip=tooltip
    )
    return plain(lines.properties(width="container", height=260, description=COURSES[measure]))


def decision_chart(recipes: Sequence[str]) -> dict[str, Any]:
    """Every child that a search has scored: its loss less its parent's; winners are filled."""
    color = alt.Color("recipe:N", scale=alt.Scale(domain=list(recipes)), legend=None)
    shape = alt.Shape("what:N", scale=alt.Scale(domain=["swap", "reset"], range=["circle", "diamond"]), legend=None)
    y = alt.Y("change:Q", axis=alt.Axis(title="loss of a child less its parent's"))
    tooltip = ["recipe:N", "seed:N", "step:Q", "what:N", "won:N", alt.Tooltip("change:Q", format=".5f")]
    rows = alt.Chart(alt.NamedData(name="decisions"))
    x = alt.X("step:Q", axis=alt.Axis(grid=False))
    all_ = rows.mark_point(size=34, opacity=0.6).encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip)
    won = rows.transform_filter("datum.won").mark_point(size=60, filled=True, opacity=1)
    zero = alt.Chart(alt.NamedData(name="zero")).mark_rule(strokeDash=[4, 4], opacity=0.7).encode(y="change:Q")
    chart = alt.layer(zero, all_, won.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip))
    return plain(chart.properties(width="container", height=260, description="What the search decided"))
