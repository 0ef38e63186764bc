"""Answers as a person reads them in the terminal."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, ConsoleDimensions, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from heterodox.core import units

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


# Progress in the terminal, with an ETA: a bar where there is one to redraw, a line now and then where there is not.


_SILENCE = 10.0  # seconds between two lines where there is no terminal to redraw


class ProgressConsole(Console):
    """Standard error, but for a few columns at its right, where the terminal may echo a Ctrl-C."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(stderr=True, quiet=quiet)

    @property
    def size(self) -> ConsoleDimensions:  # pyrefly: ignore[bad-override]
        width, height = super().size
        return ConsoleDimensions(max(width - 4, 20), height)


class TrainingProgress:
    """A metrics observer that shows how far one run has come."""

    def __init__(self, name: str, unit: str, limit: float, console: Console | None = None) -> None:
        self.console = console or ProgressConsole()
        self.name, self.unit, self.limit = name, unit, limit
        self._losses = {"loss": "", "val_loss": ""}
        self._trained: int | None = None  # the step that `loss` is of
        self._began = self._spoke = time.monotonic()
        self._first: float | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=False,
        )
        self._task = self._bar.add_task(name, total=limit, status="")

    def __enter__(self) -> "TrainingProgress":
        return self

    def row(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "warning":
            self.console.print(f"{self.name}: step {row['step']}: {row['text']}", highlight=False)
        if row["kind"] not in ("train", "eval"):
            return
        for key in self._losses:
            if row.get(key) is not None:
                self._losses[key] = f"{key.replace('_', ' ')} {row[key]:.3f}"
        if row["kind"] == "train":
            self._trained = row["step"]
        elif row["step"] != self._trained:  # an older loss beside a new evaluation would look like this step's
            self._losses["loss"] = ""
        done = spent(row, self.unit)
        status = "  ".join(text for text in self._losses.values() if text)
        if self.console.is_terminal:
            self._bar.start()  # not before there is something to show, so that an error stands alone
            self._bar.update(self._task, completed=done, status=status)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._spoke >= _SILENCE or row["kind"] == "eval":
            self._spoke = now
            rate = (done - self._first) / max(now - self._began, 1e-9)
            left = f"  {units.duration((self.limit - done) / rate)} left" if rate > 0 and done < self.limit else ""
            share = min(1.0, done / self.limit)
            self.console.print(f"{self.name}: step {row['step']}  {share:.0%}  {status}{left}", highlight=False)

    def close(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._bar.stop()


def spent(row: Mapping[str, Any], unit: str) -> float:
    """How much of a budget in `unit` a metrics row has used."""
    amount = row["tokens"] + row["meta_tokens"] if unit == "tokens" else row["step" if unit == "steps" else unit]
    return float(amount)


class StudyProgress:
    """Shows how far a comparison has come: a live table, or lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or ProgressConsole()
        self._live = Live(console=self.console, refresh_per_second=2, transient=True)
        self._spoke = -_SILENCE
        self._known: dict[tuple[str, int], str] = {}

    def __enter__(self) -> "StudyProgress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def update(self, jobs: Sequence[Any], seconds: float) -> None:
        """Look at the jobs, `seconds` after the comparison began."""
        if self.console.is_terminal:
            self._live.update(_study_table(jobs, seconds))
            return
        for job in jobs:
            key = (job.recipe.name, job.recipe.seed)
            if job.status not in ("waiting", "running") and self._known.get(key) != job.status:
                self._known[key] = job.status
                loss = "" if job.val_loss is None else f", val loss {job.val_loss:.3f}"
                self.console.print(f"{key[0]} seed {key[1]}: {job.status}{loss}", highlight=False)
        if seconds - self._spoke >= _SILENCE:
            self._spoke = seconds
            self.console.print(_how_far(jobs, seconds), highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()


def _study_table(jobs: Sequence[Any], seconds: float) -> Table:
    """The live table of a comparison: a line per recipe, over its seeds."""
    recipes: dict[str, list[Any]] = {}
    for job in jobs:
        recipes.setdefault(job.recipe.name, []).append(job)
    table = Table(caption=_how_far(jobs, seconds), caption_justify="left")
    for column, justify in (("rule", "left"), ("seeds", "left"), ("done", "right"), ("val loss", "right")):
        table.add_column(column, justify=justify)  # pyrefly: ignore[bad-argument-type]
    for name, group in recipes.items():
        marks = " ".join(_MARKS.get(job.status, job.status) for job in group)
        losses = [job.val_loss for job in group if job.val_loss is not None]
        table.add_row(
            name,
            marks,
            f"{sum(job.share for job in group) / len(group):.0%}",
            f"{sum(losses) / len(losses):.3f}" if losses else "",
        )
    return table


_MARKS = {
    "waiting": "[dim]·[/]",
    "running": "[yellow]▶[/]",
    "finished": "[green]✓[/]",
    "diverged": "[red]∞[/]",
    "failed": "[red]✗[/]",
    "interrupted": "[yellow]‖[/]",
}


def _how_far(jobs: Sequence[Any], seconds: float) -> str:
    share = sum(job.share for job in jobs) / len(jobs)
    begun = sum(job.share_at_start for job in jobs) / len(jobs)
    left = seconds * (1 - share) / (share - begun) if share > begun else None
    coming = f", {units.duration(left)} left" if left is not None and share < 1 else ""
    return f"{share:.0%} after {units.duration(seconds)}{coming}"
