"""The charts as Vega-Lite specifications without data: the page holds each data set once, by name.

Colours come from the page's style sheet, so that one specification serves light and dark.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from heterodox.report.data import Study
from heterodox.report.series import Span, span
from heterodox.report.statistics import Number, is_finite

TITLES = {
    "tokens": "tokens consumed, meta tokens included",
    "flops": "floating-point operations",
    "seconds": "seconds of training",
}
ROW = 30  # height of a recipe in the chart of final losses, in pixels
MEASURES = {"cosine": "cosine", "norm_ratio": "norm ratio", "sign_agreement": "sign agreement"}


def loss_chart(
    cost: str, logarithmic: bool, styles: Sequence[dict[str, Any]], costs: Span, losses: Span, zoomed: Number
) -> dict[str, Any]:
    """Validation loss against `cost`: mean, interval and seeds, ends of failed runs, entropies.

    `costs` and `losses` (nats per token) are the ends of the axes. The page sets two parameters: `shown`, the
    recipes, and `zoom`, whether the loss axis ends at `zoomed`.
    """
    recipes = [style["recipe"] for style in styles]
    shown = alt.param(name="shown", value=recipes)
    zoom = alt.param(name="zoom", value=False)
    scale = alt.Scale(type="log" if logarithmic else "linear", domain=list(costs), nice=False)
    x = alt.X(f"{cost}:Q", scale=scale, axis=cost_axis(TITLES[cost]))
    highest = alt.ExprRef(f"zoom ? {zoomed} : {losses[1]}")
    y_scale = alt.Scale(domain=list(losses), domainMax=highest, zero=False, nice=False)
    y = alt.Y("loss:Q", scale=y_scale, axis=alt.Axis(title="validation loss, nats per token"))
    color = alt.Color("recipe:N", scale=alt.Scale(domain=recipes), legend=None)
    dash_scale = alt.Scale(domain=recipes, range=[style["dash"] for style in styles])
    dash = alt.StrokeDash("recipe:N", scale=dash_scale, legend=None)
    nearest = alt.selection_point(name="near", on="pointerover", nearest=True, empty=False, clear="pointerout")

    def rows(name: str) -> alt.Chart:
        chosen = f"indexof(shown, datum.recipe) >= 0 && isValid(datum.{cost})"
        kept = alt.Chart(alt.NamedData(name=name)).transform_filter(chosen)
        return kept.transform_filter(f"datum.{cost} > 0") if logarithmic else kept

    tooltip = [
        alt.Tooltip("recipe:N"),
        alt.Tooltip("loss:Q", title="mean loss", format=".3f"),
        alt.Tooltip("low:Q", title="95 % from", format=".3f"),
        alt.Tooltip("high:Q", title="to", format=".3f"),
        alt.Tooltip("n:Q", title="seeds"),
        alt.Tooltip("step:Q", format=","),
        alt.Tooltip("tokens:Q", format=".3s"),
        alt.Tooltip("flops:Q", title="FLOPs", format=".3s"),
        alt.Tooltip("seconds:Q", format=".3s"),
    ]
    means, seeds = rows("means"), rows("seeds")
    band = means.mark_area(opacity=0.16, clip=True).encode(
        x=x, y=alt.Y("low:Q", scale=y_scale), y2="high:Q", color=color
    )
    thin = seeds.mark_line(strokeWidth=0.8, opacity=0.4, clip=True).encode(x=x, y=y, color=color, detail="seed:N")
    line = means.mark_line(strokeWidth=2.2, clip=True).encode(x=x, y=y, color=color, strokeDash=dash)
    dots = (
        means.mark_point(size=46, filled=True, clip=True)
        .encode(x=x, y=y, color=color, tooltip=tooltip, opacity=alt.condition(nearest, alt.value(1), alt.value(0)))
        .add_params(nearest)
    )
    ends = (
        rows("ends")
        .mark_point(shape="cross", angle=45, size=90, filled=True, clip=True)
        .encode(x=x, y=y, color=color, tooltip=["recipe:N", "seed:N", "status:N", "step:Q"])
    )
    layers = alt.layer(band, thin, line, *_references(y_scale), ends, dots)
    chart = layers.properties(width="container", height=400, description=f"Validation loss against {TITLES[cost]}")
    return plain(chart.add_params(shown, zoom))


TWO_LINES = "split(replace(datum.label, /^([^_]+_[^_]+_)/, '$1\\n'), '\\n')"
"""Labels of more than two words on two lines, so that a narrow page cuts none."""


def final_chart(recipes: Sequence[str], ordered: Sequence[str], losses: Span) -> dict[str, Any]:
    """Final validation loss of each recipe, `ordered` from top to bottom: seeds, mean and interval.

    `losses` (nats per token) are the ends of the axis; `recipes` fixes the colours.
    """
    color = alt.Color("recipe:N", scale=alt.Scale(domain=list(recipes)), legend=None)
    y = alt.Y(
        "recipe:N",
        sort=list(ordered),
        axis=alt.Axis(title=None, domain=False, ticks=False, grid=True, labelPadding=8, labelExpr=TWO_LINES),
    )
    scale = alt.Scale(domain=list(losses), zero=False, nice=False)
    title = "validation loss, nats per token"
    x = alt.X("mean:Q", scale=scale, axis=alt.Axis(title=title, labelFlush=False, domain=False, tickCount=8))
    finals = alt.Chart(alt.NamedData(name="finals"))
    singles = alt.Chart(alt.NamedData(name="singles"))
    tooltip = [
        alt.Tooltip("recipe:N"),
        alt.Tooltip("mean:Q", title="mean loss", format=".4f"),
        alt.Tooltip("low:Q", title="95 % from", format=".4f"),
        alt.Tooltip("high:Q", title="to", format=".4f"),
        alt.Tooltip("n:Q", title="seeds"),
    ]
    each = ["recipe:N", "seed:N", alt.Tooltip("loss:Q", format=".4f")]
    ticks = singles.mark_tick(thickness=1.5, size=14, opacity=0.6).encode(
        x=alt.X("loss:Q", scale=scale), y=y, color=color, tooltip=each
    )
    bars = finals.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", scale=scale), x2="high:Q", y=y, color=color)
    dots = finals.mark_point(filled=True, size=90, opacity=1).encode(x=x, y=y, color=color, tooltip=tooltip)
    references = alt.Chart(alt.NamedData(name="references"))
    at = alt.X("loss:Q", scale=scale)
    lines = references.mark_rule(strokeDash=[4, 4], opacity=0.7).encode(x=at)
    name = alt.ExprRef("datum.key == 'unigram_loss' ? 'right' : 'left'")
    labels = references.mark_text(align=name, baseline="bottom").encode(x=at, y=alt.value(-4), text="short:N")
    chart = alt.layer(lines, labels, bars, ticks, dots).properties(
        width="container", height=ROW * len(ordered), description="Final validation loss of each recipe"
    )
    return plain(chart)


def alignment_chart(measure: str, norm_bound: float) -> dict[str, Any]:
    """Heat map of one measure of one recipe: steps across, parameters down, chance in the middle colour.

    The page sets the height, which depends on the number of parameters.
    """
    ends = {"cosine": [-1, 1], "norm_ratio": [1 / norm_bound, norm_bound], "sign_agreement": [0, 1]}
    kind = "log" if measure == "norm_ratio" else "linear"
    scale = alt.Scale(type=kind, domain=ends[measure], range="diverging", clamp=True, interpolate="lab")
    title = MEASURES[measure]
    legend = alt.Legend(title=title, orient="top", gradientLength=200, titleOrient="left", gradientThickness=10)
    steps = alt.Axis(title="step", labelAngle=0, labelOverlap="greedy", labelSeparation=6, ticks=False, domain=False)
    label = "replace(replace(datum.label, 'blocks.', ''), '.weight', '')"
    names = alt.Axis(title=None, labelExpr=label, ticks=False, domain=False, labelPadding=6)
    order = alt.EncodingSortField("row", op="min")
    y = alt.Y("parameter:N", sort=order, axis=names)
    cells = alt.Chart(alt.NamedData(name="cells"))
    tooltip = ["parameter:N", "step:O", alt.Tooltip("value:Q", title=title, format=".3g")]
    color = alt.Color("value:Q", scale=scale, legend=legend)
    map_ = cells.mark_rect().encode(x=alt.X("step:O", axis=steps), y=y, color=color, tooltip=tooltip)
    between = cells.transform_filter("datum.first").mark_rule(strokeWidth=1, opacity=0.8)
    chart = alt.layer(map_, between.encode(y=alt.Y("parameter:N", sort=order, bandPosition=0)))
    chart = chart.properties(width="container", description=f"{title} with the exact gradient")
    return plain(chart)


def monitor_chart() -> dict[str, Any]:
    """One quantity of one recipe over steps, a line for each part; the page sets the title of the axis."""
    x = alt.X("step:Q", axis=cost_axis("step"))
    y = alt.Y("value:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="value"))
    legend = alt.Legend(title=None, orient="top")
    color = alt.Color("part:N", sort=None, scale=alt.Scale(scheme="tableau10"), legend=legend)
    lines = alt.Chart(alt.NamedData(name="monitor")).mark_line(strokeWidth=1.6)
    tooltip = ["part:N", "step:Q", alt.Tooltip("value:Q", format=".4g")]
    chart = lines.encode(x=x, y=y, color=color, tooltip=tooltip)
    return plain(chart.properties(width="container", height=300, description="What the rule reports of itself"))


def auc_chart(recipes: Sequence[str]) -> dict[str, Any]:
    """AUC of raters' scores over the steps, a panel for each kind of known noise; one half is chance."""
    scale = alt.Scale(domain=[0, 1], nice=False)
    color = alt.Color("recipe:N", scale=alt.Scale(domain=list(recipes)), legend=None)
    tooltip = ["recipe:N", "seed:N", "kind:N", "step:Q", alt.Tooltip("auc:Q", format=".3f")]
    lines = (
        alt.Chart(alt.NamedData(name="aucs"))
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q", axis=alt.Axis(title="step", grid=False, tickCount=6)),
            y=alt.Y("auc:Q", scale=scale, axis=alt.Axis(title="AUC, clean over noise", values=[0, 0.5, 1])),
            color=color,
            detail="seed:N",
            tooltip=tooltip,
        )
    )
    panels = lines.properties(width=300, height=180).facet(alt.Facet("kind:N", title=None), columns=2)
    return plain(panels.properties(title=alt.TitleParams("Held-out examples, by kind of noise", fontSize=13)))


def scores_chart() -> dict[str, Any]:
    """Histograms of the final scores of held-out examples, clean and noisy ones apart."""
    bars = (
        alt.Chart(alt.NamedData(name="scores"))
        .mark_rect(opacity=0.5, strokeWidth=0)
        .encode(
            x=alt.X("low:Q", axis=alt.Axis(title="score", grid=False, tickCount=6)),
            x2="high:Q",
            y=alt.Y("share:Q", axis=alt.Axis(title="share of the kind", format="%", tickCount=4)),
            y2=alt.datum(0),
            color=alt.Color("kind:N", scale=alt.Scale(scheme="tableau10"), legend=alt.Legend(title=None, orient="top")),
            tooltip=["recipe:N", "kind:N", alt.Tooltip("low:Q", format=".3g"), alt.Tooltip("share:Q", format=".1%")],
        )
    )
    return plain(bars.properties(width=300, height=180).facet(alt.Facet("recipe:N", title=None), columns=2))


def _references(scale: alt.Scale) -> tuple[alt.Chart, alt.Chart]:
    data = alt.Chart(alt.NamedData(name="references"))
    y = alt.Y("loss:Q", scale=scale)
    line = data.mark_rule(strokeDash=[4, 4], opacity=0.7, clip=True).encode(y=y)
    text = data.mark_text(align="right", baseline="bottom", dx=-4, dy=-3, clip=True)
    return line, text.encode(y=y, x=alt.value("width"), text="name:N")


def cost_axis(title: str) -> alt.Axis:
    """An axis of amounts with SI prefixes."""
    label = "datum.value == 0 ? '0' : format(datum.value, '~s')"
    return alt.Axis(title=title, labelExpr=label, labelOverlap="greedy", labelSeparation=8, tickCount=6, grid=False)


def plain(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The specification without Altair's own configuration and without the address of its schema."""
    spec = chart.to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config", "datasets")}


# One colour per recipe, the same in every chart and table.
#
# The eight hues were searched for the largest smallest distance (OKLab) under normal vision, protanopia,
# deuteranopia and tritanopia, once on a light and once on a dark ground, hue by hue alike. The ninth recipe
# gets the first hue, dashed.


LIGHT = ("#244c99", "#a4830a", "#157558", "#bc548f", "#37a4c7", "#901302", "#6668cc", "#6a2b6b")
DARK = ("#1187db", "#dcd64d", "#67bd85", "#fd9fbe", "#4ef1fb", "#d27245", "#a99ef1", "#9d6f9e")
DASHES = ([1, 0], [7, 3], [2, 2])
BASELINE = ("#16181d", "#f2f3f5")
HEAD_ONLY = ("#83878f", "#8b9099")


def styles(study: Study) -> list[dict[str, Any]]:
    """Colours and dashes of the recipes, in order; the two that span the gap are black and grey."""
    found = []
    hue = 0
    for recipe in study.recipes:
        if recipe == study.baseline:
            colours, dash = BASELINE, DASHES[0]
        elif study.of(recipe)[0].summary.get("credit") == "head_only":
            colours, dash = HEAD_ONLY, DASHES[0]
        else:
            colours, dash = (LIGHT[hue % 8], DARK[hue % 8]), DASHES[hue // 8 % len(DASHES)]
            hue += 1
        found.append({"recipe": recipe, "light": colours[0], "dark": colours[1], "dash": dash})
    return found


# Final loss against what it cost: which recipes no other beats on both.


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


# The charts of sparse runs, as specifications without data.


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
