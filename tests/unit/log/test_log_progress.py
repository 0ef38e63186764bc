"""Progress: a bar or a live table on a terminal, a line now and then elsewhere, an estimate of what is left."""

import io
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from rich.console import Console

from heterodox.cli.console import ProgressConsole, StudyProgress, TrainingProgress, spent


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=160)


def said(console: Console) -> str:
    return console.file.getvalue()


def row(kind: str, step: int, **more) -> dict:
    return {
        "kind": kind,
        "step": step,
        "tokens": 10 * step,
        "meta_tokens": 5 * step,
        "flops": 99,
        "seconds": 0.5,
    } | more


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr("heterodox.cli.console.time.monotonic", lambda: now.time)
    return now


def test_what_a_row_has_spent():
    assert spent(row("train", 4), "steps") == 4
    assert spent(row("train", 4), "tokens") == 60
    assert spent(row("train", 4), "flops") == 99
    assert spent(row("train", 4), "seconds") == 0.5


def test_without_a_terminal_there_is_a_line_for_each_evaluation_and_every_ten_seconds(clock):
    console = pipe()
    with TrainingProgress("tiny", "steps", 100.0, console) as progress:
        progress.row(row("eval", 0, val_loss=2.0))
        for step in range(1, 51):
            clock.time += 0.5
            progress.row(row("train", step, loss=1.5))
        progress.row(row("probe", 50, alignment={}))
        progress.row(row("eval", 100, val_loss=1.0))
        progress.close()
    assert said(console).splitlines() == [
        "tiny: step 0  0%  val loss 2.000",
        "tiny: step 20  20%  loss 1.500  val loss 2.000  40s left",
        "tiny: step 40  40%  loss 1.500  val loss 2.000  30s left",
        "tiny: step 100  100%  val loss 1.000",  # nobody logged this step's loss
    ]


def test_a_loss_beside_an_evaluation_is_of_the_same_step():
    console = pipe()
    with TrainingProgress("tiny", "steps", 100.0, console) as progress:
        for step in (5, 10, 15, 20):
            if step % 10 == 0:
                progress.row(row("train", step, loss=step / 10))
            progress.row(row("eval", step, val_loss=2.0))
    told = [line.removesuffix("  0s left").split("  ")[2:] for line in said(console).splitlines()]
    both = ["loss 1.000", "val loss 2.000"], ["loss 2.000", "val loss 2.000"]
    assert told == [["val loss 2.000"], both[0], ["val loss 2.000"], both[1]]


def test_a_resumed_run_does_not_take_old_steps_for_its_own_speed(clock):
    console = pipe()
    with TrainingProgress("tiny", "steps", 100.0, console) as progress:
        progress.row(row("eval", 50, val_loss=2.0))
        clock.time += 10
        progress.row(row("train", 60, loss=1.5))
    assert "60%" in said(console).splitlines()[-1]
    assert said(console).splitlines()[-1].endswith("  40s left")


def test_on_a_terminal_there_is_a_bar_that_fits():
    console = terminal(72)
    with TrainingProgress("feedback_alignment", "steps", 100.0, console) as progress:
        assert said(console) == ""  # an error before the first row stands alone
        progress.row(row("eval", 0, val_loss=2.0))
        progress.row(row("train", 40, loss=1.5))
    last = said(console).split("\r")[-1].replace("\x1b[2K", "").splitlines()[0]
    assert len(last) <= 72
    for part in ("feedback_alignment", "40 %", "loss 1.500  val loss 2.000", "left"):
        assert part in last


def test_the_right_margin_is_left_for_the_terminals_own_echo(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    assert ProgressConsole().width == 76
    monkeypatch.setenv("COLUMNS", "10")
    assert ProgressConsole().width == 20


@dataclass
class FakeJob:
    status: str
    share: float
    val_loss: float | None = None
    share_at_start: float = 0.0
    recipe: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="rule", seed=0))


def jobs(*states: tuple[str, float]) -> list[FakeJob]:
    return [
        FakeJob(status, share, 1.5 if share else None, recipe=SimpleNamespace(name=f"rule{index // 2}", seed=index % 2))
        for index, (status, share) in enumerate(states)
    ]


def test_a_study_without_a_terminal_tells_each_end_once():
    console = pipe()
    with StudyProgress(console) as progress:
        progress.update(jobs(("running", 0.5), ("waiting", 0.0)), 5.0)
        progress.update(jobs(("finished", 1.0), ("running", 0.0)), 11.0)
        progress.update(jobs(("finished", 1.0), ("diverged", 1.0)), 16.0)
    assert said(console).splitlines() == [
        "25% after 5s, 15s left",
        "rule0 seed 0: finished, val loss 1.500",
        "rule0 seed 1: diverged, val loss 1.500",
        "100% after 16s",
    ]


def test_a_study_on_a_terminal_shows_every_state_and_clears_up():
    console = terminal()
    states = [
        ("waiting", 0.0),
        ("running", 0.5),
        ("finished", 1.0),
        ("diverged", 1.0),
        ("failed", 1.0),
        ("interrupted", 0.5),
    ]
    with StudyProgress(console) as progress:
        progress.update(jobs(*states), 60.0)
        progress._live.refresh()
    shown = said(console)
    for part in ("rule0", "· ▶", "✓ ∞", "✗ ‖", "25%", "67% after 1m 00s, 30s left"):
        assert part in shown
    assert shown.endswith("\x1b[2K")
