"""What runs left in their folders, compared to the bit."""

from pathlib import Path
from typing import Any

import torch

from heterodox.core.state import split
from heterodox.log.jsonl import read_rows
from heterodox.run.checkpoint import Checkpoints


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the run's last checkpoint: weights and everything that its parts remember."""
    model, state, values = Checkpoints(folder / "checkpoints").load()
    found = split({"model": model, "state": state})[0]
    return found | {"progress": torch.tensor([values["progress"][key] for key in ("step", "tokens", "flops")])}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Assert that both hold the same tensors, bit for bit."""
    assert a.keys() == b.keys()
    assert len(a) > 10
    for name in a:
        assert torch.equal(a[name], b[name]), name


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without the seconds that they took."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]
