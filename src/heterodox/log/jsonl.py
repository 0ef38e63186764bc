"""`metrics.jsonl`: one JSON object a line, the truth about a run."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heterodox.core.errors import CheckpointError


class MetricsFile:
    """Appends rows. Opened at `step`, it first drops rows of later steps (a run that was killed wrote them)."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step] if step else []
        temporary = path.with_name(f".{path.name}")
        try:
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from None

    def row(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file, of one kind if given; what a crash left of a line is skipped."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            row = _parse(line)
            if row is not None and kind in (None, row["kind"]):
                yield row


def last_rows(path: Path, num_bytes: int = 65536) -> list[dict[str, Any]]:
    """The complete rows within the last `num_bytes` of a metrics file that may still be growing."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - num_bytes)
        file.seek(start)
        lines = file.read().split(b"\n")
    rows = [_parse(line + b"\n") for line in lines[bool(start) : -1]]
    return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= {"kind", "step"} else None
