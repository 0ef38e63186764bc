"""Moments in a checkpoint: an update makes them as it needs them, so their names are saved beside them."""

from collections.abc import Iterable

from heterodox.core.errors import CheckpointError
from heterodox.core.state import Tree


def check_names(saved: Tree, found: Iterable[str], what: str) -> None:
    """Raise `CheckpointError` unless `found` are the names that `saved` says it was written with."""
    if "names" not in saved:
        raise CheckpointError(f"the checkpoint lacks the {what} every parameter: it belongs to another recipe")
    if differing := set(saved["names"]) ^ set(found):
        name = min(differing)
        place = "lacks the" if name in saved["names"] else "has unknown"
        raise CheckpointError(f"the checkpoint {place} {what} {name!r}: it is damaged, or belongs to another recipe")
