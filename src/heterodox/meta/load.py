"""The rater that another run trained."""

from pathlib import Path

from pydantic import ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.services import SavedRun
from heterodox.core.state import restore
from heterodox.meta.options import MetaOptions
from heterodox.meta.rater import Rater, build_rater


def rater_options(saved: SavedRun, folder: Path, tokenizer_sha256: str | None) -> MetaOptions:
    """The options that a run trained its rater with.

    Raises `RecipeError` for a run without a rater, and for one of another tokenizer than the given fingerprint's.
    """
    learner = dict(saved.recipe.get("learner") or {})
    if learner.pop("name", None) != "data_rater":
        raise RecipeError(f"{folder} trained no rater: its learner is not data_rater; give another folder")
    if tokenizer_sha256 is not None and saved.tokenizer_sha256 != tokenizer_sha256:
        raise RecipeError(
            f"the rater in {folder} reads a tokenizer with SHA-256 {saved.tokenizer_sha256[:12]}…, this run's has "
            f"{tokenizer_sha256[:12]}…: train a rater on these tokens"
        )
    try:
        return MetaOptions(**learner)
    except ValidationError as error:
        raise CheckpointError(f"{folder} has a learner section that this version cannot read: {error}") from None


def load_rater(saved: SavedRun, options: MetaOptions, folder: Path, like: Tensor) -> Rater:
    """The averaged rater that the run left, of the dtype and on the device of `like`."""
    weights = saved.learner.get("meta", {}).get("average")
    if not weights:
        raise CheckpointError(f"the checkpoint in {folder} lacks the rater")
    vocab, view = len(weights["tok_emb.weight"]), len(weights["pos_emb.weight"])
    network = build_rater(options.rater, vocab, view, like)
    parameters = dict(network.named_parameters())
    if not any(isinstance(parameter, FakeTensor) for parameter in parameters.values()):
        restore(parameters, weights, "rater parameter")
    return network
