"""Answers as a person reads them in the terminal."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from heterodox.log import units

_EXPENDABLE = ("bits/byte", "test loss", "held", "seeds")
"""Columns that a narrow terminal goes without, the first one first."""


class FinalTable:
    """The result of a comparison, as `statistics.table` computed it, in as many columns as fit."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], baseline: str) -> None:
        self.columns: dict[str, list[str]] = {
            "rule": [row["recipe"] for row in rows],
            "val loss": [units.interval(row["val_loss"]) or "none finished" for row in rows],
            f"− {baseline}": [
                "" if row["recipe"] == baseline else units.interval(row["difference"], sign=True) for row in rows
            ],
            "gap closed": [units.percent(row["gap_closed"]) for row in rows],
            "test loss": [units.interval(row["test_loss"]) for row in rows],
            "bits/byte": [units.number(row["val_bits_per_byte"]) for row in rows],
            "FLOPs": [units.count(row["flops"]) for row in rows],
            "seconds": [units.number(row["seconds"], 1) for row in rows],
            "held": [units.size(row["activation_bytes"]) for row in rows],
            "seeds": [
                ", ".join(
                    [str(row["seeds"]), *(f"{row[word]} {word}" for word in ("failed", "unfinished") if row.get(word))]
                )
                for row in rows
            ],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for number in range(len(_EXPENDABLE) + 1):
            left_out = _EXPENDABLE[:number]
            table = self._table(left_out)
            if console.measure(table, options=options.update(width=1000)).maximum <= options.max_width:
                break
        yield table
        if left_out:
            yield f"(left out for want of width: {', '.join(left_out)})"

    def _table(self, left_out: Sequence[str]) -> Table:
        shown = {name: cells for name, cells in self.columns.items() if name not in left_out}
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for name in shown:
            table.add_column(name, justify="left" if name == "rule" else "right", overflow="fold")
        for cells in zip(*shown.values(), strict=True):
            table.add_row(*cells)
        return table


def comparison_summary(results: Mapping[str, Any], out: Path) -> RenderableType:
    """The final table, its reference lines, what went wrong, and where the report is."""
    done = [row for row in results["runs"] if row["status"] == "finished"]
    lines = []
    if done:
        floor = f", entropy floor {done[0]['floor_loss']:.3f}" if done[0]["floor_loss"] is not None else ""
        most = max(row["seeds"] for row in results["table"])
        spread = f"95 % intervals over {most} seeds" if most > 1 else "one seed, so no intervals"
        lines.append(f"nats per token; unigram {done[0]['unigram_loss']:.3f}{floor}; {spread}")
    lines += [
        f"{row['recipe']} seed {row['seed']} {row['status']}" + (f": {row['message']}" if row["message"] else "")
        for row in results["runs"]
        if row["status"] != "finished"
    ]
    without: dict[str, list[str]] = {}
    for row in results["table"]:
        if row["val_loss"] and row.get("gap_missing"):
            without.setdefault(row["gap_missing"], []).append(row["recipe"])
    lines += [f"no gap closed for {', '.join(names)}: {reason}" for reason, names in without.items()]
    if results["interrupted"]:
        lines.append("the same command goes on from here")
    lines.append(f"{units.duration(results['elapsed_seconds'])} in all; report: {out / 'report.html'}")
    return Group(FinalTable(results["table"], results["baseline"]), "", *map(Text, lines))


def sweep_summary(found: Mapping[str, Any], out: Path) -> RenderableType:
    """Every trial by rule, the best marked, and where the best recipes are."""
    keys = list(found["search"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rule")
    for column in (*keys, "val loss", "FLOPs"):
        table.add_column(column, justify="right")
    table.add_column("")
    for rule in found["rules"]:
        for number, trial in enumerate(rule["trials"]):
            values = [escape(_setting(trial["settings"][key])) for key in keys]
            loss = units.interval(trial["val_loss"]) or "none finished"
            counts = [f"{trial[word]} {word}" for word in ("failed", "unfinished") if trial[word]]
            best = "best" if trial["settings"] == rule["best"] else ", ".join(counts)
            table.add_row(rule["recipe"] * (not number), *values, loss, units.count(trial["flops"]), best)
    lines = [
        f"{rule['recipe']}: the best {key} lies at the end of what was tried; see whether it goes on beyond"
        for rule in found["rules"]
        for key in rule["at_the_end"]
    ]
    if found["interrupted"]:
        lines.append("the same command goes on from here")
    else:
        lines += [f"{rule['recipe']}: no trial finished at every seed" for rule in found["rules"] if not rule["best"]]
    files = [str(out / rule["file"]) for rule in found["rules"] if rule["file"]]
    lines.append(f"{units.duration(found['elapsed_seconds'])} in all" + f"; best: {', '.join(files)}" * bool(files))
    return Group(table, *map(Text, lines))


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def training_summary(summary: Mapping[str, Any], folder: Path) -> str:
    """Three lines on a run."""
    loss = units.number(summary["val_loss"])
    bits = units.number(summary["val_bits_per_byte"])
    more = "; --resume goes on from here" if summary["status"] == "interrupted" else ""
    return (
        f"{summary['recipe']} seed {summary['seed']}: {summary['status']} after {summary['steps']} steps{more}\n"
        f"val loss {loss} nats per token ({bits} bits per byte; unigram {summary['unigram_loss']:.3f})\n"
        f"{units.count(summary['flops'])}FLOPs, {units.duration(summary['seconds'])} of training; {folder}"
    )


def sparse_size(about: Mapping[str, Any]) -> str:
    """How large an exported sparse model is, and what has been left out of it."""
    return (
        f"{units.size(about['bytes'])} against {units.size(about['dense_bytes'])} dense, "
        f"{about['connections']:,} of {about['places']:,} connections, "
        f"{about['dead_units']} of {about['units']} hidden units were dead"
    )


def alignment_table(report: Sequence[Mapping[str, Any]]) -> Table:
    """Cosine, norm ratio and sign agreement per parameter."""
    table = Table()
    table.add_column("parameter")
    for measure in ("cosine", "norm ratio", "sign agreement"):
        table.add_column(measure, justify="right")
    for row in report:
        table.add_row(row["parameter"], *(units.number(row[m]) for m in ("cosine", "norm_ratio", "sign_agreement")))
    return table


def catalog_table(parts: Sequence[Mapping[str, str]]) -> Table:
    """Every part by slot."""
    table = Table()
    for column in ("slot", "name", "what it is"):
        table.add_column(column)
    previous = None
    for part in parts:
        outside = "" if part["distribution"] == "heterodox" else f" ({part['distribution']})"
        table.add_row(part["slot"] if part["slot"] != previous else "", part["name"], part["description"] + outside)
        previous = part["slot"]
    return table


def checks_table(outcomes: Sequence[Mapping[str, Any]]) -> Table:
    """Every check: done, or what is wrong."""
    table = Table()
    for column in ("check", "seconds", "answer"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for outcome in outcomes:
        answer = f"NO: {outcome['problem']}" if outcome["problem"] else f"yes: {outcome['meaning']}"
        table.add_row(outcome["check"].replace("_", " "), f"{outcome['seconds']:.1f}", Text(answer))
    return table


def explanation(part: Mapping[str, Any]) -> RenderableType:
    """A part's documentation, options and manifest."""
    shown: list[RenderableType] = [f"{part['slot']}: {part['name']}\n", _reflowed(part["documentation"])]
    if part["options"]:
        table = Table()
        for column in ("option", "type", "default", ""):
            table.add_column(column)
        for option in part["options"]:
            table.add_row(option["name"], option["type"], str(option["default"]), option["description"])
        shown += ["\noptions", table]
    if "manifest" in part:
        table = Table()
        table.add_column("parameter")
        table.add_column("origin")
        for name, origin in part["manifest"].items():
            table.add_row(name, origin)
        shown += ["\nwhere each parameter's signal comes from", table]
    return Group(*shown)


def _reflowed(text: str) -> Text:
    """Paragraphs as one line each, for the terminal to wrap; equations and lists as they are."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        flowing = not any(line.startswith((" ", "-", "|")) for line in lines)
        paragraphs.append((" " if flowing else "\n").join(lines))
    return Text("\n\n".join(paragraphs))


def plan_table(plan: Mapping[str, Any]) -> Table:
    """What a recipe would cost."""
    table = Table(title=plan["recipe"], title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_row("parameters", f"{plan['parameters']:,}")
    table.add_row("  of them trained", f"{plan['trained_parameters']:,}")
    if plan["active_parameters"] != plan["parameters"]:
        table.add_row("  of them not masked", f"{plan['active_parameters']:,}")
    for what in plan["in_float32"]:
        table.add_row("in float32, not bfloat16", what)
    for name, amount in plan["memory_bytes"].items():
        table.add_row(f"memory: {name.replace('_', ' ')}", units.size(amount))
    table.add_row("FLOPs per step", units.count(plan["per_step"]["flops"]))
    table.add_row("tokens per step", f"{plan['per_step']['tokens']:,}")
    if plan["once"]["flops"]:
        table.add_row("FLOPs before the first step", units.count(plan["once"]["flops"]))
    if plan["steps"] is None:
        table.add_row("steps", f"as many as the machine does in {plan['seconds']:g} s; --speed would tell")
        return table
    for key in ("steps", "tokens", "meta_tokens"):
        table.add_row(key.replace("_", " "), f"{plan[key]:,}")
    table.add_row("FLOPs", units.count(plan["flops"]))
    if plan["hours"] is not None:
        table.add_row("hours", units.number(plan["hours"], 3))
    table.add_row("epochs of the train split", units.number(plan["epochs"], 2))
    return table


def scoring_summary(answer: dict[str, Any]) -> str:
    """What `heterodox score` found, a line for each thing."""
    lines = [f"{answer['examples']:,} examples of {answer['split']}: {answer['path']}"]
    lines.append(f"scores {answer['mean']:.3f} ± {answer['std']:.3f}")
    for kind, value in answer.get("auc", {}).items():
        lines.append(f"AUC, {kind}: {value:.3f} (by length and punctuation alone: {answer['auc_surface'][kind]:.3f})")
    if "index" in answer:
        noise = f", {answer['noise_kept']:.1%} of them noise" if "noise_kept" in answer else ""
        lines.append(f"the best {answer['kept']:,}{noise}: {answer['index']}")
    return "\n".join(lines)
