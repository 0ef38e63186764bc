"""A pre-LayerNorm GPT (Radford et al., 2019) whose every weight matrix stands alone.

Differences from GPT-2: q, k and v are separate projections, the output head is not tied to the token embedding, the
GELU is exact, and linear layers have no bias unless asked.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from heterodox.core import config
from heterodox.core.protocols import ForwardFlops, LanguageModel
from heterodox.core.rng import Streams
from heterodox.model.attention import CausalSelfAttention
from heterodox.model.dynamics import FeedForward, Matmuls


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(width, hidden, bias=bias)
        self.act = nn.GELU()
        self.proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        return self.proj(self.act(self.fc(x)))


class Block(nn.Module):
    """x + attention(ln1(x)), then x + mlp(ln2(x))."""

    def __init__(self, width: int, heads: int, hidden: int, *, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width, bias=bias)
        self.attn = CausalSelfAttention(width, heads, dropout=dropout, bias=bias)
        self.ln2 = nn.LayerNorm(width, bias=bias)
        self.mlp = MLP(width, hidden, bias=bias)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        x = x + self.drop(self.attn(self.ln1(x)))
        return x + self.drop(self.mlp(self.ln2(x)))


class GPT(LanguageModel):
    """Token and position embeddings, `layers` blocks, a final LayerNorm and a linear head."""

    class Config(config.Config):
        name: Literal["gpt"] = "gpt"
        layers: int = Field(4, ge=1)
        heads: int = Field(4, ge=1)
        width: int = Field(128, ge=1)
        context: int = Field(64, ge=1, description="tokens in a window")
        mlp_ratio: int = Field(4, ge=1, description="hidden width of the MLP over the model's width")
        dropout: float = Field(0.0, ge=0, lt=1)
        bias: bool = False
        vocab_size: int | None = Field(None, ge=2, description="default: the tokenizer's")

        @model_validator(mode="after")
        def _heads_divide_width(self) -> "GPT.Config":
            if self.width % self.heads:
                raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
            return self

        def build(self, vocab_size: int, streams: Streams) -> "GPT":
            """A model with freshly drawn weights, on the current default device."""
            model = GPT(
                vocab_size=vocab_size,
                layers=self.layers,
                heads=self.heads,
                width=self.width,
                context=self.context,
                mlp_ratio=self.mlp_ratio,
                dropout=self.dropout,
                bias=self.bias,
            )
            model.initialise(streams)
            return model

    def __init__(
        self,
        *,
        vocab_size: int,
        layers: int,
        heads: int,
        width: int,
        context: int,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.context = context
        self.autocast_dtype: torch.dtype | None = None
        self.tok_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio * width, dropout=dropout, bias=bias) for _ in range(layers)
        )
        self.ln_f = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.register_buffer("positions", torch.arange(context), persistent=False)

    @torch.no_grad()
    def initialise(self, streams: Streams) -> None:
        """GPT-2's initialisation. Each parameter draws from a stream of its own name, so that a switch which adds
        a parameter leaves all others as they were."""
        branches = math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.02 / branches if name.endswith(("attn.o.weight", "mlp.proj.weight")) else 0.02
            parameter.copy_(torch.randn(parameter.shape, generator=streams.generator("init", name)) * std)

    def embed(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """The residual stream below the first block."""
        return self.drop(self.tok_emb(tokens) + self.pos_emb(self.positions[: tokens.shape[1]]))

    def dynamics(self, tokens: Int[Tensor, "batch time"]) -> FeedForward:
        """The model as a dynamical system whose states are its layers' outputs."""
        forward = self.forward_flops(*tokens.shape)
        return FeedForward(lambda: self.embed(tokens), self.blocks, Matmuls(forward.linear, forward.attention))

    def features(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        with self._autocast():
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return x

    def readout(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time vocab"]:
        with self._autocast():
            return self.head(self.ln_f(hidden))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.head.weight.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        )

    @property
    def readout_names(self) -> frozenset[str]:
        return frozenset(n for n, _ in self.named_parameters() if n.startswith(("ln_f.", "head.")))

    @property
    def embedding_names(self) -> frozenset[str]:
        return frozenset({"tok_emb.weight", "pos_emb.weight"})

    @property
    def stream_writers(self) -> frozenset[str]:
        outputs = (f"blocks.{i}.{layer}" for i in range(len(self.blocks)) for layer in ("attn.o", "mlp.proj"))
        return frozenset({"tok_emb", "pos_emb", *outputs})

    def forward_flops(self, batch: int, time: int) -> ForwardFlops:
        matrices = sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        width = self.head.in_features
        return ForwardFlops(
            linear=2 * batch * time * matrices,
            attention=4 * batch * time * time * width * len(self.blocks),
            head=2 * batch * time * self.head.weight.numel(),
        )
