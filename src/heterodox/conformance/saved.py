"""What runs left in their folders, compared to the bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterodox.conformance.violation import require
from heterodox.core.state import split
from heterodox.log.jsonl import read_rows
from heterodox.run.checkpoint import Checkpoints


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the run's last checkpoint: weights and everything that its parts remember."""
    model, state, values = Checkpoints(folder / "checkpoints").load()
    found = split({"model": model, "state": state})[0]
    return found | {"progress": torch.tensor([values["progress"][key] for key in ("step", "tokens", "flops")])}


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without the seconds that they took."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def require_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """Require that both hold the same tensors, bit for bit."""
    require(a.keys() == b.keys(), f"{what}: {sorted(a.keys() ^ b.keys())} are on one side only")
    apart = [name for name in a if not torch.equal(a[name], b[name])]
    require(not apart, f"{what}: {len(apart)} of {len(a)} tensors differ, {apart[:1]} for one")
