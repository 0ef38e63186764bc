"""What a part may see of another run: its recipe, what its learner remembers, its tokenizer."""

from pathlib import Path

from torch._subclasses.fake_tensor import unset_fake_temporarily

from heterodox.core.errors import CheckpointError
from heterodox.core.files import as_path
from heterodox.core.services import SavedRun
from heterodox.data import load_tokenizer
from heterodox.run.folder import RunFolder


def open_run(path: Path) -> SavedRun:
    """The run in folder `path` at its latest checkpoint.

    Raises `CheckpointError` for a folder that is no run, or whose checkpoint is missing or damaged.
    """
    folder = RunFolder(as_path(path))
    recipe = folder.read_recipe()
    with unset_fake_temporarily():  # a plan asks, too
        _, state, _ = folder.checkpoints.load()
    if not isinstance(state.get("learner"), dict):
        raise CheckpointError(f"{path} holds nothing that a learner remembers")
    return SavedRun(recipe, state["learner"], load_tokenizer(folder.tokenizer).fingerprint)
