"""State trees: what resumable objects put into a checkpoint.

A tree is a nested dict whose leaves are tensors or JSON values. `split` and `join` turn it into the two files that a
checkpoint holds: tensors under slash-joined paths (safetensors) and everything else (JSON).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic_core import PydanticSerializationError, to_jsonable_python
from torch import Tensor

from heterodox.core.errors import CheckpointError, RecipeError

Tree = dict[str, Any]


@runtime_checkable
class Stateful(Protocol):
    """Has something to remember between two steps."""

    def state(self) -> Tree: ...

    def load_state(self, tree: Tree) -> None: ...


def split(tree: Tree, path: str = "") -> tuple[dict[str, Tensor], Tree]:
    """Separate a tree into its tensors by path and the JSON values around them."""
    tensors: dict[str, Tensor] = {}
    values: Tree = {}
    for key, leaf in tree.items():
        assert "/" not in key, f"state keys may not hold a slash: {key!r}"
        if isinstance(leaf, Tensor):
            tensors[path + key] = leaf.detach().contiguous()
        elif isinstance(leaf, dict):
            below, values[key] = split(leaf, f"{path}{key}/")
            tensors |= below
        else:
            values[key] = leaf
    return tensors, values


def join(tensors: dict[str, Tensor], values: Tree) -> Tree:
    """The inverse of `split`."""
    tree = _copy(values)
    for path, tensor in tensors.items():
        *folders, key = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path} is a tensor, and {folder} a value")
        node[key] = tensor
    return tree


def map_tensors(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    """The same tree with `function` of every tensor."""
    tensors, values = split(tree)
    return join({path: function(tensor) for path, tensor in tensors.items()}, values)


@torch.no_grad()
def restore(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy `saved` into `tensors` in place. Raises `CheckpointError` where names or shapes differ."""
    if tensors.keys() != saved.keys():
        name = min(tensors.keys() ^ saved.keys())
        place = "lacks" if name in tensors else "has an unknown"
        raise CheckpointError(f"the checkpoint {place} {what} {name!r}: it belongs to another recipe")
    for name, tensor in tensors.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"the checkpoint's {what} {name!r} has shape {tuple(saved[name].shape)}, the recipe's model needs "
                f"{tuple(tensor.shape)}: it belongs to another model"
            )
        tensor.copy_(saved[name])


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Within the context, a saved state of another form is a `CheckpointError` that names the run in `path`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint of {path} does not fit ({type(error).__name__}: {error}); "
            "it is damaged, or of another version"
        ) from error


def _copy(values: Tree) -> Tree:
    return {key: _copy(leaf) if isinstance(leaf, dict) else leaf for key, leaf in values.items()}


# Values as a recipe's file can hold them.


def plain(value: Any) -> Any:
    """A copy of the value in lists, dicts, strings and numbers, from paths, configs and arrays, too.

    Raises RecipeError for what has no such form.
    """
    try:
        return to_jsonable_python(value, fallback=lambda other: other.tolist())
    except (PydanticSerializationError, AttributeError, ValueError, RecursionError):
        raise RecipeError(f"{repr(value)[:80]} cannot stand in a recipe") from None
