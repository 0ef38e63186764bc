"""`metrics.jsonl`: one JSON object a line, the truth about a run."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heterodox.core.errors import CheckpointError
from heterodox.core.files import exists, parse_json, read_bytes, require, write_atomically, writing
from heterodox.core.shapes import ROW, ROWS


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
    """The rows of a metrics file, of one kind if given. What a crash left of the last line is skipped.

    Raises `CheckpointError` for a line that is none of a metrics file.
    """
    if not exists(path):
        return
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
        if not line.strip(b" \r\0"):  # a power cut leaves zeros
            continue
        try:
            row = parse_row(line)
        except ValueError as error:
            raise CheckpointError(
                f"{path} is damaged in line {number}: {error}; mend or remove that line, or pass another --out"
            ) from None
        if kind in (None, row["kind"]):
            yield row


def last_rows(path: Path, num_bytes: int = 65536) -> list[dict[str, Any]]:
    """The complete rows within the last `num_bytes` of a metrics file that may still be growing."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - num_bytes)
        file.seek(start)
        lines = file.read().split(b"\n")
    rows = []
    for line in lines[bool(start) : -1]:
        with contextlib.suppress(ValueError):
            rows.append(parse_row(line))
    return rows


def parse_row(line: str | bytes) -> dict[str, Any]:
    """The row of a metrics file that `line` holds. Raises `ValueError` if it is none."""
    row = parse_json(line)
    require(ROW, row)
    if row["kind"] in ROWS:
        require(ROWS[row["kind"]], row)
    return row
