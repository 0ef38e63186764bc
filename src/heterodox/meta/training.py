"""Meta-training a rater: inner models learn from weighted examples, the rater from how well that went.

    a round:  inner_steps − backprop_steps steps of every inner model, one at each call of `step`;
              then, in one call, the last backprop_steps of them with ∂L_meta/∂φ through them
    φ ← φ + mean over inner models of the AdamW step that each one's own moments make of its own gradient

One Adam per inner model, then the mean of their updates: gradients of young and of old models differ in size, and none
shall drown the others. Reference: Calian et al., "DataRater: Meta-learned dataset curation", 2025.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.protocols import Objective, Stateless
from heterodox.core.services import SavedRun, Services
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Diagnosis
from heterodox.meta.cost import round_cost, scoring_flops, step_cost, window_bytes
from heterodox.meta.gradient import meta_gradient
from heterodox.meta.options import MetaOptions, ScoreWeighting
from heterodox.meta.population import Population, duplicate
from heterodox.meta.problem import WeightedLoss, flat
from heterodox.meta.rater import Rater, build_rater
from heterodox.meta.steps import InnerAdamW, InnerState, InnerUpdate, clip

# How far an adjoint grows on its way back through a window, and what to say of one that explodes.


EXPLODED = 1e3
"""Growth of the adjoint over a window that is worth a warning. One that is not a number counts as infinite."""


def adjoint_growth(norms: Float[Tensor, " steps_and_end"]) -> Float[Tensor, ""]:
    """How many times its size at the end the adjoint reaches on the way back; infinite if a norm is not a number."""
    growth = norms.max() / norms[0].clamp_min(torch.finfo(norms.dtype).tiny)
    return growth.nan_to_num(torch.inf, torch.inf)


def explosion(growth: float, window: int, remedy: str) -> Diagnosis:
    """A warning if the adjoint has grown too far along a window of so many steps."""
    if growth <= EXPLODED:
        return Diagnosis()
    text = (
        f"the adjoint grew {growth:.3g} times along a window of {window} steps: the meta-gradient is that of a chaotic "
        f"run; {remedy}"
    )
    return Diagnosis(warnings=[text])


@dataclass
class MetaStep:
    """What one call of `MetaTrainer.step` did: the inner loss, the norm of the gradient, and if a round ended more."""

    loss: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    cost: Cost
    metrics: dict[str, Tensor]


class MetaTrainer:
    """A rater, the population that it is trained on, and how far it has come."""

    def __init__(self, options: MetaOptions, services: Services, objective: Objective, update: InnerUpdate) -> None:
        self.options, self.services = options, services
        self.weigh_scores = ScoreWeighting(options.weighting)
        model = services.model
        self.rater = build_rater(options.rater, model.tok_emb.num_embeddings, model.context, model.head.weight)
        self.rater.initialise(services.streams)
        self.parameters = list(self.rater.parameters())
        self.average = flat(p.detach() for p in self.parameters)

        def losses(model: Any, batch: Batch) -> Float[Tensor, " batch"]:
            return objective.losses(model(batch.inputs), batch)

        self.population = Population(options, services, losses, update)
        decay = options.weight_decay if options.moves else 0.0
        self.outer = InnerAdamW(lr=options.lr, betas=(0.9, 0.99), weight_decay=decay)
        zeros = torch.zeros_like(self.average)
        self.moments = dict.fromkeys(self.population.mine, (zeros, zeros))
        self.rounds = 0
        self.ticks = 0
        self.growth = 1.0

    def step(self, lr_scale: float = 1.0) -> MetaStep:
        """A step of every inner model, or the end of a round."""
        if self.ticks == 0 and self.rounds:
            self.population.renew()
        plain = self.options.inner_steps - self.options.backprop_steps
        if self.ticks < plain:
            found = self._advance()
            self.ticks += 1
        else:
            found = self._end_round(lr_scale)
            self.ticks, self.rounds = 0, self.rounds + 1
        self.services.comm.mean_([found.loss, found.grad_norm, *found.metrics.values()])
        if "adjoint_growth" in found.metrics:
            self.growth = max(self.growth, float(found.metrics["adjoint_growth"]))
        return found

    def _advance(self) -> MetaStep:
        """One step of every inner model of this rank, without a graph."""
        population, losses, norms = self.population, [], []
        for k, state in population.states.items():
            problem = population.problem
            problem.seed = population.seed_of(k)
            batch = population.train[k].next_batch()
            with torch.no_grad():
                weights = self._weights(batch)
            problem.move_to(state.weights)
            gradient, found = problem.gradient(batch, weights, state.step)
            population.states[k] = population.update.take(state, clip(gradient, self.options.inner_clip))
            losses.append((weights * found).mean())
            norms.append(gradient.norm())
        population.aged(1)
        cost = step_cost(self.options, self.services.model, self.rater, len(losses))
        return MetaStep(torch.stack(losses).mean(), torch.stack(norms).mean(), cost, {})

    def _end_round(self, lr_scale: float) -> MetaStep:
        """The window of every inner model of this rank, and the rater's step."""
        before = flat(p.detach() for p in self.parameters)
        outer = replace(self.outer, lr=self.options.lr * lr_scale)
        change, rows = torch.zeros_like(before), []
        for k in self.population.mine:
            gradient, row = self._window(k)
            state = outer.take(InnerState(before, self.moments[k], self.rounds), clip(gradient, self.options.clip))
            self.moments[k] = state.moments[0], state.moments[1]
            change += (state.weights - before) / len(self.population.mine)
            rows.append(row | {"grad_norm": gradient.norm()})
        self.population.aged(self.options.backprop_steps)
        self.services.comm.mean_([change])
        self._move_to(before + change)
        decay = min(self.options.ema, (1 + self.rounds) / (10 + self.rounds))
        self.average = torch.lerp(before + change, self.average, decay)
        metrics = {key: torch.stack([row[key] for row in rows]).mean() for key in rows[0]}
        loss, norm = metrics.pop("loss"), metrics.pop("grad_norm")
        cost = round_cost(self.options, self.services.model, self.rater, len(rows))
        return MetaStep(loss, norm, cost, metrics)

    def _window(self, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """φ's gradient by member `k`, which moves on, and measures of the window."""
        population, options = self.population, self.options
        batches = [population.train[k].next_batch() for _ in range(options.backprop_steps)]
        found = meta_gradient(
            population.problem.model,
            population.problem.losses,
            batches,
            self._weights,
            population.validation(k),
            population.update,
            parameters=self.parameters if options.asks else [],
            start=population.states[k],
            clip_norm=options.inner_clip,
            schedule=options.schedule,
            slots=options.slots,
            graphs=options.graphs,
            micro_batch=options.micro_batch,
            seed=population.seed_of(k),
            check=False,
        )
        population.states[k] = found.state
        gradient = flat(found.grads) if options.asks else torch.zeros_like(self.average)
        if options.control == "auxiliary":
            gradient = self._regression(batches[-1], found.losses[-1])
        if options.weighting.entropy:
            gradient = gradient + self._penalty(batches[-1])
        norms = found.adjoint_norms
        weighted = [(w * loss).mean() for w, loss in zip(found.weights, found.losses, strict=True)]
        return gradient, {
            "loss": torch.stack(weighted).mean(),
            "meta_loss": found.val_loss,
            "adjoint_norm": norms[-1],
            "adjoint_growth": adjoint_growth(norms),
        }

    def _weights(self, batch: Batch) -> Float[Tensor, " batch"]:
        """The weights that inner models train with, as the control asks."""
        control = self.options.control
        if control in ("constant", "auxiliary"):
            return torch.ones(len(batch.ids), dtype=self.average.dtype, device=self.average.device)
        weights = self.weigh_scores(self.rater(batch.inputs))
        if control == "detached":
            return weights.detach()
        if control == "shuffled":
            generator = self.services.streams.generator("rule", "shuffle", *batch.ids.tolist())
            return weights[torch.randperm(len(weights), generator=generator).to(weights.device)]
        return weights

    def _regression(self, batch: Batch, losses: Float[Tensor, " batch"]) -> Tensor:
        """∂/∂φ of the squared distance between scores and minus the losses, standardised within the batch."""
        target = -(losses - losses.mean()) / losses.std().clamp_min(1e-6)
        loss = (self.rater(batch.inputs) - target).square().mean()
        return flat(torch.autograd.grad(loss, self.parameters))

    def _penalty(self, batch: Batch) -> Tensor:
        """∂/∂φ of minus the entropy, times its strength."""
        entropy = self.weigh_scores.entropy(self.rater(batch.inputs))
        return flat(torch.autograd.grad(-self.options.weighting.entropy * entropy, self.parameters))

    @torch.no_grad()
    def scores(self, batch: Batch) -> Float[Tensor, " batch"]:
        """By the averaged rater, the one that is deployed."""
        now = flat(p.detach() for p in self.parameters)
        self._move_to(self.average)
        found = self.rater(batch.inputs)
        self._move_to(now)
        return found

    def held_bytes(self, like: Batch) -> int:
        """The most bytes held for the way back through a window, whose batches are as wide as `like`."""
        population = self.population
        first = population.states[population.mine[0]]
        problem = population.problem
        return window_bytes(
            self.options, problem.model, problem.losses, self.rater, self._weights, population.update, first, like
        )

    def scoring_flops(self, batch: Batch) -> int:
        return scoring_flops(self.rater, batch)

    def average_by_name(self) -> dict[str, Tensor]:
        """The averaged rater's parameters, copies."""
        names = dict(self.rater.named_parameters())
        pieces = self.average.split([p.numel() for p in self.parameters])
        return {name: piece.view_as(p).clone() for (name, p), piece in zip(names.items(), pieces, strict=True)}

    @torch.no_grad()
    def _move_to(self, weights: Tensor) -> None:
        pieces = weights.split([p.numel() for p in self.parameters])
        views = [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]
        torch._foreach_copy_(list(self.parameters), views)

    def state(self) -> Tree:
        """Called by all ranks. `average` is what `rating: data_rater` loads."""
        together = torch.stack([torch.stack(pair) for pair in self.moments.values()])
        return {
            "rater": {name: p.detach().clone() for name, p in self.rater.named_parameters()},
            "average": self.average_by_name(),
            "moments": self.services.comm.gather(together),
            "population": self.population.state(),
            "rounds": self.rounds,
            "ticks": self.ticks,
            "growth": self.growth,
        }

    def load_state(self, tree: Tree) -> None:
        names = {name: p.data for name, p in self.rater.named_parameters()}
        restore(names, tree.get("average", {}), "rater parameter")
        self.average = flat(p.detach() for p in self.parameters)
        restore(names, tree.get("rater", {}), "rater parameter")
        moments = tree.get("moments")
        if moments is None or len(moments) != self.options.population:
            raise CheckpointError("the checkpoint lacks the moments of the rater: it belongs to another recipe")
        self.moments = {k: (moments[k][0].clone(), moments[k][1].clone()) for k in self.population.mine}
        self.population.load_state(tree.get("population", {}))
        self.rounds, self.ticks, self.growth = tree["rounds"], tree["ticks"], tree["growth"]


# A rater trained from beginning to end within another run.


BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.1
"""The defaults of `update: adamw`, which decays matrices only."""


class TrainOptions(MetaOptions):
    """Meta-training before the run's first step, with inner models of the run's own kind, by AdamW."""

    rounds: int = Field(100, ge=1, description="meta-gradients of each inner model")
    inner_lr: float = Field(1e-3, gt=0, description="learning rate of the inner models; the rest as adamw by default")


class TokenLoss(Stateless):
    """Mean cross-entropy of each example, in nats per token."""

    def losses(self, logits: Float[Tensor, "batch time vocab"], batch: Batch) -> Float[Tensor, " batch"]:
        wide = logits if logits.dtype.itemsize >= 4 else logits.float()
        return F.cross_entropy(wide.transpose(1, 2), batch.targets, reduction="none").mean(dim=1)


def inner_adamw(options: TrainOptions, model: nn.Module) -> InnerAdamW:
    """As `update: adamw` is by default, at another learning rate."""
    learning = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    decay = flat(torch.full_like(parameter, WEIGHT_DECAY * (parameter.ndim >= 2)) for parameter in learning)
    return InnerAdamW(
        options.inner_lr, BETAS, eps_root=options.eps_root, weight_decay=decay, warmup=options.inner_warmup
    )


def rater_bytes(options: TrainOptions, services: Services, rater: Rater, weighting: ScoreWeighting, like: Batch) -> int:
    """The most bytes that `RaterTraining` will hold for a way back, with windows as wide as `like`; changes nothing."""
    model = duplicate(services.model)
    update = inner_adamw(options, model)

    def losses(model: Any, batch: Batch) -> Float[Tensor, " batch"]:
        return TokenLoss().losses(model(batch.inputs), batch)

    def weigh(batch: Batch) -> Float[Tensor, " batch"]:
        return weighting(rater(batch.inputs))

    start = update.begin(WeightedLoss(model, losses).weights())
    return window_bytes(options, model, losses, rater, weigh, update, start, like)


class RaterTraining:
    """A rater's training from beginning to end, a step of the inner models (or the end of a round) at a time."""

    def __init__(self, options: TrainOptions, services: Services) -> None:
        self.options = options
        self.trainer = MetaTrainer(options, services, TokenLoss(), inner_adamw(options, services.model))
        self.spent = Cost()
        """What this rank has spent so far."""

    @property
    def done(self) -> bool:
        return self.trainer.rounds >= self.options.rounds

    @property
    def between_rounds(self) -> bool:
        return self.trainer.ticks == 0

    @property
    def growth(self) -> float:
        """How far an adjoint grew at most."""
        return self.trainer.growth

    def step(self) -> None:
        """Take a step. Raises `RecipeError` where a gradient or the rater is not finite: it would score nothing."""
        trainer, options = self.trainer, self.options
        found = trainer.step()
        self.spent += found.cost
        where = f"round {trainer.rounds} of rating.train"
        if not found.grad_norm.isfinite():
            raise RecipeError(
                f"the meta-gradient of {where} is not finite: the inner models have diverged or are chaotic; lower "
                f"rating.train.inner_lr {options.inner_lr:g}, shorten rating.train.backprop_steps "
                f"{options.backprop_steps}, or raise batch_size {options.batch_size}"
            )
        if not trainer.average.isfinite().all():
            raise RecipeError(f"the rater is not finite behind {where}; lower rating.train.lr {options.lr:g}")

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged rater's weights by name."""
        return self.trainer.average_by_name()

    def state(self) -> Tree:
        return {"trainer": self.trainer.state(), "spent": asdict(self.spent)}

    def load_state(self, tree: Tree) -> None:
        self.trainer.load_state(tree["trainer"])
        self.spent = Cost(**tree["spent"])


# The rater that another run trained: as its learner, or before its first step for its own rating.


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
