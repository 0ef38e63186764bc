"""Meta-training a rater: inner models learn from weighted examples, the rater from how well that went.

    a round:  inner_steps − backprop_steps steps of every inner model, one at each call of `step`;
              then, in one call, the last backprop_steps of them with ∂L_meta/∂φ through them
    φ ← φ + mean over inner models of the AdamW step that each one's own moments make of its own gradient

One Adam per inner model, then the mean of their updates: gradients of young and of old models differ in size, and none
shall drown the others. Reference: Calian et al., "DataRater: Meta-learned dataset curation", 2025.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.errors import CheckpointError
from heterodox.core.protocols import Objective
from heterodox.core.services import Services
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost
from heterodox.meta.cost import round_cost, scoring_flops, step_cost
from heterodox.meta.gradient import meta_gradient
from heterodox.meta.growth import adjoint_growth
from heterodox.meta.memory import window_bytes
from heterodox.meta.options import MetaOptions
from heterodox.meta.population import Population
from heterodox.meta.problem import flat
from heterodox.meta.rater import build_rater
from heterodox.meta.steps import InnerAdamW, InnerState, InnerUpdate, clip
from heterodox.meta.weighting import ScoreWeighting


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
