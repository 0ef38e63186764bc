"""An attention language model whose hidden state is a fixed point.

    F_l(z) = −(z_l − z_{l−1}) + s·(attention(z_l) + mlp(z_l) − c·z_l),    z_0 = x,    logits = head(ln_f(z*_L))

x, the sum of token and position embeddings, is clamped. The states z_1 … z_L of all layers relax together from
z_l = x by Euler steps of size ε until F(z*) ≈ 0; one layer is the usual case. c > 0 damps: without attention and MLP
the Jacobian is −(1 + s·c), and the step that suits it is ε ≈ 1 / (1 + s·c). With `layer_norm` attention and MLP see
the normalised state; its Jacobian is that of the norm, 1/‖z‖, so embeddings must not be small (`embedding_std`).

Attention is causal, and so is the relaxation: a tolerance and Anderson's mixture are decided position by position.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heterodox.core.protocols import Diagnosis, ForwardFlops, LanguageModel
from heterodox.core.rng import Streams
from heterodox.model.dynamics import Dynamics, Matmuls, Relaxed, Solver, all_before, diagnose, per_position, relax
from heterodox.model.equilibrium.block import EquilibriumBlock
from heterodox.model.equilibrium.config import EquilibriumOptions


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
