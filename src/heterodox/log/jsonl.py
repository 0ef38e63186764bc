"""`metrics.jsonl`: one JSON object a line, the truth about a run."""

import json
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
            temporary.write_text("".join(kept))
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from None

    def row(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file, of one kind if given; a line that a killed process left unfinished is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            row = json.loads(line)
            if kind is None or row["kind"] == kind:
                yield row


def last_rows(path: Path, num_bytes: int = 65536) -> list[dict[str, Any]]:
    """The complete rows within the last `num_bytes` of a metrics file that may still be growing."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - num_bytes)
        file.seek(start)
        lines = file.read().split(b"\n")
    return [json.loads(line) for line in lines[bool(start) : -1]]
