"""A run's folder: what lies where, written so that a reader never sees half a file."""

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from heterodox.core.errors import CheckpointError
from heterodox.core.files import LARGEST, read_json, there, write_atomically, writing
from heterodox.log.jsonl import read_rows
from heterodox.run.checkpoint import Checkpoints
from heterodox.run.interrupt import PARENT

OURS = (
    "manifest.json", "metrics.jsonl", "summary.json", "samples.json", "scores.json", "checkpoints", "tokenizer",
)  # fmt: skip
"""What lies in a run folder besides its recipe."""

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
        """Return whether there is a run.

        Raises `CheckpointError` for a folder that has lost its `recipe.yaml`: it may be a run, and is not to be written
        over.
        """
        if there(self.path / "recipe.yaml"):
            return True
        found = sorted(name for name in OURS if there(self.path / name))
        if found:
            raise CheckpointError(
                f"{self.path} holds {', '.join(found)} and no recipe.yaml: a run that has lost it, or another's files; "
                "put it back, or pass another --out"
            )
        return False

    def require_whole(self) -> None:
        """Raise `CheckpointError` for a run that has trained, and has lost its metrics or all its checkpoints."""
        if not self.exists():
            return
        begun = any(row["step"] > 0 for row in read_rows(self.metrics)) or there(self.path / "summary.json")
        kept = self.checkpoints.names()
        if begun and not kept:
            raise CheckpointError(
                f"{self.path} has trained, and its checkpoints are gone: it cannot go on; pass another --out"
            )
        if kept and not there(self.metrics):
            raise CheckpointError(
                f"{self.path} has checkpoints, and its metrics.jsonl is gone: put it back, or pass another --out"
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
            yield

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe. Raises `CheckpointError` if this is no run folder, or the file is damaged."""
        path = self.path / "recipe.yaml"
        try:
            if path.stat().st_size > LARGEST:
                raise CheckpointError(f"{path} is damaged: it has {path.stat().st_size} bytes")
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{self.path} is not a run folder: it has no recipe.yaml") from None
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"cannot read {path}: {reason}") from None
        if not isinstance(recipe, dict):
            raise CheckpointError(f"{path} is damaged: it holds no recipe")
        return recipe

    def read_summary(self) -> dict[str, Any] | None:
        """Return `summary.json`, or None where there is none. Raises `CheckpointError` for one that is damaged."""
        summary = read_json(self.path / "summary.json")
        lacking = [key for key in ("status", "corpus_sha256") if summary and key not in summary]
        if lacking:
            raise CheckpointError(f"{self.path / 'summary.json'} is damaged: it has no {lacking[0]}")
        return summary

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text)

    def write_json(self, name: str, value: Mapping[str, Any] | list[Any]) -> None:
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")


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
