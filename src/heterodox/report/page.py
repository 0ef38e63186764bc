"""The page: everything that a study has to show, in one HTML file that needs no network."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from heterodox.comparison.statistics import is_finite
from heterodox.core.errors import CheckpointError
from heterodox.core.files import PathLike, as_path, exists, read_bytes, write_atomically
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

PAGE = b'<meta name="generator" content="heterodox">'
"""What every page of ours holds near its beginning."""
FILTERS = ("count", "memory", "duration", "loss", "signed", "percent", "visible", "breakable")


def write_report(folders: PathLike | Sequence[PathLike], out: PathLike, rules: Sequence[str] = ()) -> Path:
    """Write one self-contained HTML page about the study and run folders to `out`, and return `out`.

    With `rules`, about those recipes only (RecipeError for one that there is not). A page that is there already is
    replaced in one step. Raises CheckpointError when a folder is neither a study nor a run, when its files are damaged,
    or when `out` cannot be written.
    """
    out = as_path(out)
    require_page(out)
    write_atomically(out, render(read_study(paths(folders), rules)))
    return out


def require_page(out: Path, mark: bytes = PAGE) -> None:
    """Raise `CheckpointError` where writing to `out` would replace what is no report."""
    if not exists(out):
        return
    if out.is_dir():
        raise CheckpointError(f"cannot write {out}: it is a folder")
    if mark not in read_bytes(out)[:4000]:
        raise CheckpointError(f"{out} is there already and is no report of heterodox; pass another --out")


def paths(folders: PathLike | Sequence[PathLike]) -> list[Path]:
    """One folder or several."""
    return [as_path(folder) for folder in ([folders] if isinstance(folders, (str, Path)) else folders)]


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
