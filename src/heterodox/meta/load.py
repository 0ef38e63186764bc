"""The rater that another run trained: as its learner, or before its first step for its own rating."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from pydantic import ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.services import SavedRun
from heterodox.core.state import restore
from heterodox.meta.options import MetaOptions
from heterodox.meta.rater import Rater, build_rater
from heterodox.meta.session import TrainOptions


def rater_section(recipe: Mapping[str, Any]) -> Literal["learner", "rating.train"] | None:
    """Where a recipe has the options of the rater that its run trains; None where it trains none."""
    learner, rating = recipe.get("learner") or {}, recipe.get("rating") or {}
    if learner.get("name") == "data_rater":
        return "learner"
    return "rating.train" if rating.get("name") == "data_rater" and rating.get("train") else None


def rater_options(saved: SavedRun, folder: Path, tokenizer_sha256: str | None) -> MetaOptions:
    """The options that a run trained its rater with.

    Raises `RecipeError` for a run without a rater, and for one of another tokenizer than the given fingerprint's.
    """
    section = rater_section(saved.recipe)
    if section is None:
        raise RecipeError(
            f"{folder} trained no rater: its learner is not data_rater, and it has no rating.train; give another folder"
        )
    if tokenizer_sha256 is not None and saved.tokenizer_sha256 != tokenizer_sha256:
        raise RecipeError(
            f"the rater in {folder} reads a tokenizer with SHA-256 {saved.tokenizer_sha256[:12]}…, this run's has "
            f"{tokenizer_sha256[:12]}…: train a rater on these tokens"
        )
    try:
        if section == "rating.train":
            return TrainOptions(**saved.recipe["rating"]["train"])
        return MetaOptions(**{key: value for key, value in saved.recipe["learner"].items() if key != "name"})
    except ValidationError as error:
        raise CheckpointError(f"{folder} has a section {section} that this version cannot read: {error}") from None


def load_rater(saved: SavedRun, options: MetaOptions, folder: Path, like: Tensor) -> Rater:
    """The rater that the run left, averaged over its training, of the dtype and on the device of `like`.

    Raises `CheckpointError` where there is none, not yet, or none of finite weights.
    """
    weights = _weights(saved, folder)
    vocab, view = len(weights["tok_emb.weight"]), len(weights["pos_emb.weight"])
    network = build_rater(options.rater, vocab, view, like)
    parameters = dict(network.named_parameters())
    if not any(isinstance(parameter, FakeTensor) for parameter in parameters.values()):
        restore(parameters, weights, "rater parameter")
    return network


def rater_fingerprint(saved: SavedRun, folder: Path) -> str:
    """SHA-256 of the averaged rater's weights."""
    with unset_fake_temporarily():
        return hashlib.sha256(safetensors.torch.save(dict(_weights(saved, folder)))).hexdigest()


def _weights(saved: SavedRun, folder: Path) -> Mapping[str, Tensor]:
    """The averaged rater's, by name."""
    if rater_section(saved.recipe) == "rating.train":
        rating = saved.learner.get("rating", {})
        if not rating.get("trained"):
            raise CheckpointError(f"{folder} was stopped before it trained its rater; go on with --resume")
        weights = rating.get("rater")
    else:
        weights = saved.learner.get("meta", {}).get("average")
    if not weights:
        raise CheckpointError(f"the checkpoint in {folder} lacks the rater")
    with unset_fake_temporarily():  # a plan asks, too
        finite = all(bool(tensor.isfinite().all()) for tensor in weights.values())
    if not finite:
        raise CheckpointError(f"the rater in {folder} has weights that are not finite; train it at a lower rate")
    return weights
