"""The result of studies as Markdown, for RESULTS.md and papers' appendices."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heterodox.core.files import PathLike, as_path, write_atomically
from heterodox.report import context, units
from heterodox.report.page import paths, require_page
from heterodox.report.reading import headline, remarks
from heterodox.report.study import Study, read_study

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
