"""Meta-learn which examples to train on: a rater whose weights make inner models better at held-out text."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.comm import Comm
from heterodox.core.protocols import Credit, Foretold, LanguageModel, Objective, Rating, Update
from heterodox.core.services import Services
from heterodox.core.state import Tree
from heterodox.core.types import Batch, Cost, Diagnosis, LabelledBatch, Limit, Origin, StepReport
from heterodox.meta.cost import training_cost
from heterodox.meta.options import MetaOptions, surrogates, too_wide
from heterodox.meta.population import check_population
from heterodox.meta.rater import auc_by_kind
from heterodox.meta.steps import InnerAdamW, InnerSGD, InnerUpdate
from heterodox.meta.training import MetaTrainer, explosion
from heterodox.update import SGD, AdamW

EXPLODING = (
    "The inner models have diverged or are chaotic, so that the meta-gradient is not a number: shorten "
    "learner.backprop_steps, lower update.lr, or raise learner.inner_warmup or learner.batch_size."
)

NOT_FINITE = (
    "The rater has diverged: lower learner.lr or learner.weight_decay, set learner.clip, or, where the loss is not "
    "finite either, lower update.lr."
)


class DataRater:
    """Meta-learn which examples to train on: a rater whose weights make inner models better at held-out text.

        θ ← AdamW(θ, clip(∇ mean_i w_i ℓ_i(θ))),   w = weighting(R(x; φ));      φ ← φ − Adam(∂L_meta(θ after the
        window)/∂φ)

    The product of such a run is the rater (`rating: data_rater` loads it); what is evaluated as the run's model is
    inner model number 0. Of each round's `inner_steps` the last `backprop_steps` are differentiated, by an explicit
    adjoint through the optimizer's steps (`heterodox.meta.gradient`), whose memory grows by a few stored states only.
    `credit` must be backprop; `update` is the inner models' optimizer; the run's schedule scales the rater's learning
    rate. The run's own batches are only scored, for the log: inner models draw theirs from `train` and are judged on
    `meta`.

    Reference: Calian et al., "DataRater: Meta-learned dataset curation", 2025. We deviate in going through AdamW with
    clip exactly rather than through a mixed-mode approximation, and in what the window may be: 1500 steps are possible.

    One step is one step of every inner model, or the end of a round.
    """

    class Config(MetaOptions):
        name: Literal["data_rater"] = "data_rater"

        def in_float32(self) -> list[str]:
            return ["the inner models of learner data_rater, their optimizer and the meta-gradient"]

        def refusals(self, recipe: config.Config) -> list[str]:
            return _refusals(self, recipe)

        def build(
            self,
            *,
            model: LanguageModel,
            objective: Objective,
            rating: Rating,
            credit: Credit,
            update: Update,
            comm: Comm,
        ) -> "DataRater":
            return DataRater(model, objective, credit, update, MetaOptions(**self.model_dump(exclude={"name"})))

    trainer: MetaTrainer

    def __init__(
        self, model: LanguageModel, objective: Objective, credit: Credit, update: Update, options: MetaOptions
    ) -> None:
        self.model = model
        self.objective = objective
        self.credit = credit
        self.options = options
        self.inner = inner_update(update, model, eps_root=options.eps_root, warmup=options.inner_warmup)

    def connect(self, services: Services) -> None:
        check_population(self.options, services, "learner")
        self.trainer = MetaTrainer(self.options, services, self.objective, self.inner)

    @property
    def lr(self) -> float:
        return self.options.lr

    def step(
        self, batch: Batch, *, lr_scale: float = 1.0, probe: bool = False, dropout_seed: int | None = None
    ) -> StepReport:
        """A step of the population; `batch` is scored for the log. There is no signal to `probe`."""
        found = self.trainer.step(lr_scale)
        scores = self.trainer.scores(batch)
        described = self.trainer.weigh_scores.describe(scores)
        described["rater_norm"] = self.trainer.average.norm()
        self.trainer.services.comm.mean_(list(described.values()))
        cost = found.cost + Cost(flops=self.trainer.scoring_flops(batch))
        report = StepReport(found.loss, found.grad_norm, cost, found.metrics | described)
        most = torch.finfo(found.loss.dtype).max
        if "adjoint_growth" in found.metrics and self.options.asks and self.options.moves:
            report.limits["adjoint_growth"] = Limit(most, EXPLODING)
        report.limits |= {key: Limit(most, NOT_FINITE) for key in ("rater_norm", "score_mean")}
        return report

    def settle(self) -> None:
        weights = self.trainer.population.first_weights()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter, piece in zip(parameters, weights.split([p.numel() for p in parameters]), strict=True):
                parameter.copy_(piece.view_as(parameter))

    def manifest(self) -> Mapping[str, Origin]:
        return self.credit.manifest(self.model)

    def begin(self) -> None:
        pass

    def prepare(self) -> bool:
        return False

    @property
    def prepared_whole(self) -> bool:
        return True

    def remarks(self) -> list[str]:
        return []

    @property
    def num_masked(self) -> int:
        return 0

    @property
    def search_seconds(self) -> float:
        return 0.0

    def held_bytes(self, batch: Batch) -> int:
        """Of the window, back and forth, of one inner model, and of the states that it stores."""
        return self.trainer.held_bytes(batch)

    def foretell(self, batch: Batch) -> Foretold:
        """By formula: a window of many steps is not traced. A mean over the steps of a round."""
        options, trainer, state = self.options, self.trainer, self._first_state()
        members = len(trainer.population.mine)
        plain = options.inner_steps - options.backprop_steps
        total = training_cost(options, 1, self.model, trainer.rater, members)
        steps, scoring = plain + 1, trainer.scoring_flops(batch)
        cost = Cost(total.tokens // steps, total.meta_tokens // steps, total.flops // steps + scoring)
        vector, rater = state.weights.nbytes, trainer.average.nbytes
        sizes = {
            "weights": sum(tensor.nbytes for tensor in self.model.state_dict().values()),
            "inner_models": members * (1 + len(state.moments)) * vector,
            "rater": (2 + 2 * members) * rater,
            "activations": self.held_bytes(batch),
            "loss_gradient": 2 * 4 * self._num_logits(),
        }
        return Foretold(cost, sizes, len(state.weights))

    def _num_logits(self) -> int:
        """In the model at a time, in single precision."""
        options = self.options
        examples = max(options.micro_batch or options.batch_size, options.val_batch_size)
        return examples * self.model.context * self.model.head.weight.shape[0]

    def examine(self, examples: Sequence[LabelledBatch]) -> Diagnosis:
        """AUC of the scores by kind of noise, on held-out examples, and whether the adjoint has exploded."""
        values: dict[str, float] = {}
        warnings = []
        if examples:
            scores = np.concatenate([self.trainer.scores(e.batch).float().cpu().numpy() for e in examples])
            labels = np.concatenate([e.labels.cpu().numpy() for e in examples])
            found = auc_by_kind(scores, labels, examples[0].kinds)
            values = {f"auc_{kind}": value for kind, value in found.items()}
            if not np.isfinite(scores).all():
                warnings.append("the rater gives held-out examples scores that are not finite; lower learner.lr")
        growth, self.trainer.growth = self.trainer.growth, 1.0
        remedy = "shorten learner.backprop_steps or lower update.lr"
        return Diagnosis(values, warnings + explosion(growth, self.options.backprop_steps, remedy).warnings)

    def scores(self, batch: Batch) -> Float[Tensor, " batch"]:
        """By the averaged rater."""
        return self.trainer.scores(batch)

    def _first_state(self) -> Any:
        return next(iter(self.trainer.population.states.values()))

    def state(self) -> Tree:
        return {"meta": self.trainer.state(), "credit": self.credit.state(), "objective": self.objective.state()}

    def load_state(self, tree: Tree) -> None:
        self.objective.load_state(tree.get("objective", {}))
        self.credit.load_state(tree.get("credit", {}))
        self.trainer.load_state(tree.get("meta", {}))


def inner_update(update: Update, model: LanguageModel, *, eps_root: float = 0.0, warmup: int = 0) -> InnerUpdate:
    """The same optimizer in a form that can be walked backwards. Raises `TypeError` for one that has none."""
    if isinstance(update, SGD):
        return InnerSGD(update.lr, update.momentum, update.nesterov, update.weight_decay, warmup)
    if not isinstance(update, AdamW):
        raise TypeError(f"there is no way backwards through {type(update).__name__}")
    learning = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [torch.full_like(p, float(update.decays(name, p))).flatten() for name, p in learning]
    decay = torch.cat(decayed) * update.weight_decay
    return InnerAdamW(update.lr, update.betas, update.eps, eps_root, decay, warmup)


def _refusals(options: MetaOptions, recipe: Any) -> list[str]:
    reasons = []
    wanted = {"credit": ["backprop"], "model": ["gpt"], "rating": ["uniform"], "update": ["adamw", "sgd"]}
    wanted |= {"objective": ["cross_entropy"]}
    for slot, names in wanted.items():
        name = getattr(recipe, slot).name
        if name not in names:
            reasons.append(f"learner data_rater needs {slot} {' or '.join(names)}, found {name}")
    if recipe.model.name == "gpt":
        reasons += surrogates(recipe.model, "learner data_rater") + too_wide(options, recipe.model, "learner")
    if recipe.update.name == "sgd" and options.eps_root != MetaOptions.model_fields["eps_root"].default:
        reasons.append(f"learner.eps_root {options.eps_root:g} is of AdamW, and update is sgd; leave it out")
    if recipe.run.probe_every is not None:
        reasons.append(
            f"run.probe_every {recipe.run.probe_every} compares a rule's signal with the exact gradient, and learner "
            "data_rater has no such signal; leave it out"
        )
    if recipe.run.compile:
        reasons.append("run.compile is on, but compiled models cannot be differentiated twice; turn it off")
    return reasons
