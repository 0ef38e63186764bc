"""The page: everything that a study has to show, in one HTML file that needs no network."""

import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from heterodox.comparison.statistics import is_finite, table
from heterodox.core.errors import CheckpointError
from heterodox.report import context, units
from heterodox.report.alignment import MEASURES, alignment, norm_bound
from heterodox.report.charts import alignment_chart, auc_chart, final_chart, loss_chart, monitor_chart, scores_chart
from heterodox.report.curves import COSTS, curves, finals, span
from heterodox.report.gap import gap_chart, gaps
from heterodox.report.mask_charts import course_chart, decision_chart, density_chart
from heterodox.report.masks import COURSES, mask_courses, mask_table, masks
from heterodox.report.monitor import monitor
from heterodox.report.origins import origins
from heterodox.report.palette import styles
from heterodox.report.rater import raters
from heterodox.report.reading import headline, remarks
from heterodox.report.recipes import recipes
from heterodox.report.study import Study, read_study

FILTERS = ("count", "memory", "duration", "loss", "signed", "percent", "visible", "breakable")


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page about the study and run folders to `out`, and return `out`.

    A page that is there already is replaced in one step. Raises CheckpointError when a folder is neither a
    study nor a run, when its files are damaged, or when `out` cannot be written.
    """
    page = render(read_study(folders))
    out = Path(out)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(out)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {out}: {error.strerror}") from error
    return out


def render(study: Study) -> str:
    """The page as a string."""
    rows = table([run.summary for run in study.runs], study.baseline or "")
    ordered = sorted(rows, key=lambda row: row["val_loss"]["mean"] if row["val_loss"] else float("inf"))
    references = context.references(study)
    colours = styles(study)
    alignments = alignment(study)
    rated = raters(study)
    data = curves(study) | finals(study, rows) | {"references": references} | rated
    data |= gaps(study, data["means"])
    charts = _charts(study, data, colours, [row["recipe"] for row in ordered if row["val_loss"]])
    masked = masks(study)
    if masked:
        data |= mask_courses(study) | {"zero": [{"change": 0}]}
        charts |= {"masks/density": density_chart(), "masks/decisions": decision_chart(study.recipes)}
        charts |= {f"masks/{name}": course_chart(name, study.recipes) for name in COURSES}
    charts |= {f"alignment/{name}": alignment_chart(name, norm_bound(alignments)) for name in MEASURES}
    monitored = monitor(study)
    if monitored:
        charts["monitor"] = monitor_chart()
    if rated["aucs"]:
        charts["rater/auc"] = auc_chart(study.recipes)
    if rated["scores"]:
        charts["rater/scores"] = scores_chart()
    template = _environment().get_template("report.html.jinja")
    page = template.render(
        study=study,
        title=context.title(study),
        headline=headline(study, rows),
        remarks=remarks(study, rows, context.reference(study, "unigram_loss")),
        notes=[*study.notes, *context.corpora(study), *context.remarks(study)],
        facts=context.facts(study),
        table=context.with_references(ordered, references),
        failures=context.failures(study),
        styles={style["recipe"]: style | {"index": index} for index, style in enumerate(colours)},
        charts=charts,
        references=references,
        alignments=alignments,
        measures=MEASURES,
        monitored=monitored,
        origins=origins(study),
        masks=mask_table(study),
        searched=bool(data.get("decisions")),
        courses=COURSES,
        samples=context.samples(study),
        recipes=recipes(study),
        page=_json(
            {
                "recipes": study.recipes,
                "charts": charts,
                "data": data,
                "alignment": alignments,
                "monitored": monitored,
                "masks": masked,
            }
        ),
        library=_library(),
    )
    return page.translate(units.SURROGATES)


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed as one script, of the version that Altair writes for."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("heterodox.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters.update({name: getattr(units, name) for name in FILTERS})
    return environment


def _charts(study: Study, data: dict[str, Any], colours: Sequence[dict[str, Any]], ordered: list[str]) -> dict:
    """Every specification that the page can show, by the name that its controls make."""
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
                chart = loss_chart(cost, scale == "log", colours, ends or (1, 10), losses, zoomed)
                charts[f"loss/{cost}/{scale}"] = chart
                if data["gaps"]:
                    charts[f"gap/{cost}/{scale}"] = gap_chart(cost, scale == "log", colours, ends or (1, 10))
    ends = [row[key] for row in data["finals"] for key in ("mean", "low", "high")]
    finals = span(ends + [row["loss"] for row in data["singles"]] + entropies, margin=0.04)
    if finals and data["finals"]:
        charts["final"] = final_chart(study.recipes, ordered, finals)
    return charts


def _json(value: Any) -> Any:
    """`value` with None for every number that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not is_finite(value) else value
