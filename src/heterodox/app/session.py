"""From a recipe to the objects that train: data, model, parts, learner."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from heterodox.app.folder import open_run
from heterodox.app.recipe import Recipe
from heterodox.core.comm import Comm, local_rank
from heterodox.core.errors import RecipeError
from heterodox.core.protocols import LanguageModel, Learner
from heterodox.core.rng import Streams
from heterodox.core.services import Batches, Connected, Services, Supply, no_supply
from heterodox.core.types import Batch, LabelledBatch
from heterodox.data import Dataset, Loader, evaluation_batches, labelled_batches
from heterodox.training.config import DEVICES, RunConfig
from heterodox.training.loop import TrainingSession

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass
class Session(TrainingSession):
    """Everything that one run is made of."""

    recipe: Recipe
    device: str
    streams: Streams
    comm: Comm
    dataset: Dataset
    model: LanguageModel
    learner: Learner
    loader: Batches
    inputs: dict[str, str] = field(default_factory=dict)
    """Hashes of what was read from outside besides the corpus, by the recipe's keys."""

    @property
    def config(self) -> RunConfig:
        return self.recipe.run

    @cached_property
    def val_batches(self) -> Sequence[Batch]:
        return self._held_out("val")

    @cached_property
    def test_batches(self) -> Sequence[Batch]:
        return self._held_out("test")

    def _held_out(self, split: str) -> Sequence[Batch]:
        run = self.recipe.run
        return evaluation_batches(
            self.dataset.splits[split],
            context=self.recipe.model.context,
            batch_size=run.eval_batch_size,
            max_batches=run.eval_batches,
            streams=self.streams,
            rank=self.comm.rank,
            world_size=self.comm.world_size,
        )

    @cached_property
    def labelled_batches(self) -> list[LabelledBatch]:
        """Windows of val with the noise that train has, on every rank alike; none where train has none."""
        noisy = self.dataset.noisy("val")
        if noisy is None:
            return []
        run, context = self.recipe.run, self.recipe.model.context
        return labelled_batches(noisy, self.dataset.kinds, context, run.eval_batch_size, self.device)

    @cached_property
    def prompt(self) -> list[int]:
        """The tokens before the sample at the end of the run: `run.sampling.prompt`, or the first of val."""
        text = self.recipe.run.sampling.prompt
        if text is None:
            return [int(token) for token in self.dataset.splits["val"].tokens[:16]]
        if not text:
            raise RecipeError("run.sampling.prompt is empty; give it a character, or leave it out")
        return [int(token) for token in self.dataset.tokenizer.encode(text)]

    def dropout_seed(self, step: int) -> int | None:
        """The seed of `step`'s dropout masks on this rank; None for a model without dropout."""
        if not self.recipe.model.dropout:
            return None
        return self.streams.derive("dropout", step, self.comm.rank)

    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` holds: for each parameter where its signal comes from, its shape and its size."""
        origins, remarks = self.learner.manifest(), self.learner.remarks()
        remarks = [
            *remarks,
            *(f"{what}: in float32, though run.precision is bfloat16" for what in self.recipe.in_float32()),
        ]
        return {
            "credit": self.recipe.credit.name,
            "update": self.recipe.update.name,
            "parameters": {
                name: {"origin": origins[name], "shape": list(p.shape), "size": p.numel()}
                for name, p in self.model.named_parameters()
            },
            **({"remarks": remarks} if remarks else {}),
        }


def choose_device(name: str) -> str:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means on this machine, for this rank.

    Raises `RecipeError` where CUDA is asked for and there is none.
    """
    if not re.fullmatch(DEVICES, name):
        raise RecipeError(f"there is no device {name!r}; expected auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"run.device is {name!r}, but this machine has no usable CUDA device; use cpu or auto")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise RecipeError(f"run.device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if name.startswith("cuda:"):
        return name
    return f"cuda:{local_rank()}"


def set_threads(threads: int | None) -> None:
    """Let PyTorch use so many CPU threads; by default as many as it chooses."""
    if threads is not None:
        torch.set_num_threads(threads)


def recipe_fingerprint(recipe: Recipe) -> str:
    """Return a hash of all in a recipe that the ranks of a run must have in common."""
    data = {key: value for key, value in recipe.dump().items() if key not in ("log", "description", "tuning")}
    data["data"] = {key: value for key, value in data["data"].items() if key != "cache"}
    data["run"] = {key: value for key, value in data["run"].items() if key not in ("threads", "device")}
    data["data"]["corpus"].pop("path", None)  # the text is compared by its hash
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of all weights and buffers, bit by bit."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def build_model(recipe: Recipe, vocab_size: int, device: str) -> LanguageModel:
    """The recipe's model with its initial weights.

    Raises `RecipeError` where `model.vocab_size` is smaller than the tokenizer's.
    """
    wanted = recipe.model.vocab_size or vocab_size
    if wanted < vocab_size:
        raise RecipeError(
            f"model.vocab_size is {wanted}, but the tokenizer has {vocab_size} tokens; leave it out or raise it"
        )
    model = recipe.model.build(wanted, Streams(recipe.seed))
    for parameter in model.parameters():  # not `model.to`, which cannot convert the fake tensors of a plan
        parameter.data = parameter.data.to(device, DTYPES[recipe.run.precision])
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device, DTYPES[recipe.run.precision] if buffer.is_floating_point() else None)
    if recipe.run.precision == "bfloat16":
        model.autocast_dtype = torch.bfloat16
    return model


def build_learner(
    recipe: Recipe,
    model: LanguageModel,
    comm: Comm,
    supply: Supply = no_supply,
    tokenizer_sha256: str | None = None,
    inputs: dict[str, str] | None = None,
) -> Any:
    """The recipe's learner of its four parts around `model`, each connected to the run's services if it asks for them.

    It is a `core.protocols.Learner`; which one, the recipe says. Parts note in `inputs` what they read from outside.
    """
    streams, noted = Streams(recipe.seed), {} if inputs is None else inputs
    services = Services(model, streams, comm, supply, recipe.run.budget.steps, open_run, tokenizer_sha256, noted)
    parts: dict[str, Any] = {
        "objective": recipe.objective.build(),
        "rating": recipe.rating.build(),
        "credit": recipe.credit.build(model, streams),
        "update": recipe.update.build(),
    }
    for part in parts.values():
        if isinstance(part, Connected):
            part.connect(services)
    learner = recipe.learner.build(model=model, comm=comm, **parts)
    if isinstance(learner, Connected):
        learner.connect(services)
    return learner


def supply_of(recipe: Recipe, dataset: Dataset, streams: Streams, comm: Comm, device: str = "cpu") -> Supply:
    """Opens batches of `dataset` for this rank."""

    def supply(
        split: str,
        batch_size: int,
        order: str | int = 0,
        *,
        whole: bool = False,
        without: Int[Tensor, " ids"] | None = None,
    ) -> Loader:
        return Loader(
            dataset.splits[split],
            context=recipe.model.context,
            batch_size=batch_size,
            streams=streams,
            rank=0 if whole else comm.rank,
            world_size=1 if whole else comm.world_size,
            device=device,
            order=order,
            without=without,
        )

    return supply


def open_session(recipe: Recipe, comm: Comm, device: str) -> Session:
    """Build it all. Raises `CorpusError` and `RecipeError` for what the recipe alone could not show."""
    if recipe.run.batch_size % comm.world_size:
        raise RecipeError(f"run.batch_size {recipe.run.batch_size} cannot be divided among {comm.world_size} ranks")
    streams = Streams(recipe.seed)
    comm.require_agreement("recipe", recipe_fingerprint(recipe))
    dataset = comm.together(recipe.data.build)
    comm.require_agreement("corpus (data.corpus)", dataset.corpus_sha256)
    comm.require_agreement("tokenizer", dataset.tokenizer.fingerprint)
    model = build_model(recipe, dataset.tokenizer.vocab_size, device)
    supply = supply_of(recipe, dataset, streams, comm, device)
    inputs = {"data.tokenizer": dataset.tokenizer.fingerprint}
    if recipe.data.filter is not None and (chosen := dataset.splits["train"].examples) is not None:
        inputs["data.filter.scores"] = hashlib.sha256(chosen.ids.astype("<i8").tobytes()).hexdigest()
    learner = build_learner(recipe, model, comm, supply, dataset.tokenizer.fingerprint, inputs)
    comm.require_agreement("set of initial weights", weights_fingerprint(model))
    learner.begin()
    loader = supply("train", recipe.rating.drawn(recipe.run.batch_size))
    session = Session(recipe, device, streams, comm, dataset, model, learner, loader, inputs)
    # Too short a split or a prompt that cannot be written shows here, before anything is.
    _ = session.val_batches, session.test_batches, session.prompt
    return session


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_folder(recipe: Recipe) -> Path:
    return Path("runs") / f"{recipe.name}-seed{recipe.seed}"
