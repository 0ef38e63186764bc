"""A run's folder: what lies where, written so that a reader never sees half a file."""

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from heterodox.core.errors import CheckpointError
from heterodox.run.checkpoint import Checkpoints

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
        return (self.path / "recipe.yaml").exists()

    def create(self) -> None:
        """Make the folder. Raises `CheckpointError` where that is not possible."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training here. Raises `CheckpointError` if one already does."""
        self.create()
        with writing(self.path / ".lock"):
            file = (self.path / ".lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(f"another process is training in {self.path}") from None
            yield

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe. Raises `CheckpointError` if this is no run folder, or the file is damaged."""
        path = self.path / "recipe.yaml"
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{self.path} is not a run folder: it has no recipe.yaml") from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        if not isinstance(recipe, dict):
            raise CheckpointError(f"{path} is damaged: it holds no recipe")
        return recipe

    def read_summary(self) -> dict[str, Any] | None:
        """`summary.json`, or None where there is none, or none that can be read."""
        try:
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary if isinstance(summary, dict) else None

    def write_text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text)

    def write_json(self, name: str, value: Mapping[str, Any] | list[Any]) -> None:
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content as a whole. Raises `CheckpointError` if the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the context, whatever keeps `path` from being written is a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None


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
