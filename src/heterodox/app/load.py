"""Opening a finished (or stopped) run again."""

from dataclasses import dataclass

from heterodox.app.folder import RunFolder
from heterodox.app.recipe import Recipe, check
from heterodox.app.session import build_model, choose_device
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import PathLike, as_path
from heterodox.core.protocols import LanguageModel
from heterodox.core.state import Tree, restore
from heterodox.data import load_tokenizer
from heterodox.data.tokenizers import Tokenizer
from heterodox.training.checkpoint import require_run


@dataclass
class TrainedRun:
    """A run folder's recipe, tokenizer and model, and what a checkpoint holds besides weights."""

    folder: RunFolder
    recipe: Recipe
    tokenizer: Tokenizer
    model: LanguageModel
    learner_state: Tree
    loader_state: Tree
    step: int
    corpus_sha256: str


def load_run(path: PathLike, checkpoint: str | None = None, device: str = "cpu") -> TrainedRun:
    """The run in folder `path` at `checkpoint`, by default the latest; the model is in eval mode.

    Raises `CheckpointError` for a folder that is no run, or whose checkpoint is missing or damaged.
    """
    folder = RunFolder(as_path(path))
    try:
        recipe = check(folder.read_recipe())
    except RecipeError as error:
        raise CheckpointError(f"cannot use {folder.path / 'recipe.yaml'}: {error}") from None
    weights, state, values = folder.checkpoints.load(checkpoint)
    require_run(folder.path, state, values)
    tokenizer = load_tokenizer(folder.tokenizer)
    model = build_model(recipe, tokenizer.vocab_size, choose_device(device))
    restore(dict(model.state_dict()), weights, "weight")
    model.eval()
    step, corpus = values["progress"]["step"], values["corpus_sha256"]
    return TrainedRun(folder, recipe, tokenizer, model, state["learner"], state["loader"], step, corpus)
