"""Checkpoints: folders of safetensors and JSON that are whole or not there.

A checkpoint is written under a temporary name, synced and renamed, so that a crash or a full disk leaves the previous
one as it was. Each file's SHA-256 is kept beside it: a damaged checkpoint is named, not loaded.
"""

import hashlib
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from heterodox.core.errors import CheckpointError
from heterodox.core.files import (
    clear_temporaries,
    parse_json,
    read_text,
    reading,
    replacing,
    require,
    sha256,
    sync,
    writing,
)
from heterodox.core.shapes import DOCUMENT, HEAD, VALUES
from heterodox.core.state import Tree, join, split

_PARTS = ("model", "state")


class Checkpoints:
    """The checkpoints of one run: `step-00000500/` and so on, the latest `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    @property
    def run(self) -> Path:
        """The folder of the run that they are of."""
        return self.folder.parent

    def names(self) -> list[str]:
        """The complete checkpoints, oldest first."""
        with reading(self.folder):
            found = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted((name for name in found if _step(name) >= 0), key=_step)

    def save(self, step: int, model: Tree, state: Tree, values: Tree) -> Path:
        """Write the checkpoint of `step` and drop those beyond `keep`. Raises `CheckpointError` if it cannot."""
        target = self.folder / f"step-{step:08d}"
        try:
            with writing(self.folder):
                self._clear_leftovers()
            with replacing(target, folder=True) as temporary:
                self._write(temporary, {"model": model, "state": state}, values)
                if target.exists():
                    for path in temporary.iterdir():
                        sync(path)
                    self._drop(target.name)
            with writing(self.folder):
                for name in self.names()[: -self.keep]:
                    self._drop(name)
        except (CheckpointError, SafetensorError) as error:
            kept = [name for name in self.names() if name != target.name]
            left = f"; {kept[-1]} is intact" if kept else ""
            raise CheckpointError(f"cannot write checkpoint {target}: {error}{left}") from None
        return target

    def load(self, name: str | None = None) -> tuple[Tree, Tree, Tree]:
        """The model, the state and the values of the checkpoint `name`, by default the latest.

        Raises `CheckpointError` if there is none or it is damaged, and then names the previous one.
        """
        names = self.names()
        if not names:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        name = name or names[-1]
        if name not in names:
            raise CheckpointError(f"{self.folder} holds no {name!r}; there is {', '.join(names)}")
        try:
            return self._read(self.folder / name)
        except (CheckpointError, OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
            older = names[: names.index(name)]
            offer = f"; go back to the previous one with --checkpoint {older[-1]}" if older else ""
            raise CheckpointError(f"checkpoint {self.folder / name} is damaged: {error}{offer}") from None

    def drop_after(self, step: int) -> None:
        """Drop the checkpoints of later steps, which a run leaves behind when it goes back to an earlier one."""
        try:
            for name in self.names():
                if _step(name) > step:
                    self._drop(name)
        except OSError as error:
            raise CheckpointError(f"cannot drop the checkpoints after step {step}: {error}") from None

    def _write(self, folder: Path, trees: dict[str, Tree], values: Tree) -> None:
        document: Tree = {"values": values, "trees": {}, "sha256": {}}
        for part in _PARTS:
            tensors, document["trees"][part] = split(trees[part])
            path = folder / f"{part}.safetensors"
            save_file({name: t.cpu() for name, t in tensors.items()}, path)
            document["sha256"][part] = sha256(path)
        body = json.dumps(document, indent=1)
        head = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()})
        (folder / "state.json").write_text(f"{head}\n{body}")

    def _read(self, folder: Path) -> tuple[Tree, Tree, Tree]:
        head, _, body = read_text(folder / "state.json").partition("\n")
        known = parse_json(head)
        require(HEAD, known)
        if known["sha256"] != hashlib.sha256(body.encode()).hexdigest():
            raise ValueError("state.json does not match its checksum")
        document = json.loads(body)
        require(DOCUMENT, document)
        trees: list[Tree] = []
        for part in _PARTS:
            path = folder / f"{part}.safetensors"
            if sha256(path) != document["sha256"][part]:
                raise ValueError(f"{path.name} does not match its checksum")
            trees.append(join(load_file(path), document["trees"][part]))
        return trees[0], trees[1], document["values"]

    def _drop(self, name: str) -> None:
        """Remove a checkpoint, hidden first, so that no reader ever takes a half of one for a whole."""
        hidden = self.folder / f".dropped-{name}"
        (self.folder / name).rename(hidden)
        shutil.rmtree(hidden)

    def _clear_leftovers(self) -> None:
        for pattern in (".writing-*", ".dropped-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)
        if self.folder.is_dir():
            clear_temporaries(self.folder)


def _step(name: str) -> int:
    """The step of a checkpoint's name; −1 of a name that no checkpoint has."""
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def require_run(path: Path, state: Tree, values: Tree) -> None:
    """Raise `CheckpointError` unless these come from the checkpoint of a run."""
    try:
        require(VALUES, values)
        if not (isinstance(state.get("learner"), dict) and isinstance(state.get("loader"), dict)):
            raise ValueError("it lacks the state of the learner or of the loader")
    except ValueError as error:
        raise CheckpointError(f"the checkpoint of {path} is damaged: {error}") from None
