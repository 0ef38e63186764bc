"""Phase A's second half: how good each proposal would have been, and the critics' gradients.

    L_meta = mean_{i ∈ S} [ L(W_i − η ΔW_i) + λ (η/2) ‖ΔW_i‖² + (η/2) max(0, floor − ‖ΔW_i‖)² ]

With `activations` it is a − η δ at the stage's points that a partial forward tries, and ‖δ‖², the mean over tokens,
that is penalised (the floor is on its root): critics then learn each token's error, not the products' sum alone, which
hardly shows the directions in which inputs vary little.

The graph is cut at the proposals' summaries, or at the errors δ. Partial forwards give ∂L_meta/∂summary, of which all
ranks take the mean; the critics' graph, which waits meanwhile, then carries that on to θ. So every rank tries the step
that all ranks would make together. Errors are each rank's own; only the mean that a floor is held against is of all.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from heterodox.core.comm import Comm
from heterodox.core.protocols import Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, restore
from heterodox.credit.backprop import differentiate, trainable
from heterodox.credit.meta_critic.forward import Forward, Sight, joint_losses, partial_losses
from heterodox.credit.meta_critic.networks import EMBEDDINGS, Stage
from heterodox.credit.meta_critic.proposals import Proposals
from heterodox.credit.tape import replayed
from heterodox.model import GPT

Summaries = dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class MetaObjective:
    """η, λ and the floor of the meta-loss; whether partial forwards run `together` or each alone, holding less."""

    step: float = 1.0
    penalty: float = 1.0
    floor: float = 0.0
    together: bool = True
    activations: bool = False

    def groups(self, stages: Sequence[Stage]) -> list[Sequence[Stage]]:
        """Stages whose partial forwards run as one."""
        return [stages] if self.together else [[stage] for stage in stages]

    def weight(self, weight: Tensor, proposal: Tensor) -> Tensor:
        """W − η ΔW."""
        return weight.detach() - self.step * proposal.to(weight.dtype)

    def regulariser(self, proposals: Mapping[str, Tensor], comm: Comm) -> Tensor:
        """λ (η/2) ‖ΔW_i‖² + (η/2) max(0, floor − ‖ΔW_i‖)² of a stage, or of this rank's errors by slot."""
        squares = [(x.square().sum(-1).mean() if self.activations else x.square().sum()) for x in proposals.values()]
        square = torch.stack(squares).sum()
        if not self.floor:
            return self.penalty * self.step / 2 * square
        if self.activations:  # not linear: the floor is for the mean over ranks, of which each has its own slope
            everywhere = square.detach().clone()
            comm.mean_([everywhere])
            square = square + (everywhere - square.detach())
        missing = (self.floor - (square + 1e-30).sqrt()).clamp_min(0.0)
        return self.step / 2 * (self.penalty * square + missing.square())


def propose(
    proposals: Proposals,
    seen: Forward,
    stages: Sequence[Stage],
    sight: Sight,
    target: Tensor,
    comm: Comm,
    *,
    activations: bool = False,
) -> Summaries:
    """This rank's summaries for `stages`, or, for `activations`, its errors δ by slot."""
    contexts, told = proposals.contexts(seen, stages, comm), proposals.tell(seen, stages, sight, target)
    say = proposals.errors if activations else proposals.summary
    return {stage.index: say(seen, stage, contexts[stage.index], told[stage.index]) for stage in stages}


def shared(summaries: Summaries, comm: Comm) -> Summaries:
    """Detached copies, means over the ranks."""
    copies = leaves_of(summaries)
    comm.mean_([x for found in copies.values() for x in found.values()])
    return copies


def leaves_of(summaries: Summaries) -> Summaries:
    """Detached copies."""
    return {index: {n: x.detach().clone() for n, x in found.items()} for index, found in summaries.items()}


def meta_loss_gradients(
    model: GPT,
    seen: Forward,
    objective: Objective,
    proposals: Proposals,
    stages: Sequence[Stage],
    leaves: Summaries,
    meta: MetaObjective,
    comm: Comm,
) -> tuple[Summaries, dict[int, Tensor], Summaries]:
    """∂L_meta/∂summary on this rank's examples, the losses by stage and example, and the proposals ΔW.

    `leaves` must require gradients.
    """
    grads: Summaries = {}
    losses: dict[int, Tensor] = {}
    matrices: Summaries = {}
    for group in meta.groups(stages):
        part = _gradients(model, seen, objective, proposals, group, leaves, meta, len(stages), comm)
        grads |= part[0]
        losses |= part[1]
        matrices |= part[2]
    return grads, losses, matrices


def _gradients(
    model: GPT,
    seen: Forward,
    objective: Objective,
    proposals: Proposals,
    stages: Sequence[Stage],
    leaves: Summaries,
    meta: MetaObjective,
    num_stages: int,
    comm: Comm,
) -> tuple[Summaries, dict[int, Tensor], Summaries]:
    """The same for some of the stages, of which the meta-loss is the mean over `num_stages`."""
    chosen = {stage.index: leaves[stage.index] for stage in stages}
    with torch.enable_grad():
        if meta.activations:  # the proposals are the errors, which move what comes out at their slots
            proposed, weights = chosen, {index: {} for index in chosen}
            moves = {index: {slot: -meta.step * y for slot, y in found.items()} for index, found in chosen.items()}
        else:
            proposed, moves = {s.index: proposals.matrices(s, leaves[s.index]) for s in stages}, None
            weights = {
                index: {name: meta.weight(model.get_parameter(name), delta) for name, delta in found.items()}
                for index, found in proposed.items()
            }
        losses = partial_losses(model, seen, objective, weights, moves)
        each = [(losses[i] * seen.weights).mean() + meta.regulariser(found, comm) for i, found in proposed.items()]
        grads = _by_leaf(torch.stack(each).sum() / num_stages, chosen)
    detached = {index: {n: x.detach() for n, x in found.items()} for index, found in proposed.items()}
    return grads, {index: x.detach() for index, x in losses.items()}, detached


def _by_leaf(total: Tensor, leaves: Summaries) -> Summaries:
    """The gradient of `total` by each leaf."""
    grads = iter(torch.autograd.grad(total, [leaf for found in leaves.values() for leaf in found.values()]))
    return {index: {name: next(grads) for name in found} for index, found in leaves.items()}


def regression_gradients(
    model: GPT,
    seen: Forward,
    objective: Objective,
    proposals: Proposals,
    stages: Sequence[Stage],
    leaves: Summaries,
    meta: MetaObjective,
    comm: Comm,
) -> tuple[Summaries, dict[int, Tensor]]:
    """∂/∂summary of mean_i (η/2) ‖ΔW_i − target(∇_i L)‖², the true gradient found by backpropagation, and each term."""
    names = trainable(model)
    if seen.before:
        with replayed(seen.before[EMBEDDINGS], seen.logits.device):
            true = differentiate(model, seen.batch, seen.weights, objective, names).grads
    else:
        true = differentiate(model, seen.batch, seen.weights, objective, names).grads
    comm.mean_(list(true.values()))
    with torch.enable_grad():
        matrices = {s.index: proposals.matrices(s, leaves[s.index]) for s in stages}
        wanted = proposals.structure
        errors: dict[int, list[Tensor]] = {index: [] for index in matrices}
        for index, found in matrices.items():
            for name, delta in found.items():
                goal = true[name] if wanted is None or delta.ndim != 2 else wanted.regression_target(true[name])
                errors[index].append((delta - goal.to(delta.dtype)).square().sum())
        total = meta.step / 2 * torch.stack([x for found in errors.values() for x in found]).sum() / len(stages)
        terms = {index: meta.step / 2 * torch.stack(found).sum().detach() for index, found in errors.items()}
        return _by_leaf(total, leaves), terms


def critic_gradients(
    summaries: Summaries, grads: Summaries, parameters: Mapping[str, Tensor], comm: Comm, *, activations: bool = False
) -> dict[str, Tensor]:
    """∂L_meta/∂θ by name, the mean over ranks; parameters that no proposal depends on are left out.

    Summaries are shared by all ranks, so their gradients are too; errors are each rank's own.
    """
    if not activations:
        comm.mean_([g for found in grads.values() for g in found.values()])
    outputs = [x for found in summaries.values() for x in found.values()]
    ahead = [grads[index][name] for index, found in summaries.items() for name in found]
    used = [(y, g) for y, g in zip(outputs, ahead, strict=True) if y.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in used], list(parameters.values()), [g for _, g in used], allow_unused=True
    )
    answer = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    comm.mean_(list(answer.values()))
    return answer


# What the proposals would do to the loss: each stage's alone, and all of them at once.
#
#     gain_i = L(W) − L(W_i − η ΔW_i)        gain_joint = L(W) − L(W_1 − η ΔW_1, …, W_N − η ΔW_N)
#
# All of them are of the same ΔW, those that are handed to the update, and of weights, whatever the partial forwards of
# the meta-step try. So they can be compared with each other: of ΔW that do not meet, the joint gain is the sum.


@torch.no_grad()
def proposal_gains(
    model: GPT,
    seen: Forward,
    objective: Objective,
    stages: Sequence[Stage],
    matrices: Mapping[int, Mapping[str, Tensor]],
    meta: MetaObjective,
) -> dict[str, Tensor]:
    """By the stages' keys and `joint`, how far the loss falls."""
    hypotheses = {
        stage.index: {name: meta.weight(model.get_parameter(name), x) for name, x in matrices[stage.index].items()}
        for stage in stages
    }
    losses: dict[int, Tensor] = {}
    for group in meta.groups(stages):
        losses |= partial_losses(model, seen, objective, {stage.index: hypotheses[stage.index] for stage in group})
    every = {name: weight for found in hypotheses.values() for name, weight in found.items()}
    together = joint_losses(model, seen, objective, every)
    named = {stage.key: losses[stage.index] for stage in stages} | {"joint": together}
    return {key: seen.loss - (found * seen.weights).mean() for key, found in named.items()}


# AdamW for the rule's own networks, which the run's update does not move. All state is there from the start.


class MetaOptimiser:
    """AdamW over named parameters, each group of names with its learning rate; a step may leave some out."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rates: Mapping[str, float],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        warmup: int,
    ) -> None:
        self.parameters = dict(parameters)
        self.rates = dict(rates)
        self.betas = betas
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.steps = {name: torch.zeros((), dtype=torch.float32, device=p.device) for name, p in parameters.items()}

    @torch.no_grad()
    def apply(self, grads: Mapping[str, Tensor], step: int) -> None:
        """One step, number `step` from 0, of the parameters in `grads`."""
        scale = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        for rate in dict.fromkeys(self.rates[name] for name in grads):
            names = [name for name in grads if self.rates[name] == rate]
            adamw(
                [self.parameters[name] for name in names],
                [grads[name] for name in names],
                [self.first[name] for name in names],
                [self.second[name] for name in names],
                [],
                [self.steps[name] for name in names],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=rate * scale,
                weight_decay=self.weight_decay,
                eps=1e-12,
                maximize=False,
            )

    def state(self) -> Tree:
        return {"first_moments": self.first, "second_moments": self.second, "meta_steps": self.steps}

    def load_state(self, tree: Tree) -> None:
        restore(self.first, tree.get("first_moments", {}), "first moment of critic")
        restore(self.second, tree.get("second_moments", {}), "second moment of critic")
        restore(self.steps, tree.get("meta_steps", {}), "step count of critic")


def clip_(grads: Mapping[str, Tensor], limit: float | None) -> None:
    """Scale the gradients in place to a global norm of at most `limit`."""
    if limit is not None and grads:
        norm = get_total_norm(list(grads.values()))
        torch._foreach_mul_(list(grads.values()), torch.clamp(limit / (norm + 1e-6), max=1.0))


# When critics learn, by what and for which stages; when proposals are handed over, and how large.


Training = Literal["meta", "regression", "frozen"]


@dataclass(frozen=True)
class Schedule:
    """The options of a recipe that depend on the step, counted from 0."""

    training: Training = "meta"
    regression_steps: int = 0
    layers_per_step: int | None = None
    meta_every: int = 1
    meta_only_steps: int = 0
    proposal_warmup: int = 0
    joint_every: int | None = None

    def learns(self, step: int) -> bool:
        """Whether there is a meta-step."""
        return self.training != "frozen" and step % self.meta_every == 0

    def regresses(self, step: int) -> bool:
        """Whether the meta-step is one of gradient regression."""
        return self.training == "regression" or step < self.regression_steps

    def joins(self, step: int) -> bool:
        """Whether the joint change of the loss is measured: at steps that are logged, which are counted from 1."""
        return self.joint_every is not None and (step + 1) % self.joint_every == 0

    def sampled(self, stages: Sequence[Stage], streams: Streams, step: int) -> list[Stage]:
        """The stages of a meta-step: the same on every rank, and again after a resume."""
        if self.layers_per_step is None or self.layers_per_step >= len(stages):
            return list(stages)
        chosen = random.Random(streams.derive("rule", "layers", step))
        return [stages[index] for index in sorted(chosen.sample(range(len(stages)), self.layers_per_step))]

    def scale(self, step: int) -> float:
        """What proposals are multiplied by; 0 while critics only learn."""
        if step < self.meta_only_steps:
            return 0.0
        return min(1.0, (step - self.meta_only_steps + 1) / self.proposal_warmup) if self.proposal_warmup else 1.0


# What the rule tells of its meta-steps, in the steps between them too.
#
# Critics learn every `meta_every` steps, for sampled stages, and joint changes come every `joint_every` steps; the log
# has a rhythm of its own. What one step has measured stands in the log until it is measured again.


OF_META_STEPS = ("meta_loss", "meta_variance", "meta_gain", "meta_penalty")


class Monitor:
    """The last value of each of `names`, a mean over the ranks; before there is one inf, which the log calls null."""

    def __init__(self, names: Iterable[str], like: Tensor) -> None:
        self.values = {name: torch.full((), math.inf, dtype=like.dtype, device=like.device) for name in names}

    @torch.no_grad()
    def note(self, found: Mapping[str, Tensor], comm: Comm) -> None:
        """New values of some, as this rank has them."""
        for name, value in found.items():
            self.values[name].copy_(value)
        comm.mean_([self.values[name] for name in found])

    def told(self) -> dict[str, Tensor]:
        """What there is to log, as copies: a row may be written after a later step."""
        return {name: value.clone() for name, value in self.values.items()}

    def forget(self, quantity: str) -> None:
        """Tell no more of a quantity that is not measured any longer."""
        for name, value in self.values.items():
            if name.startswith(f"{quantity}/"):
                value.fill_(math.inf)

    def state(self) -> Tree:
        return {name.replace("/", "."): value for name, value in self.values.items()}

    def load_state(self, tree: Tree) -> None:
        restore(self.state(), tree, "monitored value")


def monitored(schedule: Schedule, stages: Iterable[Stage]) -> list[str]:
    """The names of all that is not measured in every step."""
    quantities: list[str] = []
    if schedule.training == "regression" or schedule.regression_steps:
        quantities.append("regression_loss")
    if schedule.training == "meta":
        quantities += OF_META_STEPS
    if schedule.joint_every is not None:
        quantities.append("proposal_gain")
    names = [f"{quantity}/{stage.key}" for quantity in quantities for stage in stages]
    names += [] if schedule.training == "frozen" else ["meta_grad_norm/critics", "meta_grad_norm/target"]
    return names + ([] if schedule.joint_every is None else ["proposal_gain/joint"])


def of_partial_forwards(
    seen: Forward,
    stages: Sequence[Stage],
    losses: Mapping[int, Float[Tensor, " batch"]],
    tried: Summaries,
    meta: MetaObjective,
    comm: Comm,
) -> dict[str, Tensor]:
    """By stage the loss that its proposal would have made, its variance over examples, the gain, and the penalty.

    Losses are weighted as in training, the variance alike and about the mean of all ranks.
    """
    means = {stage.index: (losses[stage.index] * seen.weights).mean() for stage in stages}
    centres = {index: mean.clone() for index, mean in means.items()}
    comm.mean_(list(centres.values()))
    found: dict[str, Tensor] = {}
    for stage in stages:
        spread = (losses[stage.index] - centres[stage.index]).square()
        found[f"meta_loss/{stage.key}"] = means[stage.index]
        found[f"meta_variance/{stage.key}"] = (spread * seen.weights).mean()
        found[f"meta_gain/{stage.key}"] = seen.loss - means[stage.index]
        found[f"meta_penalty/{stage.key}"] = meta.regulariser(tried[stage.index], comm)
    return found


def of_gradients(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms of the gradients of MLP_G and of all critics."""
    of_target = [g.square().sum() for name, g in grads.items() if name.startswith("target.")]
    of_critics = [g.square().sum() for name, g in grads.items() if not name.startswith("target.")]
    return {
        "meta_grad_norm/target": torch.stack(of_target).sum().sqrt(),
        "meta_grad_norm/critics": torch.stack(of_critics).sum().sqrt(),
    }
