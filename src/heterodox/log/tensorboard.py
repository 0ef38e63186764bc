"""Metrics for TensorBoard, written by tensorboardX beside the JSONL file."""

from pathlib import Path
from typing import Any

from heterodox.core.errors import RecipeError


class TensorBoard:
    """Scalars of every row under `folder`; look at them with `tensorboard --logdir`."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise RecipeError(
                "log.tensorboard needs the tensorboard extra: pip install 'heterodox[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def row(self, row: dict[str, Any]) -> None:
        step = row["step"]
        if row["kind"] == "probe":
            for parameter, measures in row["alignment"].items():
                for measure, value in measures.items():
                    if value is not None:
                        self._writer.add_scalar(f"{measure}/{parameter}", value, step)
            return
        for key, value in row.items():
            if key not in ("kind", "step") and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{row['kind']}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()
