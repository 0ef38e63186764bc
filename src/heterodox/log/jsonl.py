"""`metrics.jsonl`: one JSON object a line, the truth about a run."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heterodox.core.errors import CheckpointError
from heterodox.core.files import write_atomically, writing

LONGEST_ROW = 1 << 26
"""Bytes of the longest row; more is the mark of a damaged file."""


class MetricsFile:
    """Appends rows. Opened at `step`, it first drops rows of later steps (a run that was killed wrote them)."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step] if step else []
        write_atomically(path, "".join(kept))
        with writing(path):
            self._file = path.open("ab", buffering=0)

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
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST_ROW):
                row = _parse(line)
                if row is not None and kind in (None, row["kind"]):
                    yield row
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def last_rows(path: Path, num_bytes: int = 65536) -> list[dict[str, Any]]:
    """The complete rows within the last `num_bytes` of a metrics file that may still be growing."""
    if not path.is_file():
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
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and row.keys() >= {"kind", "step"} and type(row["step"]) is int
    return row if whole else None
