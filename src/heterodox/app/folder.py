"""A run's folder: what lies where, written so that a reader never sees half a file."""

import fcntl
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import unset_fake_temporarily

from heterodox.core.errors import CheckpointError
from heterodox.core.files import (
    as_path,
    clear_temporaries,
    exists,
    read_json,
    read_yaml,
    write_atomically,
    write_json,
    writing,
)
from heterodox.core.services import SavedRun
from heterodox.core.shapes import SUMMARY
from heterodox.data import load_tokenizer
from heterodox.training.checkpoint import Checkpoints
from heterodox.training.interrupt import PARENT
from heterodox.training.metrics import read_rows

PARTS = (
    "manifest.json", "metrics.jsonl", "summary.json", "samples.json", "scores.json", "checkpoints", "tokenizer",
    "tensorboard", "results.json", "sweep.json", "runs",
)  # fmt: skip
"""What lies in the folder of a run or of a comparison besides `recipe.yaml`."""

FREE = ("description", "tuning", "log", "run.threads", "run.keep_checkpoints", "data.cache")
"""What does not change how a run goes on."""


class RunFolder:
    """`recipe.yaml`, `manifest.json`, `metrics.jsonl`, `summary.json`, `samples.json`, `checkpoints/`."""

    def __init__(self, path: Path, keep_checkpoints: int = 2) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep_checkpoints)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def exists(self) -> bool:
        return exists(self.path / "recipe.yaml")

    def require_whole(self) -> None:
        """Raise `CheckpointError` where parts of a run are there and others are missing."""
        there = [name for name in PARTS if exists(self.path / name)]
        if not self.exists():
            if there:
                raise CheckpointError(
                    f"{self.path} holds {there[0]}, but no recipe.yaml: if it is a run, put its recipe.yaml back; "
                    "otherwise pass another --out"
                )
            return
        for name in there:
            if exists(self.path / name) and (self.path / name).is_dir() == ("." in name):
                kind = "folder, expected a file" if "." in name else "file, expected a folder"
                raise CheckpointError(f"{self.path / name} is a {kind}; move it away, or pass another --out")
        try:
            summary = self.read_summary() or {}
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove the file to go on without it") from None
        names = self.checkpoints.names()
        trained = max([summary.get("steps") or 0, *(row["step"] for row in read_rows(self.metrics))])
        if trained and not names:
            raise CheckpointError(
                f"{self.path} holds a run that has trained, but {self.checkpoints.folder} has no checkpoint: put it "
                "back, or pass another --out to begin again"
            )
        if names and not exists(self.metrics):
            raise CheckpointError(
                f"{self.path} holds a run with checkpoints, but no metrics.jsonl: put it back, or pass another --out"
            )

    def create(self) -> None:
        """Make the folder. Raises `CheckpointError` where that is not possible."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training here.

        Raises `CheckpointError` if one already does. A study's run waits for it: it may be the same run of a study that
        was killed, which still writes its last checkpoint.
        """
        self.create()
        with writing(self.path / ".lock"):
            file = (self.path / ".lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if os.environ.get(PARENT) else fcntl.LOCK_NB))
            except OSError:
                raise CheckpointError(f"another process is training in {self.path}") from None
            with writing(self.path):
                clear_temporaries(self.path)
            yield

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe. Raises `CheckpointError` if this is no run folder, or the file is damaged."""
        path = self.path / "recipe.yaml"
        if not exists(path):
            raise CheckpointError(f"{self.path} is not a run folder: it has no recipe.yaml")
        recipe = read_yaml(path)
        if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
            raise CheckpointError(f"{path} is damaged: it holds no recipe")
        return recipe

    def read_summary(self) -> dict[str, Any] | None:
        """`summary.json`, or None where there is none. Raises `CheckpointError` if it is damaged."""
        path = self.path / "summary.json"
        return read_json(path, SUMMARY) if exists(path) else None

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text)

    def write_json(self, name: str, value: Mapping[str, Any] | list[Any]) -> None:
        write_json(self.path / name, value)


def first_difference(
    there: Mapping[str, Any], here: Mapping[str, Any], free: Collection[str] = FREE, path: str = ""
) -> tuple[str, Any, Any] | None:
    """The first dotted key, not in `free`, in which two resolved recipes differ, with both values."""
    for key in [*there, *(key for key in here if key not in there)]:
        a, b, name = there.get(key), here.get(key), path + key
        if name in free or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = first_difference(a, b, free, f"{name}.")
            if inner:
                return inner
            continue
        return name, a, b
    return None


# What a part may see of another run: its recipe, what its learner remembers, its tokenizer.


def open_run(path: Path) -> SavedRun:
    """The run in folder `path` at its latest checkpoint.

    Raises `CheckpointError` for a folder that is no run, or whose checkpoint is missing or damaged.
    """
    folder = RunFolder(as_path(path))
    recipe = folder.read_recipe()
    with unset_fake_temporarily():  # a plan asks, too
        _, state, _ = folder.checkpoints.load()
    if not isinstance(state.get("learner"), dict):
        raise CheckpointError(f"{path} holds nothing that a learner remembers")
    return SavedRun(recipe, state["learner"], load_tokenizer(folder.tokenizer).fingerprint)
