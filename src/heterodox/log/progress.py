"""Progress in the terminal, with an ETA: a bar where there is one to redraw, a line now and then where there is not."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from heterodox.log import units

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
