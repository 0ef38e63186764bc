"""Paths and files: one way to read what a user names, and one way to write what a reader must never see half of."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from heterodox.core.errors import CheckpointError, RecipeError

LARGEST = 1 << 28
"""Bytes of the largest file of JSON, YAML or metrics that is read as a whole."""
_UNFINISHED = re.compile(r"^\..+\.(\d+)\.writing$")


def expand(path: str | Path) -> Path:
    """Return `path` with a leading `~` replaced. Raise RecipeError for a user whom this machine does not know."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RecipeError(f"{path}: there is no such user on this machine") from None


def output_folder(path: str | Path) -> Path:
    """Return where to write, `~` replaced. Raise RecipeError for an empty name, which would be the current folder."""
    if str(path) == "":
        raise RecipeError("the output folder has an empty name; give --out a folder, `.` for the current one")
    return expand(path)


def there(path: Path) -> bool:
    """Return whether there is something at `path`, and False for a path that cannot be one (too long, a NUL in it)."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path` as a whole, and clear what interrupted writes have left of it.

    Raises CheckpointError if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with writing(path):
        clear_unfinished(path)
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


def clear_unfinished(path: Path) -> None:
    """Remove temporary files of `path` that processes which no longer run have left."""
    for left in path.parent.glob(f".{path.name}.*.writing") if path.parent.is_dir() else ():
        found = _UNFINISHED.match(left.name)
        if found and not _alive(int(found[1])):
            with suppress(OSError):
                left.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever keeps `path` from being written into a CheckpointError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {str(path)[:200]}: {reason}") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the JSON value in `path`, a `kind`; None where there is no file.

    Raises CheckpointError that names the file if it cannot be read, is not JSON, or holds something else.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path} is damaged: it has {path.stat().st_size} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:120]
        raise CheckpointError(f"cannot read {path}: {reason}") from None
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} is damaged: it holds {type(value).__name__}, expected {kind.__name__}")
    return value
