"""What the log is told of masks."""

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heterodox.core.comm import Comm
from heterodox.update.sparse.masks import Masks

if TYPE_CHECKING:
    from heterodox.update.sparse.update import Sparse


def agree(comm: Comm, masks: Masks) -> None:
    """Assert that all ranks have the same masks."""
    if comm.world_size == 1:
        return
    sums = comm.gather(torch.tensor([masks.checksum()], dtype=torch.int64, device=masks.flat.device)).tolist()
    assert len(set(sums)) == 1, f"the ranks' masks differ: checksums {sums}"


def mask_row(update: "Sparse", before: Tensor | None) -> dict[str, Any]:
    """The masks as they are, and how they differ from those `before`."""
    masks, flat = update.masks, update.masks.flat
    dead = masks.dead()
    layers = {
        name: {"active": active, "size": size, "dead_outputs": dead[name][0], "dead_inputs": dead[name][1]}
        for name, active, size in zip(masks.names, masks.counts(), masks.sizes, strict=True)
    }
    kept = int((flat & before).sum()) if before is not None else update.num_active
    previous = int(before.sum()) if before is not None else update.num_active
    return {
        "kind": "mask",
        "event": update.num_events,
        "active": update.num_active,
        "size": masks.size,
        "grown": update.num_active - kept,
        "dropped": previous - kept,
        "overlap": kept / max(previous, 1),
        "explored": int(update.ever.sum()) / masks.size,
        "checksum": masks.checksum(),
        "search_seconds": update.search_seconds,
        "layers": layers,
    }


def now(like: Tensor) -> float:
    """Seconds on a clock, when the device that holds `like` has done what it was asked."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
