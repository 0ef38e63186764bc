"""Phase A's second half: how good each proposal would have been, and the critics' gradients.

    L_meta = mean_{i ∈ S} [ L(W_i − η ΔW_i) + λ (η/2) ‖ΔW_i‖² + (η/2) max(0, floor − ‖ΔW_i‖)² ]

With `activations` it is a − η δ at the stage's points that a partial forward tries, and ‖δ‖², the mean over tokens,
that is penalised (the floor is on its root): critics then learn each token's error, not the products' sum alone, which
hardly shows the directions in which inputs vary little.

The graph is cut at the proposals' summaries, or at the errors δ. Partial forwards give ∂L_meta/∂summary, of which all
ranks take the mean; the critics' graph, which waits meanwhile, then carries that on to θ. So every rank tries the step
that all ranks would make together. Errors are each rank's own; only the mean that a floor is held against is of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heterodox.core.comm import Comm
from heterodox.core.protocols import Objective
from heterodox.credit.backprop import differentiate, trainable
from heterodox.credit.meta_critic.forward import Forward
from heterodox.credit.meta_critic.layout import EMBEDDINGS, Stage
from heterodox.credit.meta_critic.partial import partial_losses
from heterodox.credit.meta_critic.proposals import Proposals
from heterodox.credit.meta_critic.target import Sight
from heterodox.credit.operation import replayed
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
