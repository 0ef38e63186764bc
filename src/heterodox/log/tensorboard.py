"""Metrics for TensorBoard, written by tensorboardX beside the JSONL file.

Of tensorboardX only the synchronous half is used: its queue would wait for ever on a disk that is full.
"""

import time
from pathlib import Path
from typing import Any

from heterodox.core.errors import CheckpointError, RecipeError


def require_tensorboard() -> None:
    """Raises `RecipeError` where tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401  (is it there?)
    except ImportError:
        raise RecipeError("log.tensorboard needs the tensorboard extra: pip install 'heterodox[tensorboard]'") from None


class TensorBoard:
    """Scalars of every row under `folder`; look at them with `tensorboard --logdir`.

    Opened at `step`, it hides what a killed run wrote of later steps.
    """

    def __init__(self, folder: Path, step: int) -> None:
        require_tensorboard()
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
        from tensorboardX.summary import scalar

        self.folder = folder
        self._event, self._scalar = Event, scalar
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            self._writer.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror}") from None

    def row(self, row: dict[str, Any]) -> None:
        if row["kind"] == "probe":
            values = {
                f"{measure}/{parameter}": value
                for parameter, measures in row["alignment"].items()
                for measure, value in measures.items()
            }
        else:
            values = {f"{row['kind']}/{key}": value for key, value in row.items() if key not in ("kind", "step")}
        try:
            for tag, value in values.items():
                if isinstance(value, (int, float)):
                    event = self._event(wall_time=time.time(), step=row["step"], summary=self._scalar(tag, value))
                    self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.folder}: {error.strerror}") from None

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.folder}: {error.strerror}") from None
