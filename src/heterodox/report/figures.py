"""The charts of studies as files for papers: SVG and PNG, drawn without a browser.

Colours are those of the page on a light ground, which its style sheet names; the ground itself is left white.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import PathLike, as_path, exists, read_bytes, write_atomically
from heterodox.report.alignment import MEASURES
from heterodox.report.drawings import Drawings, alignment_cells, density_cells, drawings
from heterodox.report.page import paths
from heterodox.report.palette import styles
from heterodox.report.study import Study, read_study

FORMATS = ("svg", "png")
MARK = b"Software\0heterodox"
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
    chunk = b"tEXt" + MARK
    return png[:-12] + struct.pack(">I", len(MARK)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[-12:]


def _is_ours(drawn: bytes) -> bool:
    """Whether a figure is a PNG with our mark, or an SVG of Vega in our font."""
    return MARK in drawn or (b'class="marks"' in drawn[:1000] and FONT.encode() in drawn)
