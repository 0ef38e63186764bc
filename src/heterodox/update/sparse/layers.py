"""Which matrices are sparse."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from heterodox.core.errors import RecipeError
from heterodox.core.protocols import LanguageModel


def choose_layers(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The model's matrices whose names match a shell-style pattern; by default all but embeddings and head.

    Raises `RecipeError` for a pattern that matches none.
    """
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    if patterns is None:
        dense = model.embedding_names | model.readout_names if isinstance(model, LanguageModel) else frozenset()
        return {name: parameter for name, parameter in matrices.items() if name not in dense}
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in matrices if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.weight")}
        if not found:
            raise RecipeError(
                f"update.layers: {pattern!r} matches none of the model's {len(matrices)} matrices, which are called "
                f"{', '.join(list(matrices)[:3])}, …"
            )
        chosen |= found
    return {name: parameter for name, parameter in matrices.items() if name in chosen}
