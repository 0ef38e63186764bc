"""The rule's section of a recipe, and what it refuses."""

from typing import Any, Literal

from pydantic import Field, model_validator

from heterodox.core import config
from heterodox.credit.meta_critic.mask import units_kept
from heterodox.credit.meta_critic.network import Form
from heterodox.credit.meta_critic.structure import Block, Elementwise, LowRank, Structure
from heterodox.credit.meta_critic.target import TargetKind

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
