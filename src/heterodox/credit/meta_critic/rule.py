"""MCL-DSUP: critics propose each layer's weight update, and learn from what the loss would have been with it."""

import math
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.comm import Comm, Solo
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.protocols import LanguageModel, Objective
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.core.state import Tree, restore
from heterodox.core.types import Batch, Cost, Origin, Signal
from heterodox.credit.backprop import frozen
from heterodox.credit.meta_critic.flops import StepFlops
from heterodox.credit.meta_critic.forward import Forward, Sight, TargetKind, look, main_forward
from heterodox.credit.meta_critic.meta_step import (
    MetaObjective,
    MetaOptimiser,
    Monitor,
    Schedule,
    clip_,
    critic_gradients,
    leaves_of,
    meta_loss_gradients,
    monitored,
    of_gradients,
    of_partial_forwards,
    proposal_gains,
    propose,
    regression_gradients,
    shared,
)
from heterodox.credit.meta_critic.networks import (
    Block,
    Elementwise,
    Form,
    LowRank,
    Stage,
    Structure,
    Transport,
    chosen,
    stages_of,
    units_kept,
)
from heterodox.credit.meta_critic.proposals import Critics, Proposals
from heterodox.credit.tape import POINTWISE
from heterodox.model import GPT, CausalMix, HardTopK, ResidualGate

# The rule's section of a recipe, and what it refuses.


StructureName = Literal["outer", "low_rank", "block", "elementwise"]
MatrixName = Literal["attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc", "mlp.proj"]
RANK, SIDE = 4, 16
_OF_META_STEPS = (
    "regression_steps", "layers_per_step", "meta_every", "meta_lr", "target_lr", "meta_warmup", "meta_weight_decay",
    "meta_clip", "penalty", "floor",
)  # fmt: skip


class Options(config.Config):
    """All controls of the rule."""

    target: TargetKind = Field(
        "error", description="what MLP_G sees: pooled h_N and L; h_N and loss, or error, by token"
    )
    target_width: int | None = Field(None, ge=1, description="of G; null: the model's")
    target_hidden: int = Field(128, ge=1, description="hidden units of MLP_G")
    local_width: int | None = Field(None, ge=1, description="of LTF, rows of M; null: as wide as G")
    local_density: float = Field(1.0, gt=0, le=1, description="non-zero share of each row of M; 1: orthogonal")
    transport: Literal["none", "attention"] = Field(
        "none", description="how G comes down to a stage: as it is; along the attention of the blocks above, too"
    )
    reuse_target: bool = Field(False, description="phase B with the G of before the critics' step")
    structure: StructureName = Field("outer", description="of ΔW")
    rank: int | None = Field(None, ge=1, description=f"of low_rank; null: {RANK}")
    block: int | None = Field(None, ge=1, description=f"side of block's tiles; null: {SIDE}")
    point: Literal["branch", "output"] | None = Field(
        None, description="where outer's errors enter: behind a branch's function, or at each matrix; null: branch"
    )
    density: float = Field(1.0, gt=0, le=1, description="units that the sparse mask keeps")
    matrices: list[MatrixName] | None = Field(
        None, min_length=1, description="of each block; null: all, gains and biases too. The rest is frozen"
    )
    embeddings: Literal["critic", "frozen"] = Field("critic", description="where the model does not freeze them itself")
    critic: Form = Field("gated", description="mlp: the source's, of [h ‖ LTF]; gated: linear in LTF")
    critic_hidden: int = Field(128, ge=1, description="hidden units of a critic")
    linear: bool = Field(True, description="a linear path from LTF to the output beside the hidden units")
    start: Literal["stream", "random"] | None = Field(
        None,
        description="of the linear path; stream: as if the stream passed the error on as it is; null: that if it can",
    )
    shared: bool = Field(False, description="one critic for all attentions and one for all MLPs, with block ids")
    objective: Literal["meta", "regression", "frozen"] = Field(
        "meta", description="what critics learn by; regression: on the true gradient, by backprop; frozen: nothing"
    )
    regression_steps: int = Field(0, ge=0, description="phase 0: so many steps of regression (backprop) first")
    hypothesis: Literal["weights", "activations"] = Field(
        "weights", description="what a partial forward tries: W − η ΔW, or outer's errors, a − η δ, where they enter"
    )
    step: float = Field(1.0, gt=0, description="η, length of the hypothetical step")
    penalty: float = Field(1.0, ge=0, description="λ of (η/2)‖ΔW‖²; 1: proximal; 0: the source's meta-loss")
    floor: float = Field(
        0.0, ge=0, description="norm below which a stage's ΔW is penalised; activations: the RMS of its δ over tokens"
    )
    suffix: Literal["shared", "separate"] = Field(
        "shared", description="partial forwards as one larger batch above where they begin, or one by one, holding less"
    )
    layers_per_step: int | None = Field(None, ge=1, description="stages sampled for a meta-step; null: all")
    meta_every: int = Field(1, ge=1, description="steps between two meta-steps")
    meta_only_steps: int = Field(0, ge=0, description="steps before the first proposal is handed over")
    proposal_warmup: int = Field(0, ge=0, description="steps over which proposals then grow to their size")
    meta_lr: float = Field(2e-3, gt=0, description="AdamW's, of critics")
    target_lr: float | None = Field(None, gt=0, description="AdamW's, of MLP_G; null: as critics")
    meta_warmup: int = Field(0, ge=0, description="steps of linear warm-up of both")
    meta_weight_decay: float = Field(0.01, ge=0, description="AdamW's, of both")
    meta_clip: float | None = Field(1.0, gt=0, description="largest global norm of the meta-gradient")
    max_meta_parameters: int | None = Field(None, ge=1, description="refuse to build more; null: no limit")
    joint_every: int | None = Field(
        None, ge=1, description="steps between two measurements of all proposals' joint change of the loss (charged)"
    )

    @model_validator(mode="after")
    def _options_belong_together(self) -> "Options":
        owners = {"rank": "low_rank", "block": "block", "point": "outer"}
        for option, owner in owners.items():
            if getattr(self, option) is not None and self.structure != owner:
                raise ValueError(f"{option} is for structure {owner} only, and structure is {self.structure}")
        if self.start == "stream" and not self._can_pass_on:
            raise ValueError("start stream needs target error, structure outer, a linear path and no target_width")
        if self.hypothesis == "activations" and (self.structure != "outer" or self.objective != "meta"):
            raise ValueError(
                "hypothesis activations needs errors that learn from partial forwards: structure outer and objective "
                f"meta, not {self.structure} and {self.objective}"
            )
        if self.transport == "attention" and (
            self.target == "pooled" or self.structure != "outer" or self.point == "output"
        ):
            raise ValueError(
                "transport attention needs a G of tokens and attention on the tape: target error or token, structure "
                f"outer and point branch, not {self.target}, {self.structure} and {self.point or 'branch'}"
            )
        self._refuse_what_has_no_effect()
        if self.reuse_target and (self.objective == "frozen" or self.meta_every > 1):
            raise ValueError("reuse_target needs a meta-step in every step: objective meta, meta_every 1")
        return self

    def _refuse_what_has_no_effect(self) -> None:
        """Raises for an option that the objective leaves without effect, unless it has its default."""
        if self.start == "random" and not self.linear:
            raise ValueError("start random is of the linear path, but linear is false")
        if self.objective == "regression" and self.regression_steps:
            raise ValueError(f"regression_steps is {self.regression_steps}, but objective regression is nothing else")
        lacks: dict[str, str] = {}
        if self.objective == "frozen":
            lacks |= dict.fromkeys(_OF_META_STEPS, "meta-step")
        if self.objective == "regression":
            lacks |= {"penalty": "meta-loss", "floor": "meta-loss"}
        if self.objective != "meta" and self.joint_every is None:
            lacks["suffix"] = "partial forward (give joint_every)"
        if self.objective == "frozen" and self.joint_every is None:
            lacks["step"] = "hypothetical step (give joint_every)"
        for option, lacking in lacks.items():
            value = getattr(self, option)
            if value != type(self).model_fields[option].default:
                raise ValueError(f"{option} is {value}, but objective {self.objective} has no {lacking}")

    @property
    def _can_pass_on(self) -> bool:
        plain = self.target_width is None and self.linear
        return plain and self.target == "error" and self.structure == "outer"

    @property
    def begins_as_stream(self) -> bool:
        """Whether the linear paths begin as if the stream passed the error on as it is."""
        return self._can_pass_on and self.start != "random"

    def structure_part(self) -> Structure | None:
        """The structure; None is `outer`."""
        if self.structure == "low_rank":
            return LowRank(self.rank or RANK, self.density)
        if self.structure == "block":
            return Block(self.block or SIDE, self.density)
        return Elementwise(self.density) if self.structure == "elementwise" else None

    def refusals(self, recipe: config.Config) -> list[str]:
        """What cannot be done in this recipe's model, with the numbers."""
        whole: dict[str, Any] = recipe.model_dump(include={"model", "run"})
        model = whole["model"]
        if model["name"] != "gpt":
            return [f"credit meta_critic needs blocks run one after another: model gpt, not {model['name']}"]
        reasons = []
        embeds = self.embeddings == "critic" and not model["frozen_embeddings"]
        stages = model["layers"] + embeds
        if self.transport == "attention" and stages == 1:
            reasons.append(
                "credit.transport is attention, but model.layers is 1 and embeddings are frozen: no stage lies below a "
                "block"
            )
        reasons += self._never(whole["run"]["budget"]["steps"])
        if self.layers_per_step and self.layers_per_step > stages:
            reasons.append(f"credit.layers_per_step is {self.layers_per_step}, but there are {stages} stages to sample")
        return reasons + self._misfits(model["width"], model["mlp_ratio"], model["context"])

    def _never(self, budget: int | None) -> list[str]:
        """What would come behind the last step."""
        if budget is None:
            return []
        waiting = {"meta_only_steps": "blocks never learn", "regression_steps": "critics never learn by a meta-loss"}
        return [
            f"credit.{option} is {getattr(self, option)} of a budget of {budget} steps: {consequence}"
            for option, consequence in waiting.items()
            if getattr(self, option) >= budget
        ]

    def _misfits(self, width: int, ratio: int, context: int) -> list[str]:
        structure = self.structure_part()
        if structure is None:
            if units_kept(self.density, context):
                return []
            return [f"credit.density {self.density:g} of an example's {context} tokens keeps none"]
        names = self.matrices or ["attn.q", "mlp.fc", "mlp.proj"]
        shapes = {"mlp.fc": (ratio * width, width), "mlp.proj": (width, ratio * width)}
        for name in names:
            shape = shapes.get(name, (width, width))
            if misfit := structure.misfit(shape):
                return [f"{misfit} {name} of {shape[0]} × {shape[1]}"]
        return []


# From options and a model to the rule's parts.


Operations = tuple[type[nn.Module], ...]
BRANCHES: Operations = (*POINTWISE, HardTopK, CausalMix, ResidualGate, nn.Dropout)
"""What stands between a layer and the place where an error enters, with `point: branch`."""
BETAS = (0.9, 0.99)


def operations_of(options: Options) -> Operations:
    """What the tape follows errors through."""
    return BRANCHES if options.structure == "outer" and options.point != "output" else ()


def proposals_of(options: Options, model: GPT, streams: Streams) -> Proposals:
    """Critics for the stages of `model` that learn.

    Raises `RecipeError` for a structure that an embedding cannot have, and above `max_meta_parameters`.
    """
    structure = options.structure_part()
    learns = chosen(model, options.matrices, options.embeddings == "critic")
    num_outputs = None if structure is None else partial(_num_outputs, structure)
    stages = stages_of(model, operations_of(options), learns, num_outputs)
    if structure is not None:
        _check_fit(structure, stages)
    weight = model.head.weight
    target_width = options.target_width or weight.shape[1]
    critics = Critics(
        stages,
        streams,
        like=weight,
        width=weight.shape[1],
        target=options.target,
        target_width=target_width,
        target_hidden=options.target_hidden,
        local_width=options.local_width or target_width,
        local_density=options.local_density,
        form=options.critic,
        hidden=options.critic_hidden,
        linear=options.linear,
        shared=options.shared,
        begins_as_stream=options.begins_as_stream,
        transport=None
        if options.transport == "none"
        else Transport(range(stages[0].index + 1, len(model.blocks)), weight.shape[1], target_width, streams, weight),
    )
    size, most = sum(parameter.numel() for parameter in critics.parameters()), options.max_meta_parameters
    if most is not None and size > most:
        raise RecipeError(
            f"critics and MLP_G would have {size:,} parameters, above credit.max_meta_parameters {most:,}; make "
            "credit.critic_hidden or credit.local_width smaller"
        )
    return Proposals(critics, stages, learns, target=options.target, structure=structure, density=options.density)


def optimiser_of(options: Options, proposals: Proposals) -> MetaOptimiser:
    """AdamW for critics and MLP_G, each with its learning rate."""
    parameters = dict(proposals.critics.named_parameters())
    target_lr = options.target_lr or options.meta_lr
    return MetaOptimiser(
        parameters,
        {name: target_lr if name.startswith("target.") else options.meta_lr for name in parameters},
        betas=BETAS,
        weight_decay=options.meta_weight_decay,
        warmup=options.meta_warmup,
    )


def schedule_of(options: Options) -> Schedule:
    """What depends on the step."""
    return Schedule(
        training=options.objective,
        regression_steps=options.regression_steps,
        layers_per_step=options.layers_per_step,
        meta_every=options.meta_every,
        meta_only_steps=options.meta_only_steps,
        proposal_warmup=options.proposal_warmup,
        joint_every=options.joint_every,
    )


def _check_fit(structure: Structure, stages: list[Stage]) -> None:
    """What `Options.refusals` cannot know: embeddings are as large as the vocabulary."""
    for name, shape in ((name, shape) for stage in stages for name, shape in stage.shapes.items()):
        if len(shape) == 2 and (misfit := structure.misfit(shape)):
            raise RecipeError(f"{misfit} {name} of {shape[0]} × {shape[1]}; make credit.embeddings frozen")


def _num_outputs(structure: Structure, shape: tuple[int, ...]) -> int:
    """How many numbers a critic says of a parameter: a vector is itself."""
    return structure.num_outputs(shape) if len(shape) == 2 else math.prod(shape)


class MetaCritic:
    """MCL-DSUP: critics propose each layer's weight update, and learn from what the loss would have been with it.

        G   = MLP_G(h_N, L or ∂L/∂h_N),   LTF_i = M_i G                        a global target, and a local copy
        ΔW_i = SparseMask(C_i(h_i, LTF_i))                                      a critic's proposal
        min over θ_C, θ_G of  mean_i  L(W_i − η ΔW_i) + λ (η/2) ‖ΔW_i‖²         phase A, the meta-loss
        W_i ← update(W_i, ΔW_i)                                                 phase B

    Each L(W_i − η ΔW_i) is a partial forward pass: stage i with its hypothetical weights, all stages above with the
    ones they have. Nothing is backpropagated into the main weights; what flows back through the stages above ends in
    the critics. With λ = 1 (`penalty`, proximal: ours) the best proposal is ΔW = ∇L; with λ = 0 the loss is the
    source's, whose best proposal is whatever step helps this batch most. With `hypothesis: activations` (ours) a stage
    keeps its weights, and what comes out at its points moves by −η δ. The proposal goes to the run's update; `sgd` is
    the source's literal phase B.

    Head and final norm learn by their exact local gradient, embeddings by a critic of their own or not at all. With
    `objective: regression`, or during the first `regression_steps`, critics learn from the true gradient instead: that
    is backpropagation, for the critics' sake, and is charged. `objective: frozen` leaves the critics as they were
    drawn.

    Where we deviate from the source: h_j' stays attached between stages, or every meta-gradient but the last stage's
    would be zero; rows of M_i have length 1, or LTF would vanish; networks see normalised hidden states; structure
    `outer`, target `error` and critic `gated` are ours. Reference: "MCL-DSUP: Meta-Critic Learning for Decoupled Sparse
    Update Propagation in Transformers", an unpublished proposal; its relatives are synthetic gradients (Jaderberg et
    al., ICML 2017) and learned optimisers (Andrychowicz et al., NeurIPS 2016).

    Critics, the target network and their optimiser around one model's stages.
    """

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
