"""The runs of a study: one process each, as many side by side as there are cores.

A process of its own keeps a run's failure, its memory and its threads to itself.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heterodox.app.folder import RunFolder, first_difference
from heterodox.app.recipe import Recipe
from heterodox.core.errors import CheckpointError
from heterodox.core.files import exists, writing
from heterodox.training.interrupt import PARENT
from heterodox.training.metrics import last_rows

State = Literal["waiting", "running", "finished", "diverged", "interrupted", "failed"]


@dataclass
class Job:
    """One recipe at one seed, in its own folder."""

    recipe: Recipe
    folder: RunFolder
    status: State = "waiting"
    message: str | None = None
    share: float = 0.0
    share_at_start: float = 0.0
    val_loss: float | None = None
    process: subprocess.Popen[bytes] | None = None
    threads_chosen: bool = False
    """Whether the study has chosen the recipe's CPU threads: a run that goes on keeps those that it began with."""

    @property
    def log(self) -> Path:
        return self.folder.path / "log.txt"

    def find(self, corpus_sha256: str) -> None:
        """See what an earlier study left in the folder.

        Raises `CheckpointError` if that is a run of another recipe or on another text.
        """
        self.folder.require_whole()
        if not self.folder.exists():
            if exists(self.log) and not exists(self.folder.path / ".job.yaml"):
                raise CheckpointError(f"{self.log} is not from a comparison; pass another --out")
            return
        kept = self.folder.read_recipe()
        if self.threads_chosen and isinstance(began := (kept.get("run") or {}).get("threads"), int):
            run = self.recipe.run.model_copy(update={"threads": began})
            self.recipe = self.recipe.model_copy(update={"run": run})
        difference = first_difference(kept, self.recipe.dump())
        if difference:
            key, there, here = difference
            raise CheckpointError(
                f"{self.folder.path} holds a run of another recipe: {key} is {there!r} there and {here!r} here; "
                "pass another --out"
            )
        summary = self.summary()
        if summary and summary.get("status") in ("finished", "diverged"):
            if summary.get("corpus_sha256") != corpus_sha256:
                raise CheckpointError(
                    f"{self.folder.path} holds a run on another text than its recipe names now; pass another --out"
                )
            self._end(summary)
        self.share_at_start = self.share

    def summary(self) -> dict[str, Any] | None:
        """Return what the run says of itself, once it has ended; None of a damaged one, which going on writes anew."""
        try:
            return self.folder.read_summary()
        except CheckpointError:
            return None

    def start(self, device: str | None) -> None:
        """Begin or go on. Raises `CheckpointError` where the folder cannot be written."""
        self.folder.create()
        recipe = self.folder.path / ".job.yaml"
        self.folder.write_text(recipe.name, self.recipe.to_yaml())
        command = [sys.executable, "-m", "heterodox", "train", str(recipe), "--resume", "--quiet"]
        command += ["--out", str(self.folder.path)]
        environment = os.environ | {PARENT: str(os.getpid())}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with writing(self.folder.path):
            (self.folder.path / "summary.json").unlink(missing_ok=True)
            log = self.log.open("ab")
        with log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self.status = "running"

    def poll(self) -> None:
        """Look at the process and at its metrics."""
        assert self.process is not None
        code = self.process.poll()
        budget = self.recipe.run.budget
        for row in last_rows(self.folder.metrics):
            if row["kind"] in ("train", "eval"):
                keys = ("tokens", "meta_tokens") if budget.unit == "tokens" else (_KEYS[budget.unit],)
                used = sum(row.get(key) or 0 for key in keys)
                self.share = min(1.0, used / budget.limit)
                self.share_at_start = self.share_at_start or self.share
            if row["kind"] == "eval":
                self.val_loss = row.get("val_loss")
        if code is None:
            return
        self.process = None
        try:
            summary = self.summary()
        except CheckpointError as error:
            self.fail(str(error))
            return
        if summary:
            self._end(summary)
        elif code in _STOPPED:
            self.status = "interrupted"
        else:
            self.fail(self._last_words(code))

    def fail(self, message: str) -> None:
        self.status, self.message, self.share = "failed", message, 1.0

    def _end(self, summary: dict[str, Any]) -> None:
        self.status, self.message = summary.get("status", "failed"), summary.get("message")
        self.val_loss = summary.get("val_loss")
        if self.status != "interrupted":
            self.share = 1.0

    def _last_words(self, code: int) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{lines[-1]} ({ended}; see {self.log})"


_KEYS = {"steps": "step", "flops": "flops", "seconds": "seconds"}
_STOPPED = tuple(sign for number in (signal.SIGINT, signal.SIGTERM) for sign in (-number, 128 + number))
"""Exit codes of a run that was asked to stop before it could write a summary."""


def run_jobs(
    jobs: Sequence[Job],
    *,
    slots: Sequence[str | None],
    watch: Callable[[], None],
    interrupted: Callable[[], bool],
    interval: float = 0.5,
) -> None:
    """Run the waiting jobs, one per slot at a time (a slot is a CUDA device, or None for the CPU).

    When `interrupted`, the running ones are asked to checkpoint and stop, and no other is started.
    """
    free = list(slots)
    held: dict[int, str | None] = {}
    asked = False
    try:
        while True:
            stop = interrupted()
            for index, job in enumerate(jobs):
                if job.status == "waiting" and free and not stop:
                    try:
                        job.start(free[0])
                    except CheckpointError as error:
                        job.fail(str(error))
                    else:
                        held[index] = free.pop(0)
            if stop and not asked:
                asked = True
                _ask_to_stop(jobs)
            for index in list(held):
                jobs[index].poll()
                if jobs[index].process is None:
                    free.append(held.pop(index))
            watch()
            if not held and (stop or not any(job.status == "waiting" for job in jobs)):
                return
            time.sleep(interval)
    finally:
        _ask_to_stop(jobs)


def _ask_to_stop(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.process is not None:
            job.process.send_signal(signal.SIGTERM)
