"""The page: everything that a study has to show, in one HTML file that needs no network."""

import re
import shlex
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import PathLike, as_path, exists, read_bytes, write_atomically
from heterodox.report import facts as context
from heterodox.report import units
from heterodox.report.charts import COSTS, styles
from heterodox.report.data import Study, headline, read_study, remarks
from heterodox.report.drawings import Drawings, alignment_cells, by_loss, density_cells, drawings
from heterodox.report.series import MEASURES, first_to_show
from heterodox.report.statistics import is_finite
from heterodox.report.tables import COURSES, mask_table, origins, recipes

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


# The charts of studies as files for papers: SVG and PNG, drawn without a browser.
#
# Colours are those of the page on a light ground, which its style sheet names; the ground itself is left white.


FORMATS = ("svg", "png")
PNG_MARK = b"Software\0heterodox"
"""A text that every PNG of ours holds."""
WIDTH = 520
"""Of a chart without its axes, in pixels of 1/96 inch."""
SCALE = 3
"""Pixels of a PNG for each of those."""
ROW = 15
"""Height of a row of a heat map."""
USES = {
    "rater/auc": ("aucs",), "rater/scores": ("scores",), "masks/decisions": ("decisions", "zero"),
    "masks/explored": ("courses",), "masks/overlap": ("courses",), "masks/density": ("courses",),
    "masks/dead": ("courses",),
}  # fmt: skip
"""Data sets of charts that have another name than their kind."""
FONT = "Helvetica, Arial, Liberation Sans, sans-serif"


def write_figures(
    folders: PathLike | Sequence[PathLike], out: PathLike, formats: Sequence[str] = ("svg",), rules: Sequence[str] = ()
) -> list[Path]:
    """Draw every chart of the study and run folders into the folder `out`; returns the files, in order.

    With `rules`, of those recipes only. Raises RecipeError for a format or a rule that there is not, CheckpointError
    when a folder is neither a study nor a run, or when `out` cannot be written or holds other files of these names.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise RecipeError(f"figures come as {' or '.join(FORMATS)}, found {', '.join(unknown) or 'none'}")
    out = as_path(out)
    study = read_study(paths(folders), rules)
    drawn = drawings(study, study.table)
    settings = _config(study)
    files: dict[str, bytes] = {}
    for name, spec in figures(study, drawn):
        whole = {"$schema": alt.SCHEMA_URL, "config": settings} | spec
        files |= {f"{name}.{form}": _drawn(whole, form) for form in formats}
    for name in files:
        if exists(out / name) and not _is_ours(read_bytes(out / name)):
            raise CheckpointError(f"{out / name} is there already and is no figure of ours; name another folder")
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def figures(study: Study, drawn: Drawings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of files, without an ending, and complete specifications."""
    charts, data = drawn.charts, drawn.data
    for name, spec in charts.items():
        kind, _, rest = name.partition("/")
        if name == "final":
            yield name, _filled(spec, _some(data, "finals", "singles", "references"))
        elif kind == "loss" and rest.endswith("/linear"):
            used = _some(data, "means", "seeds", "ends", "references")
            yield f"loss_{rest.partition('/')[0]}", _filled(_with_legend(spec, used), used)
        elif kind == "gap" and rest.endswith("/linear"):
            used = _some(data, "gaps")
            yield f"gap_{rest.partition('/')[0]}", _filled(_with_legend(spec, used), used)
        elif kind in ("pareto", "rater") or (kind == "masks" and rest != "layers"):
            used = _some(data, *USES.get(name, (kind,)))
            if all(used.values()):
                yield f"{kind}_{rest}", _filled(_with_legend(spec, used), used)
    for recipe, found in drawn.alignments.items():
        for measure in MEASURES:
            spec = charts[f"alignment/{measure}"] | {"height": ROW * len(found["parameters"])}
            yield f"{measure}_{_file(recipe)}", _filled(spec, {"cells": alignment_cells(found, measure)})
    for recipe, found in drawn.masks.items():
        spec = charts["masks/layers"] | {"height": ROW * len(found["layers"])}
        yield f"density_{_file(recipe)}", _filled(spec, {"cells": density_cells(found)})
    for entry in drawn.monitored:
        name = f"{_file(entry['quantity'])}_{_file(entry['recipe'])}"
        yield name, _filled(_titled(charts["monitor"], entry["quantity"]), {"monitor": entry["rows"]})


def _file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")


def _filled(spec: dict[str, Any], datasets: dict[str, Any]) -> dict[str, Any]:
    """The specification at a fixed width, with its data."""
    if "facet" in spec:  # the panels of a facet have a width of their own
        return spec | {"datasets": datasets}
    return spec | {"width": WIDTH, "datasets": datasets}


def _titled(spec: dict[str, Any], title: str) -> dict[str, Any]:
    """The chart of one quantity, which names it on its axis."""
    y = spec["encoding"]["y"] | {"title": title.replace("_", " ")}
    y.pop("axis", None)
    return spec | {"encoding": spec["encoding"] | {"y": y}}


def _some(data: dict[str, Any], *names: str) -> dict[str, list[dict[str, Any]]]:
    return {name: data[name] for name in names}


def _with_legend(spec: Any, used: dict[str, list[dict[str, Any]]]) -> Any:
    """The specification with a legend of the recipes in the data that it uses, which the page has beside the chart."""
    names = dict.fromkeys(row["recipe"] for rows in used.values() for row in rows if "recipe" in row)
    legend = {"title": None, "symbolOpacity": 1, "values": list(names)}

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {key: item | {"legend": legend} if _hidden(key, item) else changed(item) for key, item in value.items()}

    return changed(spec)


def _hidden(key: str, value: Any) -> bool:
    """Whether this is the channel of a recipe's colour or dashes, without a legend."""
    named = isinstance(value, dict) and value.get("field") == "recipe"
    return named and key in ("color", "strokeDash") and value.get("legend", True) is None


def _config(study: Study) -> dict[str, Any]:
    """Fonts and colours, as `report.js` takes them from the style sheet."""
    css = (files("heterodox.report") / "report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#\w+)", css[: css.index("@media")]))
    ink, muted, line = light["ink"], light["muted"], light["line"]
    words = {"labelColor": muted, "titleColor": muted, "titleFontWeight": 400, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": "white",
        "font": FONT,
        "view": {"stroke": None},
        "axis": words | {"domainColor": line, "gridColor": line, "tickColor": line, "titlePadding": 10},
        "axisY": {"labelLimit": 240},
        "legend": words | {"labelLimit": 240},
        "text": {"color": muted, "fontSize": 11},
        "rule": {"color": muted},
        "rect": {"stroke": light["card"], "strokeWidth": 0.4},
        "mark": {"color": ink},
        "range": {
            "category": [style["light"] for style in styles(study)],
            "diverging": [light["negative"], light["middle"], light["positive"]],
        },
    }


def _drawn(spec: dict[str, Any], form: str) -> bytes:
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    if form == "svg":
        return vl_convert.vegalite_to_svg(spec, vl_version=version).encode()
    return _marked(vl_convert.vegalite_to_png(spec, vl_version=version, scale=SCALE))


def _marked(png: bytes) -> bytes:
    """The PNG with our mark before its last chunk, which has 12 bytes."""
    chunk = b"tEXt" + PNG_MARK
    return png[:-12] + struct.pack(">I", len(PNG_MARK)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[-12:]


def _is_ours(drawn: bytes) -> bool:
    """Whether a figure is a PNG with our mark, or an SVG of Vega in our font."""
    return PNG_MARK in drawn or (b'class="marks"' in drawn[:1000] and FONT.encode() in drawn)


# The result of studies as Markdown, for RESULTS.md and papers' appendices.


COLUMNS = ("val loss", "to baseline", "gap closed", "test loss", "FLOPs", "seconds", "held", "update.lr", "seeds")
MARK = "Generated from the studies' files; do not edit."
"""What every such file holds near its beginning."""
NOTE = """Losses are in nats per token; ± is half of the 95 % interval over seeds (Student t), differences to the
baseline are paired by seed. Costs are medians over seeds; `held` is what a step keeps for its backward half."""


def write_markdown(folders: PathLike | Sequence[PathLike], out: PathLike, rules: Sequence[str] = ()) -> Path:
    """Write a section per study folder to `out`, with the command that generates the file on top.

    With `rules`, of those recipes only, which every folder must have.
    Raises CheckpointError when a folder is neither a study nor a run, or `out` cannot be written.
    """
    folders, out = paths(folders), as_path(out)
    require_page(out, MARK.encode())
    chosen = ["--rules", ",".join(rules)] if rules else []
    command = shlex.join(["heterodox", "report", *map(str, folders), *chosen, "--out", str(out)])
    head = f"# Results\n\n{MARK} Again:\n\n    {command}\n"
    studies = [(f"{folder.resolve().name}: ", read_study([folder], rules)) for folder in folders]
    text = "\n".join([head, *(section(study, name) for name, study in studies)])
    write_atomically(out, text.translate(units.SURROGATES))
    return out


def section(study: Study, name: str = "") -> str:
    """One study: its title behind its `name`, its reading in a sentence, its table, its facts."""
    rows = study.table
    ordered = sorted(rows, key=lambda row: row["val_loss"]["mean"] if row["val_loss"] else float("inf"))
    rates = _learning_rates(study)
    said = [headline(study, rows), *remarks(study, rows, context.reference(study, "unigram_loss"))]
    lines = [f"## {name}{context.title(study)}", "", said[0], "", *(f"- {remark}" for remark in said[1:]), ""]
    lines += ["| rule | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    lines += [_row(row, row["recipe"] == study.baseline, rates.get(row["recipe"])) for row in ordered]
    for reference in context.references(study):
        lines.append(f"| *{reference['name']}* | {units.loss(reference['loss'])} |" + " |" * (len(COLUMNS) - 1))
    lines += ["", NOTE, ""]
    for failure in context.failures(study):
        seeds = ", ".join(map(str, failure["seeds"]))
        lines.append(f"- `{failure['recipe']}`, seed {seeds}, {failure['status']}: {failure['message'] or ''}")
    lines += [f"- {label}: {'; '.join(values)}" for label, values in context.facts(study)]
    return "\n".join(lines) + "\n"


def _row(row: Mapping[str, Any], is_baseline: bool, rate: float | None) -> str:
    cells = [
        f"`{row['recipe']}`",
        _interval(row["val_loss"], units.loss),
        units.MISSING if is_baseline else _interval(row["difference"], units.signed),
        units.percent(row["gap_closed"]),
        _interval(row["test_loss"], units.loss),
        units.count(row["flops"]),
        units.duration(row["seconds"]),
        units.memory(row["activation_bytes"]),
        units.MISSING if rate is None else f"{rate:g}",
        f"{row['seeds']}" + "".join(f" ({row[word]} {word})" for word in ("failed", "unfinished") if row[word]),
    ]
    return "| " + " | ".join(cells) + " |"


def _interval(value: Mapping[str, Any] | None, show: Callable[[Any], str]) -> str:
    if value is None:
        return units.MISSING
    if value["high"] is None:
        return show(value["mean"])
    return f"{show(value['mean'])} ± {units.loss((value['high'] - value['low']) / 2)}"


def _learning_rates(study: Study) -> dict[str, float]:
    recipes = [entry for header in study.headers for entry in header.get("recipes", [])]
    resolved = {entry["name"]: entry.get("resolved") or {} for entry in recipes}
    updates = {name: recipe["update"] for name, recipe in resolved.items() if "update" in recipe}
    return {name: (update.get("around") or update)["lr"] for name, update in updates.items()}
