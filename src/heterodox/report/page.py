"""The page: everything that a study has to show, in one HTML file that needs no network."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from heterodox.comparison.statistics import is_finite
from heterodox.core.files import write_atomically, writing
from heterodox.report import context, units
from heterodox.report.alignment import MEASURES, first_to_show
from heterodox.report.drawings import by_loss, drawings
from heterodox.report.masks import COURSES, mask_table
from heterodox.report.origins import origins
from heterodox.report.palette import styles
from heterodox.report.pareto import COSTS
from heterodox.report.reading import headline, remarks
from heterodox.report.recipes import recipes
from heterodox.report.study import Study, read_study

FILTERS = ("count", "memory", "duration", "loss", "signed", "percent", "visible", "breakable")


def write_report(folders: Sequence[str | Path], out: str | Path, rules: Sequence[str] = ()) -> Path:
    """Write one self-contained HTML page about the study and run folders to `out`, and return `out`.

    With `rules`, about those recipes only (RecipeError for one that there is not). A page that is there already is
    replaced in one step. Raises CheckpointError when a folder is neither a study nor a run, when its files are damaged,
    or when `out` cannot be written.
    """
    page = render(read_study([Path(folder) for folder in folders], rules))
    out = Path(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out


def render(study: Study) -> str:
    """The page as a string."""
    rows = study.table
    references = context.references(study)
    drawn = drawings(study, rows)
    template = _environment().get_template("report.html.jinja")
    page = template.render(
        study=study,
        title=context.title(study),
        headline=headline(study, rows),
        remarks=remarks(study, rows, context.reference(study, "unigram_loss")),
        notes=[*study.notes, *context.corpora(study), *context.remarks(study)],
        facts=context.facts(study),
        table=context.with_references(by_loss(rows), references),
        failures=context.failures(study),
        styles={style["recipe"]: style | {"index": index} for index, style in enumerate(styles(study))},
        charts=drawn.charts,
        costs=[(cost, COSTS[cost][0]) for cost in COSTS if f"pareto/{cost}" in drawn.charts],
        references=references,
        alignments=drawn.alignments,
        first_alignment=first_to_show(drawn.alignments),
        measures=MEASURES,
        monitored=drawn.monitored,
        origins=origins(study),
        masks=mask_table(study),
        searched=bool(drawn.data.get("decisions")),
        courses=COURSES,
        samples=context.samples(study),
        recipes=recipes(study),
        page=_json(
            {
                "recipes": study.recipes,
                "charts": drawn.charts,
                "data": drawn.data,
                "alignment": drawn.alignments,
                "monitored": drawn.monitored,
                "masks": drawn.masks,
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


def _json(value: Any) -> Any:
    """`value` with None for every number that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not is_finite(value) else value
