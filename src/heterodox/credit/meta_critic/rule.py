"""MCL-DSUP: critics propose each layer's weight update, and learn from what the loss would have been with it.

    G   = MLP_G(h_N, L or ∂L/∂h_N),   LTF_i = M_i G                        a global target, and a local copy
    ΔW_i = SparseMask(C_i(h_i, LTF_i))                                      a critic's proposal
    min over θ_C, θ_G of  mean_i  L(W_i − η ΔW_i) + λ (η/2) ‖ΔW_i‖²         phase A, the meta-loss
    W_i ← update(W_i, ΔW_i)                                                 phase B

Each L(W_i − η ΔW_i) is a partial forward pass: stage i with its hypothetical weights, all stages above with the ones
they have. Nothing is backpropagated into the main weights; what flows back through the stages above ends in the
critics. With λ = 1 (`penalty`, proximal: ours) the best proposal is ΔW = ∇L; with λ = 0 the loss is the source's, whose
best proposal is whatever step helps this batch most. The proposal goes to the run's update; `sgd` is the source's
literal phase B.

Head and final norm learn by their exact local gradient, embeddings by a critic of their own or not at all. With
`objective: regression`, or during the first `regression_steps`, critics learn from the true gradient instead: that is
backpropagation, for the critics' sake, and is charged. `objective: frozen` leaves the critics as they were drawn.

Where we deviate from the source: h_j' stays attached between stages, or every meta-gradient but the last stage's would
be zero; rows of M_i have length 1, or LTF would vanish; networks see normalised hidden states; structure `outer`,
target `error` and critic `gated` are ours. Reference: "MCL-DSUP: Meta-Critic Learning for Decoupled Sparse Update
Propagation in Transformers", an unpublished proposal; its relatives are synthetic gradients (Jaderberg et al., ICML
2017) and learned optimisers (Andrychowicz et al., NeurIPS 2016).
"""

import math
import random
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.core.comm import Comm, Solo
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.backprop import frozen
from heterodox.credit.meta_critic.config import Options
from heterodox.credit.meta_critic.critics import Critics
from heterodox.credit.meta_critic.flops import StepFlops
from heterodox.credit.meta_critic.forward import Forward, main_forward
from heterodox.credit.meta_critic.layout import Stage, chosen, stages_of
from heterodox.credit.meta_critic.meta import (
    MetaObjective,
    critic_gradients,
    joint_change,
    meta_loss_gradients,
    propose,
    regression_gradients,
    shared,
)
from heterodox.credit.meta_critic.optimiser import MetaOptimiser, clip_
from heterodox.credit.meta_critic.proposals import Proposals
from heterodox.credit.meta_critic.structure import Structure
from heterodox.credit.meta_critic.target import Sight, look
from heterodox.credit.tape import POINTWISE
from heterodox.model import GPT, CausalMix, HardTopK, ResidualGate

Training = Literal["meta", "regression", "frozen"]
BRANCHES = (*POINTWISE, HardTopK, CausalMix, ResidualGate, nn.Dropout)
"""What stands between a layer and the place where an error enters, with `point: branch`."""
BETAS = (0.9, 0.99)


class MetaCritic:
    """Critics, the target network and their optimiser around one model's stages."""

    class Config(Options):
        name: Literal["meta_critic"] = "meta_critic"

        def build(self, model: LanguageModel, streams: Streams) -> "MetaCritic":
            """Raises `RecipeError` if there would be more meta-parameters than `max_meta_parameters`."""
            assert isinstance(model, GPT)
            structure = self.structure_part()
            operations = BRANCHES if self.structure == "outer" and self.point != "output" else ()
            learns = chosen(model, self.matrices, self.embeddings == "critic")
            stages = stages_of(model, operations, learns, None if structure is None else partial(_outputs, structure))
            for name, shape in ((n, s) for stage in stages for n, s in stage.shapes.items() if len(s) == 2):
                if structure is not None and (misfit := structure.misfit(shape)):
                    raise RecipeError(f"{misfit} {name} of {shape[0]} × {shape[1]}; make credit.embeddings frozen")
            weight = model.head.weight
            width = weight.shape[1]
            target_width = self.target_width or width
            critics = Critics(
                stages,
                streams,
                width=width,
                target=self.target,
                target_width=target_width,
                target_hidden=self.target_hidden,
                local_width=self.local_width or target_width,
                local_density=self.local_density,
                form=self.critic,
                hidden=self.critic_hidden,
                linear=self.linear,
                shared=self.shared,
                start=self.start,
            ).to(weight)
            size = sum(parameter.numel() for parameter in critics.parameters())
            if self.max_meta_parameters is not None and size > self.max_meta_parameters:
                raise RecipeError(
                    f"critics and MLP_G would have {size:,} parameters, above credit.max_meta_parameters "
                    f"{self.max_meta_parameters:,}; make credit.critic_hidden or credit.local_width smaller"
                )
            proposals = Proposals(
                critics, stages, learns, target=self.target, structure=structure, density=self.density
            )
            parameters = dict(critics.named_parameters())
            target_lr = self.target_lr or self.meta_lr
            optimiser = MetaOptimiser(
                parameters,
                {name: target_lr if name.startswith("target.") else self.meta_lr for name in parameters},
                betas=BETAS,
                weight_decay=self.meta_weight_decay,
                warmup=self.meta_warmup,
            )
            return MetaCritic(
                proposals,
                operations,
                optimiser,
                streams,
                meta=MetaObjective(self.step, self.penalty, self.floor),
                training=self.objective,
                regression_steps=self.regression_steps,
                layers_per_step=self.layers_per_step,
                meta_every=self.meta_every,
                reuse_target=self.reuse_target,
                meta_only_steps=self.meta_only_steps,
                proposal_warmup=self.proposal_warmup,
                clip=self.meta_clip,
                joint_every=self.joint_every,
            )

    def __init__(
        self,
        proposals: Proposals,
        operations: tuple[type[nn.Module], ...],
        optimiser: MetaOptimiser,
        streams: Streams,
        *,
        meta: MetaObjective,
        training: Training = "meta",
        regression_steps: int = 0,
        layers_per_step: int | None = None,
        meta_every: int = 1,
        reuse_target: bool = False,
        meta_only_steps: int = 0,
        proposal_warmup: int = 0,
        clip: float | None = 1.0,
        joint_every: int | None = None,
    ) -> None:
        self.proposals = proposals
        self.operations = operations
        self.optimiser = optimiser
        self.streams = streams
        self.meta = meta
        self.training: Training = training
        self.regression_steps = regression_steps
        self.layers_per_step = layers_per_step
        self.meta_every = meta_every
        self.reuse_target = reuse_target
        self.meta_only_steps = meta_only_steps
        self.proposal_warmup = proposal_warmup
        self.clip = clip
        self.joint_every = joint_every
        self.comm: Comm = Solo()
        self.step = 0

    def signal(
        self, model: LanguageModel, batch: Batch, weights: Float[Tensor, " batch"], objective: Objective
    ) -> Signal:
        assert isinstance(model, GPT)
        proposals = self.proposals
        seen = main_forward(model, batch, weights, objective, self.operations)
        sight = look(proposals.target_kind, seen, objective, self.comm, proposals.dtype)
        metrics: dict[str, Tensor] = {}
        target = None
        if self._learns_now():
            target = self._phase_a(model, seen, objective, sight, metrics)
        with torch.no_grad():
            if target is None or not self.reuse_target:
                target = proposals.target(sight)
            matrices = self._phase_b(seen, sight, target, metrics)
            if self._joins_now():
                metrics["joint_change"] = joint_change(model, seen, objective, matrices, self.meta)
            grads = dict(seen.readout_grads)
            if self.step >= self.meta_only_steps:
                scale = self._scale()
                grads |= {
                    name: (delta * scale).to(model.get_parameter(name).dtype)
                    for found in matrices.values()
                    for name, delta in found.items()
                }
        cost = Cost(tokens=batch.num_tokens, flops=self._flops(model, batch))
        self.step += 1
        return Signal(grads, seen.loss, seen.losses, cost, metrics)

    def _flops(self, model: GPT, batch: Batch) -> int:
        branch = self.proposals.structure is None and self.operations != ()
        count = StepFlops(model, self.proposals, branch, *batch.inputs.shape)
        total = count.main() + count.phase_b(self.proposals.stages, reuse=self.reuse_target and self._learns_now())
        if self._learns_now():
            total += count.phase_a(self._sampled(), partial=not self._regresses_now())
        if self._joins_now():
            total += count.forward.total
        return total

    def _regresses_now(self) -> bool:
        return self.training == "regression" or self.step < self.regression_steps

    def _joins_now(self) -> bool:
        return self.joint_every is not None and self.step % self.joint_every == 0

    def _learns_now(self) -> bool:
        return self.training != "frozen" and self.step % self.meta_every == 0

    def _phase_a(
        self, model: GPT, seen: Forward, objective: Objective, sight: Sight, metrics: dict[str, Tensor]
    ) -> Tensor:
        """One step of θ_C and θ_G; returns G as it was before."""
        proposals, stages = self.proposals, self._sampled()
        with torch.enable_grad():
            target = proposals.target(sight)
            summaries = propose(proposals, seen, stages, sight, target, self.comm)
        leaves = shared(summaries, self.comm)
        for leaf in (leaf for found in leaves.values() for leaf in found.values()):
            leaf.requires_grad_()
        if self._regresses_now():
            grads, _ = regression_gradients(model, seen, objective, proposals, stages, leaves, self.meta, self.comm)
        else:
            grads, losses, _ = meta_loss_gradients(model, seen, objective, proposals, stages, leaves, self.meta)
            for stage in stages:
                weighted = losses[stage.index] * seen.weights
                metrics[f"meta_loss_{stage.key}"] = weighted.mean()
                metrics[f"meta_gain_{stage.key}"] = seen.loss - weighted.mean()
        learning = self.proposals.critics.learning_for(stages)
        found = critic_gradients(summaries, grads, learning, self.comm)
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
            found = list(matrices[stage.index].values())
            metrics[f"proposal_norm_{stage.key}"] = torch.stack([x.square().sum() for x in found]).sum().sqrt()
            entries = sum(x.numel() for x in found)
            kept = torch.stack([x.count_nonzero() for x in found]).sum()
            metrics[f"proposal_density_{stage.key}"] = kept / entries
        return matrices

    def _sampled(self) -> list[Stage]:
        """The stages of this meta-step: the same on every rank, and again after a resume."""
        stages = self.proposals.stages
        if self.layers_per_step is None or self.layers_per_step >= len(stages):
            return stages
        chosen = random.Random(self.streams.derive("rule", "layers", self.step))
        indices = sorted(chosen.sample(range(len(stages)), self.layers_per_step))
        return [stages[index] for index in indices]

    def _scale(self) -> float:
        if not self.proposal_warmup:
            return 1.0
        return min(1.0, (self.step - self.meta_only_steps + 1) / self.proposal_warmup)

    def manifest(self, model: LanguageModel) -> dict[str, Origin]:
        learning = {name for stage in self.proposals.stages for name in stage.shapes}
        origins: dict[str, Origin] = {
            name: "critic" if name in learning else "backprop" if name in model.readout_names else "frozen"
            for name, _ in model.named_parameters()
        }
        origins["head.weight"] = "exact"
        return origins | frozen(model)

    def state(self) -> Tree:
        critics = dict(self.proposals.critics.state_dict())
        return {"critics": critics, "step": self.step} | self.optimiser.state()

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
        "target_grad_norm": torch.stack(of_target).sum().sqrt(),
        "critic_grad_norm": torch.stack(of_critics).sum().sqrt(),
    }


def _outputs(structure: Structure, shape: tuple[int, ...]) -> int:
    """How many numbers a critic says of a parameter: a vector is itself."""
    return structure.num_outputs(shape) if len(shape) == 2 else math.prod(shape)
