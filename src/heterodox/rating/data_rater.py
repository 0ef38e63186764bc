"""Filter or reweight examples by a meta-learned rater."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.services import Services, no_supply
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Diagnosis
from heterodox.meta.cost import training_cost
from heterodox.meta.options import ScoreWeighting, surrogates, too_wide
from heterodox.meta.population import check_population
from heterodox.meta.rater import Rater, build_rater
from heterodox.meta.training import (
    RaterTraining,
    TrainOptions,
    explosion,
    load_rater,
    rater_bytes,
    rater_fingerprint,
    rater_options,
)
from heterodox.rating.base import KEEP, Filter, RatingConfig, num_drawn


class DataRater(Filter):
    """Filter or reweight examples by a meta-learned rater.

        filter     the bottom of a batch drawn larger is dropped, and what is left counts alike
        reweight   w_i = n·s_i / Σ_j s_j over the global batch, s = weighting(R(x; φ))

    `rater` is the folder of a run that trained one, as its learner or by `train`; its averaged weights are used, and
    stay as they are. With `train` instead, the rater is meta-trained within this run, before its first step, and the
    run is charged for it: every token and every FLOP. Reference: Calian et al., "DataRater: Meta-learned dataset
    curation", 2025.

    Scores of a rater that no longer learns.
    """

    class Config(RatingConfig):
        name: Literal["data_rater"] = "data_rater"
        keep: float | None = Field(
            None, gt=0, le=1, description=f"filter: share of the examples drawn that is kept, the best; default: {KEEP}"
        )
        rater: Path | None = Field(None, description="folder of the run that trained the rater")
        train: TrainOptions | None = Field(None, description="instead: train it here, before the first step")
        mode: Literal["filter", "reweight"] = Field("filter", description="drop the worst, or weight every example")

        @model_validator(mode="after")
        def _one_source(self) -> "DataRater.Config":
            if (self.rater is None) == (self.train is None):
                found = "neither" if self.rater is None else "both"
                raise ValueError(f"give rater, a run folder, or train, a section; found {found}")
            if self.mode == "reweight" and self.keep is not None:
                raise ValueError(f"keep {self.keep:g} is for the mode filter only; reweight keeps every example")
            return self

        def in_float32(self) -> list[str]:
            return (
                []
                if self.train is None
                else ["the inner models of rating.train, their optimizer and the meta-gradient"]
            )

        def drawn(self, batch_size: int) -> int:
            return batch_size if self.mode == "reweight" else num_drawn(batch_size, self.keep or KEEP)

        def refusals(self, recipe: config.Config) -> list[str]:
            needs: Any = recipe
            reasons = []
            if self.mode == "reweight" and needs.run.batch_size == 1:
                reasons.append("rating.mode reweight weighs the examples of a batch, and run.batch_size is 1; raise it")
            if self.train is None:
                return reasons
            if needs.model.name != "gpt":
                return [*reasons, f"rating.train trains inner models, which must be a gpt; found {needs.model.name}"]
            reasons += too_wide(self.train, needs.model, "rating.train")
            return reasons + surrogates(needs.model, "rating.train")

        def build(self) -> "DataRater":
            return DataRater(keep=self.keep or KEEP, mode=self.mode, rater=self.rater, train=self.train)

    network: Rater
    weigh: ScoreWeighting
    services: Services

    def __init__(
        self,
        *,
        keep: float = KEEP,
        mode: Literal["filter", "reweight"] = "filter",
        rater: Path | None = None,
        train: TrainOptions | None = None,
    ) -> None:
        super().__init__(keep=keep if mode == "filter" else 1.0)
        self.mode = mode
        self.folder = rater
        self.train = train
        self.trained = train is None
        self.growth = 1.0
        self.training: RaterTraining | None = None
        self._owed = Cost()

    def connect(self, services: Services) -> None:
        """Raises `RecipeError` where the rater has learned from another tokenizer's ids, or is none."""
        super().connect(services)
        self.services = services
        model = services.model
        if self.train is not None:
            options = self.train
            if services.supply is not no_supply:
                check_population(options, services, "rating.train")
            vocab = model.tok_emb.num_embeddings
            self.network = build_rater(options.rater, vocab, model.context, model.head.weight)
            self.network.initialise(services.streams)
        else:
            assert self.folder is not None
            saved = services.open_run(self.folder)
            options = rater_options(saved, self.folder, services.tokenizer_sha256)
            self.network = load_rater(saved, options, self.folder, model.head.weight)
            services.inputs["rating.rater"] = rater_fingerprint(saved, self.folder)
        self.weigh = ScoreWeighting(options.weighting)

    def score(self, batch: Batch) -> Float[Tensor, " batch"]:
        while self.prepare():
            pass
        with torch.no_grad():
            return self.network(batch.inputs)

    def select(self, batch: Batch) -> Batch:
        return super().select(batch) if self.mode == "filter" else batch

    def weights(self, batch: Batch) -> Float[Tensor, " batch"]:
        if self.mode == "filter":
            return super().weights(batch)
        scores = self.comm.gather(self.score(batch))
        weights = self.weigh(scores)
        size = len(batch.ids)
        return (weights / weights.mean())[self.comm.rank * size : (self.comm.rank + 1) * size]

    def cost(self, batch: Batch) -> Cost:
        owed, self._owed = self._owed, Cost()
        return super().cost(batch) + owed

    def flops(self, batch: Batch) -> int:
        return self.network.forward_flops(*batch.inputs.shape).total

    def upfront(self) -> Cost:
        """Of the rater's training, if that is yet to come."""
        if self.train is None or self.trained:
            return Cost()
        members = self.train.population // self.services.comm.world_size
        return training_cost(self.train, self.train.rounds, self.services.model, self.network, members)

    def held_bytes(self, batch: Batch) -> int:
        """Of the rater's training, if that is yet to come: of the way back through a window of one inner model."""
        if self.train is None or self.trained:
            return 0
        return rater_bytes(self.train, self.services, self.network, self.weigh, batch)

    def diagnose(self) -> Diagnosis:
        """Whether the adjoint exploded in the rater's training."""
        growth, self.growth = self.growth, 1.0
        window = self.train.backprop_steps if self.train else 0
        return explosion(growth, window, "shorten rating.train.backprop_steps or lower rating.train.inner_lr")

    def prepare(self) -> bool:
        """Take a step of the rater's training; return whether there is more of it to come."""
        if self.trained:
            return False
        training = self._training()
        training.step()
        if training.done:
            restore(dict(self.network.named_parameters()), training.weights(), "rater parameter")
            self._owed, self.growth = training.spent, training.growth
            self.training, self.trained = None, True
        return not self.trained

    @property
    def prepared_whole(self) -> bool:
        """Whether the training stands between two rounds."""
        return self.training is None or self.training.between_rounds

    def _training(self) -> RaterTraining:
        assert self.train is not None
        if self.training is None:
            self.training = RaterTraining(self.train, self.services)
        return self.training

    def state(self) -> Tree:
        if self.train is None:
            return {}
        tree: Tree = {"trained": self.trained, "growth": self.growth, "rater": dict(self.network.state_dict())}
        if self.training is not None:
            tree["training"] = self.training.state()
        if self.trained and self._owed != Cost():  # its cost is charged in the first step
            tree["owed"] = asdict(self._owed)
        return tree

    def load_state(self, tree: Tree) -> None:
        if self.train is not None:
            restore(dict(self.network.named_parameters()), tree.get("rater", {}), "rater parameter")
            self.trained, self.growth = bool(tree["trained"]), float(tree["growth"])
            self._owed = Cost(**tree.get("owed", {}))
            if "training" in tree:
                self._training().load_state(tree["training"])
