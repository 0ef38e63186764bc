"""One block of the equilibrium model: what drives a layer's state besides its input."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.protocols import ForwardFlops, LanguageModel
from heterodox.core.rng import Streams
from heterodox.core.types import Diagnosis
from heterodox.model.attention import CausalMix, CausalSelfAttention
from heterodox.model.dynamics import (
    Dynamics,
    Matmuls,
    Relaxed,
    Solver,
    all_before,
    diagnose,
    per_position,
    relax,
    some_steps,
)
from heterodox.model.gpt import MLP, GPTOptions


class EquilibriumBlock(nn.Module):
    """attention(ln1(z)) + mlp(ln2(z)); norms and MLP can be left out."""

    def __init__(self, width: int, heads: int, hidden: int, *, layer_norm: bool, bias: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width, bias=bias) if layer_norm else nn.Identity()
        self.attn = CausalSelfAttention(width, CausalMix(heads), bias=bias)
        self.ln2 = nn.LayerNorm(width, bias=bias) if layer_norm and hidden else nn.Identity()
        self.mlp = MLP(width, hidden, bias=bias) if hidden else None

    def forward(self, z: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        mixed = self.attn(self.ln1(z))
        return mixed if self.mlp is None else mixed + self.mlp(self.ln2(z))

    @property
    def matrices(self) -> int:
        """Entries of all weight matrices."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    @property
    def entering(self) -> int:
        """Entries of the weight matrices that see the state itself: none behind a norm, which has parameters."""
        return 0 if isinstance(self.ln1, nn.LayerNorm) else self.matrices - self.leaving

    @property
    def leaving(self) -> int:
        """Entries of the weight matrices that write to the force."""
        return self.attn.o.weight.numel() + (0 if self.mlp is None else self.mlp.proj.weight.numel())


# The options of the equilibrium model, and why some of the GPT's are not among them.


TRAINABLE_BY = ("equilibrium", "bptt", "implicit", "backprop", "head_only")
UNTRUE = "a force is applied again and again, and credit reads it off its true Jacobian, which this option falsifies"
JUMPS = "a force that jumps from one choice to another need not have a fixed point"
REASONS = {
    "softmax_backward": UNTRUE,
    "straight_through_sigmoid": UNTRUE,
    "straight_through_gelu": UNTRUE,
    "norm_backward": UNTRUE,
    "vq_codes": UNTRUE,
    "mlp_top_k": JUMPS,
    "residual_top_k": JUMPS,
}
"""Why the force cannot have these switches of the GPT."""


class EquilibriumOptions(config.Config):
    """Sizes, the force, and how it relaxes."""

    name: Literal["equilibrium"] = "equilibrium"
    layers: int = Field(1, ge=1, description="blocks in the joint state")
    heads: int = Field(4, ge=1)
    width: int = Field(128, ge=1)
    context: int = Field(64, ge=1, description="tokens in a window")
    mlp_ratio: int = Field(4, ge=0, description="hidden width of the MLP over the model's width; 0: no MLP")
    layer_norm: bool = Field(True, description="normalise what attention and MLP see")
    bias: bool = False
    scale: float = Field(1.0, gt=0, description="strength of attention and MLP in the force, s")
    damping: float = Field(1.0, ge=0, description="of the force, c")
    step_size: float | None = Field(None, gt=0, description="of the Euler steps, ε; null: 1 / (1 + s·c)")
    steps: int = Field(20, ge=1, description="steps of a relaxation; with a tolerance, at most")
    tolerance: float | None = Field(
        None, gt=0, description="a position stops once it moves by less than this share of itself; null: never"
    )
    solver: Solver = "damped"
    embedding_std: float = Field(1.0, gt=0, description="of x, token and position embedding together")
    weight_std: float = Field(0.02, gt=0, description="of the initial weight matrices")
    dropout: float = Field(0.0, description="only 0: a force that changes from step to step has no fixed point")
    vocab_size: int | None = Field(None, ge=2, description="default: the tokenizer's")

    _some_steps = field_validator("steps", mode="before")(some_steps)

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, data: Any) -> Any:
        """An unknown key is a slip; one of the GPT's has a reason not to be here."""
        for key in data if isinstance(data, dict) else ():
            if key in GPTOptions.model_fields and key not in cls.model_fields:
                reason = REASONS.get(key, "its block is softmax attention and an MLP, and learns as a whole")
                raise ValueError(f"{key} is a switch of model gpt, which model equilibrium has not: {reason}")
        return data

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value:
            raise ValueError(f"{value} cannot be: a force that changes from step to step has no fixed point")
        return value

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "EquilibriumOptions":
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        return self

    def refusals(self, recipe: config.Config) -> list[str]:
        credit = recipe.credit.name  # pyrefly: ignore[missing-attribute]
        if credit in TRAINABLE_BY:
            return []
        return [
            f"credit {credit} cannot train the equilibrium model: only {', '.join(TRAINABLE_BY)} know a force that "
            "is applied again and again, and another rule's errors would not be those of its true Jacobian"
        ]


# An attention language model whose hidden state is a fixed point.
#
#     F_l(z) = −(z_l − z_{l−1}) + s·(attention(z_l) + mlp(z_l) − c·z_l),    z_0 = x,    logits = head(ln_f(z*_L))
#
# x, the sum of token and position embeddings, is clamped. The states z_1 … z_L of all layers relax together from
# z_l = x by Euler steps of size ε until F(z*) ≈ 0; one layer is the usual case. c > 0 damps: without attention and MLP
# the Jacobian is −(1 + s·c), and the step that suits it is ε ≈ 1 / (1 + s·c). With `layer_norm` attention and MLP see
# the normalised state; its Jacobian is that of the norm, 1/‖z‖, so embeddings must not be small (`embedding_std`).
#
# Attention is causal, and so is the relaxation: a tolerance and Anderson's mixture are decided position by position.


class Equilibrium(LanguageModel):
    """Token and position embeddings, `layers` blocks in one joint relaxation, a final LayerNorm and a linear head."""

    class Config(EquilibriumOptions):
        def build(self, vocab_size: int, streams: Streams) -> "Equilibrium":
            """A model with freshly drawn weights, on the current default device."""
            options = self.model_dump(exclude={"name", "dropout", "vocab_size", "embedding_std", "weight_std"})
            model = Equilibrium(vocab_size=vocab_size, **options)
            model.initialise(streams, embedding_std=self.embedding_std, weight_std=self.weight_std)
            return model

    def __init__(
        self,
        *,
        vocab_size: int,
        layers: int = 1,
        heads: int,
        width: int,
        context: int,
        mlp_ratio: int = 4,
        layer_norm: bool = True,
        bias: bool = False,
        scale: float = 1.0,
        damping: float = 1.0,
        step_size: float | None = None,
        steps: int = 20,
        tolerance: float | None = None,
        solver: Solver = "damped",
    ) -> None:
        super().__init__()
        self.context = context
        self.scale, self.damping = scale, damping
        self.step_size = 1 / (1 + scale * damping) if step_size is None else step_size
        self.steps, self.tolerance, self.solver = steps, tolerance, solver
        self.steps_taken = steps  # by the last forward pass: what a tolerance saves is known only afterwards
        self.tok_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            EquilibriumBlock(width, heads, mlp_ratio * width, layer_norm=layer_norm, bias=bias) for _ in range(layers)
        )
        self.ln_f = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.register_buffer("positions", torch.arange(context), persistent=False)

    @torch.no_grad()
    def initialise(self, streams: Streams, *, embedding_std: float = 1.0, weight_std: float = 0.02) -> None:
        """Normal weights, each parameter from a stream of its own name; biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = embedding_std / math.sqrt(2) if name in self.embedding_names else weight_std
            parameter.copy_(torch.randn(parameter.shape, generator=streams.generator("init", name)) * std)

    def dynamics(self, tokens: Int[Tensor, "batch time"]) -> "BlockDynamics":
        """The relaxation on `tokens`."""
        return BlockDynamics(self, self.tok_emb(tokens) + self.pos_emb(self.positions[: tokens.shape[1]]))

    def features(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """The last layer's state at the end of the free phase."""
        with self.autocast():
            relaxed = self.dynamics(tokens).settle()
            self.steps_taken = relaxed.steps
            return relaxed.state[-1]

    def diagnose(self, tokens: Int[Tensor, "batch time"]) -> Diagnosis:
        """The residual of the free phase on `tokens`, and the spectral radius of its step."""
        dynamics = self.dynamics(tokens)
        return diagnose(dynamics, dynamics.start, self.remedies)

    @property
    def remedies(self) -> list[str]:
        """What makes the relaxation contract, with the settings that there are."""
        said = [f"more model.damping (now {self.damping:g})", f"a smaller model.scale (now {self.scale:g})"]
        if self.step_size * (1 + self.scale * self.damping) > 1:
            said.append(f"a smaller model.step_size (now {self.step_size:g})")
        if isinstance(self.blocks[0].ln1, nn.Identity):
            said.append("model.layer_norm true")
        return [*said, "at initialisation a smaller model.weight_std", "in training a credit.jacobian_penalty"]

    @property
    def stream_writers(self) -> frozenset[str]:
        layers = ("attn.o",) if self.blocks[0].mlp is None else ("attn.o", "mlp.proj")
        return frozenset({"tok_emb", "pos_emb", *(f"blocks.{i}.{x}" for i in range(len(self.blocks)) for x in layers)})

    def forward_flops(self, batch: int, time: int) -> ForwardFlops:
        """FLOPs of a forward pass with as many steps as the last one took; before the first, all of them."""
        drive = self.drive_flops(batch, time)
        head = 2 * batch * time * self.head.weight.numel()
        return ForwardFlops(self.steps_taken * drive.linear, self.steps_taken * drive.attention, head)

    def drive_flops(self, batch: int, time: int) -> Matmuls:
        """FLOPs of one evaluation of all blocks."""
        blocks: list[EquilibriumBlock] = list(self.blocks)  # pyrefly: ignore[bad-assignment]
        return Matmuls(
            linear=2 * batch * time * sum(block.matrices for block in blocks),
            attention=4 * batch * time * time * self.head.in_features * len(blocks),
            entering=2 * batch * time * sum(block.entering for block in blocks),
            leaving=2 * batch * time * sum(block.leaving for block in blocks),
        )


class BlockDynamics(Dynamics):
    """The relaxation of an `Equilibrium` model on one batch: G_l(z) = z_{l−1} + s·block_l(z_l), decay 1 + s·c."""

    nudged_steps = 15

    def __init__(self, model: Equilibrium, x: Float[Tensor, "batch time width"]) -> None:
        self.model, self.x = model, x
        self.decay = 1 + model.scale * model.damping
        self.step_size = model.step_size
        self.flops = model.drive_flops(*x.shape[:2])

    @property
    def start(self) -> Float[Tensor, "layers batch time width"]:
        """Every layer's state at the embeddings."""
        x = self.x if torch.is_grad_enabled() else self.x.detach()
        return x.expand(len(self.model.blocks), *x.shape)

    def drive(self, z: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        states = z.unbind(0)
        inputs = (self.x, *states[:-1])
        blocks = self.model.blocks
        driven = [
            torch.add(below, block(state), alpha=self.model.scale)
            for below, block, state in zip(inputs, blocks, states, strict=True)
        ]
        return driven[0].unsqueeze(0) if len(driven) == 1 else torch.stack(driven)

    def settle(self) -> Relaxed:
        return self.settle_from(self.start, self.model.steps)

    def settle_from(self, z: Float[Tensor, "layers batch time width"], steps: int) -> Relaxed:
        """The free phase from another state, and for so many steps at most."""
        return relax(
            lambda z: torch.add(z, self.force(z), alpha=self.step_size),
            z,
            steps=steps,
            solver=self.model.solver,
            tolerance=self.model.tolerance,
            dot=per_position,
            going_on=all_before,
        )
