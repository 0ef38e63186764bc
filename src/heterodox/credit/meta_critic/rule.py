"""MCL-DSUP: critics propose each layer's weight update, and learn from what the loss would have been with it.

    G   = MLP_G(h_N, L or ∂L/∂h_N),   LTF_i = M_i G                        a global target, and a local copy
    ΔW_i = SparseMask(C_i(h_i, LTF_i))                                      a critic's proposal
    min over θ_C, θ_G of  mean_i  L(W_i − η ΔW_i) + λ (η/2) ‖ΔW_i‖²         phase A, the meta-loss
    W_i ← update(W_i, ΔW_i)                                                 phase B

Each L(W_i − η ΔW_i) is a partial forward pass: stage i with its hypothetical weights, all stages above with the ones
they have. Nothing is backpropagated into the main weights; what flows back through the stages above ends in the
critics. With λ = 1 (`penalty`, proximal: ours) the best proposal is ΔW = ∇L; with λ = 0 the loss is the source's, whose
best proposal is whatever step helps this batch most. With `hypothesis: activations` (ours) a stage keeps its weights,
and what comes out at its points moves by −η δ. The proposal goes to the run's update; `sgd` is the source's literal
phase B.

Head and final norm learn by their exact local gradient, embeddings by a critic of their own or not at all. With
`objective: regression`, or during the first `regression_steps`, critics learn from the true gradient instead: that is
backpropagation, for the critics' sake, and is charged. `objective: frozen` leaves the critics as they were drawn.

Where we deviate from the source: h_j' stays attached between stages, or every meta-gradient but the last stage's would
be zero; rows of M_i have length 1, or LTF would vanish; networks see normalised hidden states; structure `outer`,
target `error` and critic `gated` are ours. Reference: "MCL-DSUP: Meta-Critic Learning for Decoupled Sparse Update
Propagation in Transformers", an unpublished proposal; its relatives are synthetic gradients (Jaderberg et al., ICML
2017) and learned optimisers (Andrychowicz et al., NeurIPS 2016).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.comm import Comm, Solo
from heterodox.core.errors import CheckpointError
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.backprop import frozen
from heterodox.credit.meta_critic.assemble import Operations, operations_of, optimiser_of, proposals_of, schedule_of
from heterodox.credit.meta_critic.config import Options
from heterodox.credit.meta_critic.flops import StepFlops
from heterodox.credit.meta_critic.forward import Forward, main_forward
from heterodox.credit.meta_critic.meta import (
    MetaObjective,
    critic_gradients,
    joint_change,
    leaves_of,
    meta_loss_gradients,
    propose,
    regression_gradients,
    shared,
)
from heterodox.credit.meta_critic.optimiser import MetaOptimiser, clip_
from heterodox.credit.meta_critic.proposals import Proposals
from heterodox.credit.meta_critic.schedule import Schedule
from heterodox.credit.meta_critic.target import Sight, look
from heterodox.model import GPT


class MetaCritic:
    """Critics, the target network and their optimiser around one model's stages."""

    class Config(Options):
        name: Literal["meta_critic"] = "meta_critic"

        def build(self, model: LanguageModel, streams: Streams) -> "MetaCritic":
            """Raises `RecipeError`; see `proposals_of`."""
            assert isinstance(model, GPT)
            proposals = proposals_of(self, model, streams)
            return MetaCritic(
                proposals,
                operations_of(self),
                optimiser_of(self, proposals),
                streams,
                meta=MetaObjective(
                    self.step,
                    self.penalty,
                    self.floor,
                    together=self.suffix == "shared",
                    activations=self.hypothesis == "activations",
                ),
                schedule=schedule_of(self),
                reuse_target=self.reuse_target,
                clip=self.meta_clip,
            )

    def __init__(
        self,
        proposals: Proposals,
        operations: Operations,
        optimiser: MetaOptimiser,
        streams: Streams,
        *,
        meta: MetaObjective,
        schedule: Schedule,
        reuse_target: bool = False,
        clip: float | None = 1.0,
    ) -> None:
        self.proposals = proposals
        self.operations = operations
        self.optimiser = optimiser
        self.streams = streams
        self.meta = meta
        self.schedule = schedule
        self.reuse_target = reuse_target
        self.clip = clip
        self.comm: Comm = Solo()
        self.step = 0

    def connect(self, services: Services) -> None:
        """Meta-gradients are averaged over the ranks of the run; alone, there is one."""
        self.comm = services.comm

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        assert isinstance(model, GPT)
        proposals, schedule = self.proposals, self.schedule
        seen = main_forward(model, batch, weights, objective, self.operations)
        sight = look(proposals.target_kind, seen, objective, self.comm, proposals.dtype)
        metrics: dict[str, Tensor] = {}
        target = None
        if schedule.learns(self.step):
            target = self._phase_a(model, seen, objective, sight, metrics)
        with torch.no_grad():
            if target is None or not self.reuse_target:
                target = proposals.target(sight)
            matrices = self._phase_b(seen, sight, target, metrics)
            if schedule.joins(self.step):
                together = shared(matrices, self.comm)
                metrics["meta_gain/joint"] = -joint_change(model, seen, objective, together, self.meta)
            grads = dict(seen.readout_grads)
            if (scale := schedule.scale(self.step)) > 0:
                proposed = (item for found in matrices.values() for item in found.items())
                grads |= {name: (delta * scale).to(model.get_parameter(name).dtype) for name, delta in proposed}
        cost = Cost(tokens=batch.num_tokens, flops=self._flops(model, batch))
        self.step += 1
        return Signal(grads, seen.loss, seen.losses, cost, metrics)

    def _phase_a(
        self, model: GPT, seen: Forward, objective: Objective, sight: Sight, metrics: dict[str, Tensor]
    ) -> Tensor:
        """One step of θ_C and θ_G; returns G as it was before."""
        proposals = self.proposals
        stages = self.schedule.sampled(proposals.stages, self.streams, self.step)
        with torch.enable_grad():
            target = proposals.target(sight)
            own = self.meta.activations and not self.schedule.regresses(self.step)
            summaries = propose(proposals, seen, stages, sight, target, self.comm, activations=own)
        leaves = leaves_of(summaries) if own else shared(summaries, self.comm)
        for leaf in (leaf for found in leaves.values() for leaf in found.values()):
            leaf.requires_grad_()
        if self.schedule.regresses(self.step):
            grads = regression_gradients(model, seen, objective, proposals, stages, leaves, self.meta, self.comm)
        else:
            grads, losses, _ = meta_loss_gradients(model, seen, objective, proposals, stages, leaves, self.meta)
            for stage in stages:
                loss = (losses[stage.index] * seen.weights).mean()
                metrics[f"meta_loss/{stage.key}"] = loss
                metrics[f"meta_variance/{stage.key}"] = losses[stage.index].var(correction=0)
                metrics[f"meta_gain/{stage.key}"] = seen.loss - loss
        found = critic_gradients(summaries, grads, proposals.critics.learning_for(stages), self.comm, activations=own)
        metrics |= _norms(found)
        clip_(found, self.clip)
        self.optimiser.apply(found, self.step)
        return target.detach()

    def _phase_b(
        self, seen: Forward, sight: Sight, target: Tensor, metrics: dict[str, Tensor]
    ) -> dict[int, dict[str, Tensor]]:
        """ΔW of all stages."""
        proposals = self.proposals
        summaries = propose(proposals, seen, proposals.stages, sight, target, self.comm)
        if proposals.structure is not None:
            summaries = shared(summaries, self.comm)
        matrices = {stage.index: proposals.matrices(stage, summaries[stage.index]) for stage in proposals.stages}
        for stage in proposals.stages:
            found = torch.cat([delta.flatten() for delta in matrices[stage.index].values()])
            metrics[f"proposal_norm/{stage.key}"] = found.norm()
            metrics[f"proposal_density/{stage.key}"] = found.count_nonzero() / found.numel()
        return matrices

    def _flops(self, model: GPT, batch: Batch) -> int:
        schedule, stages = self.schedule, self.proposals.stages
        branch = self.proposals.structure is None and self.operations != ()
        count = StepFlops(model, self.proposals, branch, *batch.inputs.shape, activations=self.meta.activations)
        learns = schedule.learns(self.step)
        total = count.main() + count.phase_b(stages, reuse=self.reuse_target and learns)
        if learns:
            sampled = schedule.sampled(stages, self.streams, self.step)
            total += count.phase_a(sampled, partial=not schedule.regresses(self.step))
        return total + (count.forward.total if schedule.joins(self.step) else 0)

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        learning = {name for stage in self.proposals.stages for name in stage.shapes}
        origins: dict[str, Origin] = {
            name: "critic" if name in learning else "backprop" if name in model.readout_names else "frozen"
            for name, _ in model.named_parameters()
        }
        origins["head.weight"] = "exact"
        return origins | frozen(model)

    def remarks(self) -> list[str]:
        """How large the critics are, and that they learn by backpropagation, where they do."""
        size = sum(parameter.numel() for parameter in self.proposals.critics.parameters())
        said, first = [f"{size:,} meta-parameters in critics and MLP_G"], self.schedule.regression_steps
        if self.schedule.training == "regression":
            said.append("critics learn from the true gradient, found by backpropagation in every meta-step")
        elif first:
            said.append(f"for the first {first} steps critics learn from the true gradient, by backpropagation")
        if self.schedule.training == "frozen":
            said.append("critics stay as they were drawn")
        return said

    def state(self) -> Tree:
        return {"critics": dict(self.proposals.critics.state_dict()), "step": self.step} | self.optimiser.state()

    def load_state(self, tree: Tree) -> None:
        if "step" not in tree:
            raise CheckpointError("the checkpoint lacks the critics' step: it belongs to another recipe")
        restore(dict(self.proposals.critics.state_dict()), tree.get("critics", {}), "critic")
        self.optimiser.load_state(tree)
        self.step = tree["step"]


def _norms(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norms of the gradients of MLP_G and of all critics."""
    of_target = [g.square().sum() for name, g in grads.items() if name.startswith("target.")]
    of_critics = [g.square().sum() for name, g in grads.items() if not name.startswith("target.")]
    return {
        "meta_grad_norm/target": torch.stack(of_target).sum().sqrt(),
        "meta_grad_norm/critics": torch.stack(of_critics).sum().sqrt(),
    }
