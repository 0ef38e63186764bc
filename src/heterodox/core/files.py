"""Files that are read with suspicion, and written as a whole or not at all.

Every file that we write goes under a temporary name beside it first, and is renamed when it is on the disk. A write
that was killed leaves the temporary file; the next write to the same name clears it. A file that is still being written
is locked, and stays.

Whatever is wrong with a file becomes a `CheckpointError` that names the file.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml
from pydantic import ValidationError

from heterodox.core.errors import CheckpointError

TEMPORARY = ".writing"
"""The ending of temporary names."""
MOST_BYTES = 1 << 30
"""The largest file that is read as text."""
LARGEST = 1e100
"""No number in a file of ours is larger."""
MOST_NODES = 1_000_000
"""The most values that a YAML file may have, with each alias written out."""

PathLike = str | Path


@runtime_checkable
class Shape(Protocol):
    """What a value must be: a `pydantic.TypeAdapter`."""

    def validate_python(self, object: Any, /) -> Any: ...


def as_path(path: PathLike) -> Path:
    """The path, with `~` as the user's home. Raises `CheckpointError` for an empty one."""
    if isinstance(path, str) and not path.strip():
        raise CheckpointError("a path is empty, which would mean the working directory; write . for that")
    if "\0" in str(path):
        raise CheckpointError(f"the path {str(path)!r} holds a character that no path has")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise CheckpointError(f"{path} names the home of a user who does not exist") from None


def there(path: Path) -> bool:
    """Return whether there is something at `path`, and False for a path that cannot be one (too long, a NUL in it)."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the context, whatever keeps `path` from being written is a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {_reason(error)}") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the context, whatever keeps `path` from being read is a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from None
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except RecursionError:
        raise CheckpointError(f"cannot read {path}: it is nested too deeply") from None


@contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A temporary file (or folder) that becomes `path` at the end of the context, or vanishes if that fails.

    A file that is there is replaced; a folder must not be there. Raises `CheckpointError` if the disk refuses.
    """
    temporary: Path | None = None
    held = -1
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            clear_temporaries(path.parent, path.name)
            temporary, held = _begin(path, folder)
            yield temporary
            for file in [*temporary.rglob("*"), temporary] if folder else [temporary]:
                sync(file)
            temporary.rename(path)
            temporary = None
            sync(path.parent)
        finally:
            if temporary is not None:
                _remove(temporary)
            if held >= 0:
                os.close(held)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file's content as a whole. Raises `CheckpointError` if the disk refuses."""
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Replace the file's content by `value`, indented. Raises `CheckpointError` if the disk refuses."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def clear_temporaries(folder: Path, name: str | None = None) -> None:
    """Remove what interrupted writes left in `folder`: those of the file `name`, or all."""
    prefix = "." if name is None else _stem(name)
    for path in [p for p in folder.iterdir() if p.name.startswith(prefix) and p.name.endswith(TEMPORARY)]:
        with suppress(OSError):
            held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(held)


def exists(path: Path) -> bool:
    """Whether there is something at `path`. Raises `CheckpointError` where that cannot be known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from None
    return True


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises `CheckpointError` for anything else, and for one that is too large."""
    with reading(path):
        size = require_file(path)
        if size > MOST_BYTES:
            raise CheckpointError(f"cannot read {path}: it has {size:,} bytes, more than {MOST_BYTES:,}")
        return path.read_bytes()


def require_file(path: Path) -> int:
    """The bytes of a regular file. Raises `CheckpointError` for anything else: to open a pipe may wait for ever."""
    with reading(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "device or pipe"
        raise CheckpointError(f"cannot read {path}: it is a {kind}, expected a file")
    return found.st_size


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises `CheckpointError`, also where it is missing."""
    data = read_bytes(path)
    with reading(path):
        return data.decode()


def parse_json(text: str | bytes) -> Any:
    """The value that `text` holds, with None for NaN and infinities. Raises `ValueError`."""
    try:
        return json.loads(text, parse_constant=lambda _: None, parse_int=_int, parse_float=_float)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, shape: Shape) -> Any:
    """The value in a JSON file, as it is there. Raises `CheckpointError` unless it has the `shape`."""
    text = read_text(path)
    with reading(path):
        value = parse_json(text)
        require(shape, value)
        return value


def require(shape: Shape, value: Any) -> None:
    """Raise `ValueError`, with the first thing that is wrong, unless `value` has the `shape`."""
    try:
        shape.validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        said = problem["msg"].replace("Input should be", "expected").replace("a valid dictionary", "a dict")
        raise ValueError(f"{where or 'the whole'}: {said.replace('a valid list', 'a list')}") from None


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises `CheckpointError` where it is missing, damaged or a bomb of aliases."""
    return parse_yaml(read_text(path), path)


def parse_yaml(text: str, path: Path) -> Any:
    """The value that `text`, which comes from `path`, holds."""
    with reading(path):
        try:
            node = yaml.compose(text, yaml.SafeLoader)
            if node is not None and _size(node, {}) > MOST_NODES:
                raise ValueError(f"it has more than {MOST_NODES:,} values, with its aliases written out")
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"it is not YAML: {' '.join(str(error).split())[:200]}") from None
        except OverflowError as error:
            raise ValueError(str(error)) from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin(path: Path, folder: bool) -> tuple[Path, int]:
    """A temporary file or folder beside `path`, and the descriptor that holds its lock."""
    prefix = _stem(path.name)
    if folder:
        temporary = Path(tempfile.mkdtemp(TEMPORARY, prefix, path.parent))
        held = os.open(temporary, os.O_RDONLY)
    else:
        held, name = tempfile.mkstemp(TEMPORARY, prefix, path.parent)
        temporary = Path(name)
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod((0o777 if folder else 0o666) & ~mask)
    with suppress(OSError):  # some network disks have no locks
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return temporary, held


def _stem(name: str) -> str:
    """What temporary names of `name` begin with; short, for a name has 255 bytes."""
    return f".{name if len(name.encode()) < 200 else hashlib.sha256(name.encode()).hexdigest()}."


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _int(text: str) -> int:
    if len(text) > 100:
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if abs(value) > LARGEST:
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node has, with each alias written out. Raises `ValueError` for one that holds itself."""
    if id(node) in known:
        if known[id(node)] < 0:
            raise ValueError("an alias refers to what it is in")
        return known[id(node)]
    known[id(node)] = -1
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_size(child, known) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_size(key, known) + _size(value, known) for key, value in node.value)
    known[id(node)] = size
    return size
