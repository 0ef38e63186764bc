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
from heterodox.credit.meta_critic.gains import proposal_gains
from heterodox.credit.meta_critic.meta import (
    MetaObjective,
    critic_gradients,
    leaves_of,
    meta_loss_gradients,
    propose,
    regression_gradients,
    shared,
)
from heterodox.credit.meta_critic.monitor import Monitor, monitored, of_gradients, of_partial_forwards
from heterodox.credit.meta_critic.optimiser import MetaOptimiser, clip_
from heterodox.credit.meta_critic.proposals import Proposals
from heterodox.credit.meta_critic.schedule import Schedule
from heterodox.credit.meta_critic.target import Sight, look
from heterodox.model import GPT


class MetaCritic:
    """Critics, the target network and their optimiser around one model's stages."""

    class Config(Options):
        name: Literal["meta_critic"] = "meta_critic"

        def in_float32(self) -> list[str]:
            return ["the signal of meta_critic"]

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
        self.monitor = Monitor(monitored(schedule, proposals.stages), proposals.critics.target.output)
        self.comm: Comm = Solo()
        self.step = 0
        self._known_flops: dict[tuple[int, ...], int] = {}

    def connect(self, services: Services) -> None:
        """Meta-gradients are averaged over the ranks of the run; alone, there is one."""
        self.comm = services.comm

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        with model.full_precision():  # what a hypothetical step changes is small
            return self._signal(model, batch, weights, objective)

    def _signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        assert isinstance(model, GPT)
        proposals, schedule = self.proposals, self.schedule
        seen = main_forward(model, batch, weights, objective, self.operations)
        sight = look(proposals.target_kind, seen, objective, self.comm, proposals.dtype)
        target = None
        if self.step == schedule.regression_steps > 0:
            self.monitor.forget("regression_loss")
        if schedule.learns(self.step):
            target = self._phase_a(model, seen, objective, sight)
        with torch.no_grad():
            if target is None or not self.reuse_target:
                target = proposals.target(sight)
            matrices = self._phase_b(seen, sight, target)
            if schedule.joins(self.step):
                agreed = shared(matrices, self.comm)
                gains = proposal_gains(model, seen, objective, proposals.stages, agreed, self.meta)
                self.monitor.note({f"proposal_gain/{key}": gain for key, gain in gains.items()}, self.comm)
            grads = dict(seen.readout_grads)
            if (scale := schedule.scale(self.step)) > 0:
                proposed = (item for found in matrices.values() for item in found.items())
                grads |= {name: (delta * scale).to(model.get_parameter(name).dtype) for name, delta in proposed}
        metrics = self.monitor.told() | self._sizes(matrices)
        cost = Cost(tokens=batch.num_tokens, flops=self.step_flops(model, batch, self.step))
        self.step += 1
        return Signal(grads, seen.loss, seen.losses, cost, metrics)

    def _phase_a(self, model: GPT, seen: Forward, objective: Objective, sight: Sight) -> Tensor:
        """One step of θ_C and θ_G; returns G as it was before."""
        proposals, comm = self.proposals, self.comm
        stages = self.schedule.sampled(proposals.stages, self.streams, self.step)
        with torch.enable_grad():
            target = proposals.target(sight)
            own = self.meta.activations and not self.schedule.regresses(self.step)
            summaries = propose(proposals, seen, stages, sight, target, comm, activations=own)
        leaves = leaves_of(summaries) if own else shared(summaries, comm)
        for leaf in (leaf for found in leaves.values() for leaf in found.values()):
            leaf.requires_grad_()
        if self.schedule.regresses(self.step):
            grads, terms = regression_gradients(model, seen, objective, proposals, stages, leaves, self.meta, comm)
            measured = {f"regression_loss/{stage.key}": terms[stage.index] for stage in stages}
        else:
            grads, losses, tried = meta_loss_gradients(
                model, seen, objective, proposals, stages, leaves, self.meta, comm
            )
            measured = of_partial_forwards(seen, stages, losses, tried, self.meta, comm)
        found = critic_gradients(summaries, grads, proposals.critics.learning_for(stages), comm, activations=own)
        self.monitor.note(measured | of_gradients(found), comm)
        clip_(found, self.clip)
        self.optimiser.apply(found, self.step)
        return target.detach()

    def _phase_b(self, seen: Forward, sight: Sight, target: Tensor) -> dict[int, dict[str, Tensor]]:
        """ΔW of all stages."""
        proposals = self.proposals
        summaries = propose(proposals, seen, proposals.stages, sight, target, self.comm)
        if proposals.structure is not None:
            summaries = shared(summaries, self.comm)
        return {stage.index: proposals.matrices(stage, summaries[stage.index]) for stage in proposals.stages}

    def _sizes(self, matrices: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
        """By stage the norm of ΔW, and the share of its entries that are not 0."""
        found: dict[str, Tensor] = {}
        for stage in self.proposals.stages:
            entries = torch.cat([delta.flatten() for delta in matrices[stage.index].values()])
            found[f"proposal_norm/{stage.key}"] = entries.norm()
            found[f"proposal_density/{stage.key}"] = entries.count_nonzero() / entries.numel()
        return found

    def step_flops(self, model: LanguageModel, batch: Batch, step: int) -> int:
        """FLOPs of step number `step`, counted from 0, on a batch of this shape."""
        assert isinstance(model, GPT)
        schedule, stages = self.schedule, self.proposals.stages
        learns, joins = schedule.learns(step), schedule.joins(step)
        regresses = learns and schedule.regresses(step)
        sampled = schedule.sampled(stages, self.streams, step) if learns else []
        kind = (*batch.inputs.shape, regresses, joins, *(stage.index for stage in sampled))
        if kind not in self._known_flops:
            branch = self.proposals.structure is None and self.operations != ()
            count = StepFlops(model, self.proposals, branch, *batch.inputs.shape, activations=self.meta.activations)
            total = count.main() + count.phase_b(stages, reuse=self.reuse_target and learns)
            total += count.phase_a(sampled, partial=not regresses) if learns else 0
            self._known_flops[kind] = total + (count.gains(stages) if joins else 0)
        return self._known_flops[kind]

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
        tree: Tree = {"critics": dict(self.proposals.critics.state_dict()), "step": self.step} | self.optimiser.state()
        if self.monitor.values:
            tree["monitored"] = self.monitor.state()
        return tree

    def load_state(self, tree: Tree) -> None:
        if "step" not in tree:
            raise CheckpointError("the checkpoint lacks the critics' step: it belongs to another recipe")
        restore(dict(self.proposals.critics.state_dict()), tree.get("critics", {}), "critic")
        self.optimiser.load_state(tree)
        self.monitor.load_state(tree.get("monitored", {}))
        self.step = tree["step"]
