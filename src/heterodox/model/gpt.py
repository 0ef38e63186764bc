"""A pre-LayerNorm GPT (Radford et al., 2019) whose every weight matrix stands alone.

Differences from GPT-2: q, k and v are separate projections, the output head is not tied to the token embedding, the
GELU is exact, and linear layers have no bias unless asked.

Switches replace softmax by sigmoid attention, derivatives by local approximations, and what the stream may carry by a
bottleneck; docs/model.md has the equation and the source of each. With a straight-through function or a LayerNorm that
is not exact, autograd's gradient is that of the model as configured, and so is what manifests and probes then call
`exact` and `backprop`: not the derivative of the loss.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from heterodox.core import slot as config
from heterodox.core.protocols import ForwardFlops, LanguageModel
from heterodox.core.rng import Streams
from heterodox.model.attention import (
    CausalMix,
    CausalSelfAttention,
    SigmoidBias,
    SigmoidMix,
    SoftmaxBackward,
    causal_mix,
)
from heterodox.model.dynamics import FeedForward, Matmuls
from heterodox.model.local_backward import DirectionalVQ, FrozenSubspace, HardTopK, StraightThroughGELU
from heterodox.model.norms import Backward, LayerNorm

# A transformer block: attention and an MLP, each normed at its entry and added to the residual stream.


class ResidualGate(nn.Module):
    """α x, with one learned α that starts at 1: how much of a branch the stream takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        return self.weight * x


class MLP(nn.Module):
    """Two linear layers around a GELU, of whose outputs the `top_k` largest are kept."""

    def __init__(
        self, width: int, hidden: int, *, bias: bool, straight_through_gelu: bool = False, top_k: int | None = None
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(width, hidden, bias=bias)
        self.act = StraightThroughGELU() if straight_through_gelu else nn.GELU()
        self.top_k = HardTopK(top_k) if top_k else nn.Identity()
        self.proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        return self.proj(self.top_k(self.act(self.fc(x))))


class Block(nn.Module):
    """x + α₁ attention(ln1(x)), then x + α₂ mlp(ln2(x)), then the stream's bottlenecks; each α is 1 without gates."""

    def __init__(
        self,
        width: int,
        hidden: int,
        mix: CausalMix,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        norm_backward: Backward = "exact",
        straight_through_gelu: bool = False,
        mlp_top_k: int | None = None,
        residual_top_k: int | None = None,
        vq_codes: int | None = None,
        residual_gates: bool = False,
    ) -> None:
        super().__init__()
        self.ln1 = LayerNorm(width, bias=bias, backward=norm_backward)
        self.attn = CausalSelfAttention(width, mix, bias=bias)
        self.attn_gate = ResidualGate() if residual_gates else nn.Identity()
        self.ln2 = LayerNorm(width, bias=bias, backward=norm_backward)
        self.mlp = MLP(width, hidden, bias=bias, straight_through_gelu=straight_through_gelu, top_k=mlp_top_k)
        self.mlp_gate = ResidualGate() if residual_gates else nn.Identity()
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.top_k = HardTopK(residual_top_k) if residual_top_k else nn.Identity()
        self.vq = DirectionalVQ(width, vq_codes) if vq_codes else nn.Identity()

    def forward(self, x: Float[Tensor, "*batch time width"]) -> Float[Tensor, "*batch time width"]:
        x = x + self.drop(self.attn_gate(self.attn(self.ln1(x))))
        x = x + self.drop(self.mlp_gate(self.mlp(self.ln2(x))))
        return self.vq(self.top_k(x))


# The options of a GPT: its sizes, and the switches that change its forward or its backward pass.


CHOOSING = ("mlp_top_k", "residual_top_k", "vq_codes")
"""Switches that choose what passes on: in bfloat16's few digits they choose otherwise."""


class GPTOptions(config.Config):
    """Sizes and switches; every switch's default leaves the plain GPT as it is."""

    name: Literal["gpt"] = "gpt"
    layers: int = Field(4, ge=1, description="blocks")
    heads: int = Field(4, ge=1, description="of attention, in each block; they divide the width")
    width: int = Field(128, ge=1, description="of the residual stream")
    context: int = Field(64, ge=1, description="tokens in a window")
    mlp_ratio: int = Field(4, ge=1, description="hidden width of the MLP over the model's width")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, on embeddings, attention and both branches")
    bias: bool = Field(False, description="in linear layers and norms (never in the head)")
    vocab_size: int | None = Field(None, ge=2, description="default: the tokenizer's")
    attention: Literal["softmax", "sigmoid"] = Field("softmax", description="what turns scores into weights")
    softmax_backward: SoftmaxBackward = Field(
        "autograd",
        description="of softmax and values, one kernel or written out; centred: not with dropout",
    )
    sigmoid_bias: SigmoidBias | None = Field(
        None,
        description="−ln(context), −ln(n − 1) for a causal row of n, 0, or learned; default: neg_log_n",
    )
    straight_through_sigmoid: bool = Field(False, description="leave σ(1 − σ) out of the backward pass")
    straight_through_gelu: bool = Field(False, description="leave the GELU's derivative out of the backward pass")
    norm_backward: Backward = Field("exact", description="of every LayerNorm; projected is exact, too")
    mlp_top_k: int | None = Field(None, ge=1, description="keep so many hidden units of the MLP, the largest")
    residual_top_k: int | None = Field(None, ge=1, description="keep so many entries of the stream after each block")
    vq_codes: int | None = Field(None, ge=2, description="frozen directions for the stream after each block")
    subspace_rank: int | None = Field(
        None, ge=1, description="dimensions of the frozen subspace that holds the stream after each block"
    )
    residual_gates: bool = Field(False, description="a learned factor for each branch, from 1")
    frozen_embeddings: bool = Field(False, description="token and position embeddings stay as they were drawn")

    @model_validator(mode="after")
    def _options_belong_to_the_attention(self) -> "GPTOptions":
        if self.attention == "softmax":
            if self.sigmoid_bias is not None:
                raise ValueError(f"sigmoid_bias is {self.sigmoid_bias}, but attention is softmax; make it sigmoid")
            if self.straight_through_sigmoid:
                raise ValueError("straight_through_sigmoid is on, but attention is softmax; make it sigmoid")
        elif self.softmax_backward != "autograd":
            raise ValueError(f"softmax_backward is {self.softmax_backward}, but attention is sigmoid; make it softmax")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GPTOptions":
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        hidden = self.mlp_ratio * self.width
        limits = {"mlp_top_k": hidden, "residual_top_k": self.width, "subspace_rank": self.width}
        for key, limit in limits.items():
            if (getattr(self, key) or 0) > limit:
                what = "the MLP's hidden width" if key == "mlp_top_k" else "the width"
                raise ValueError(f"{key} is {getattr(self, key)}, above {what} of {limit}")
        if self.softmax_backward == "centred" and self.dropout:
            raise ValueError(
                f"softmax_backward centred is not the gradient under dropout, which is {self.dropout}; use fused"
            )
        return self

    def refusals(self, recipe: config.Config) -> list[str]:
        chosen = [key for key in CHOOSING if getattr(self, key) is not None]
        if not chosen or recipe.run.precision != "bfloat16":  # pyrefly: ignore[missing-attribute]
            return []
        return [
            f"model.{chosen[0]} is a choice, which comes out otherwise in run.precision bfloat16's 3 digits, and the "
            "signal with it (its cosine with float32's falls below 0.99); make run.precision float32"
        ]


# What enters the residual stream.


class DroppedSum(nn.Dropout):
    """Dropout of the sum of token and position embeddings: a module of both, so that rules see what it drops."""

    def forward(  # pyrefly: ignore[bad-override]
        self, tokens: Float[Tensor, "*batch time width"], positions: Float[Tensor, "time width"]
    ) -> Float[Tensor, "*batch time width"]:
        return super().forward(tokens + positions)


# How a GPT's weights and frozen bases are drawn.


@torch.no_grad()
def initialise(model: nn.Module, streams: Streams, branches: int) -> None:
    """GPT-2's initialisation: normal with standard deviation 0.02, over √branches where a branch ends.

    Each parameter draws from a stream of its own name, so that a switch which adds one leaves all others as they were.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = 0.02 / math.sqrt(branches) if name.endswith(("attn.o.weight", "mlp.proj.weight")) else 0.02
        parameter.copy_(torch.randn(parameter.shape, generator=streams.generator("init", name)) * std)
    for name, module in model.named_modules():
        if isinstance(module, SigmoidMix):
            module.reset_parameters()
        elif isinstance(module, (DirectionalVQ, FrozenSubspace)):
            module.draw(streams.generator("init", name))


class GPT(LanguageModel):
    """Token and position embeddings, `layers` blocks, a final LayerNorm and a linear head."""

    class Config(GPTOptions):
        def build(self, vocab_size: int, streams: Streams) -> "GPT":
            """A model with freshly drawn weights, on the current default device."""
            model = GPT(vocab_size=vocab_size, **self.model_dump(exclude={"name", "vocab_size"}))
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
        attention: Literal["softmax", "sigmoid"] = "softmax",
        softmax_backward: SoftmaxBackward = "autograd",
        sigmoid_bias: SigmoidBias | None = None,
        straight_through_sigmoid: bool = False,
        straight_through_gelu: bool = False,
        norm_backward: Backward = "exact",
        mlp_top_k: int | None = None,
        residual_top_k: int | None = None,
        vq_codes: int | None = None,
        subspace_rank: int | None = None,
        residual_gates: bool = False,
        frozen_embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.context = context
        self.tok_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.Embedding(context, width)
        for embedding in (self.tok_emb, self.pos_emb):
            embedding.weight.requires_grad_(not frozen_embeddings)
        self.drop = DroppedSum(dropout) if dropout else None
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            mix = causal_mix(
                heads,
                dropout,
                context=context,
                attention=attention,
                softmax_backward=softmax_backward,
                sigmoid_bias=sigmoid_bias,
                straight_through_sigmoid=straight_through_sigmoid,
            )
            block = Block(
                width,
                mlp_ratio * width,
                mix,
                dropout=dropout,
                bias=bias,
                norm_backward=norm_backward,
                straight_through_gelu=straight_through_gelu,
                mlp_top_k=mlp_top_k,
                residual_top_k=residual_top_k,
                vq_codes=vq_codes,
                residual_gates=residual_gates,
            )
            self.blocks.append(block)
        self.subspace = FrozenSubspace(width, subspace_rank) if subspace_rank else nn.Identity()
        self.ln_f = LayerNorm(width, bias=bias, backward=norm_backward)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.register_buffer("positions", torch.arange(context), persistent=False)

    def initialise(self, streams: Streams) -> None:
        """Draw all weights and frozen bases afresh; see `initialise.py`."""
        initialise(self, streams, branches=2 * len(self.blocks))

    def embed(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """The residual stream below the first block."""
        words, places = self.tok_emb(tokens), self.pos_emb(self.positions[: tokens.shape[1]])
        return words + places if self.drop is None else self.drop(words, places)

    def dynamics(self, tokens: Int[Tensor, "batch time"]) -> FeedForward:
        """The model as a dynamical system whose states are its blocks' outputs; not with a frozen subspace."""
        assert isinstance(self.subspace, nn.Identity)
        forward = self.forward_flops(*tokens.shape)
        return FeedForward(lambda: self.embed(tokens), self.blocks, Matmuls(forward.linear, forward.attention))

    def features(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        with self.autocast():
            x = self.embed(tokens)
            for block in self.blocks:
                x = self.subspace(block(x))  # one basis for all blocks
            return x

    @property
    def stream_writers(self) -> frozenset[str]:
        ends = ("attn.o", "attn_gate", "mlp.proj", "mlp_gate")
        return frozenset(
            {"tok_emb", "pos_emb", *(f"blocks.{i}.{end}" for i in range(len(self.blocks)) for end in ends)}
        )

    def forward_flops(self, batch: int, time: int) -> ForwardFlops:
        tokens, width, layers = batch * time, self.head.in_features, len(self.blocks)
        matrices = sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        codes = sum(m.codebook.numel() for m in self.blocks.modules() if isinstance(m, DirectionalVQ))
        basis = self.subspace.basis.numel() if isinstance(self.subspace, FrozenSubspace) else 0
        return ForwardFlops(
            linear=2 * tokens * matrices,
            attention=4 * tokens * time * width * layers,
            head=2 * tokens * self.head.weight.numel(),
            fixed=4 * tokens * basis * layers,
            lookup=2 * tokens * codes,
        )


# Sampling text from a language model.


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Int[Tensor, "batch time"],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Int[Tensor, " batch"]], None] | None = None,
) -> Int[Tensor, "batch longer"]:
    """Continue each prompt by `num_tokens` sampled tokens.

    Temperature 0 takes the likeliest token. `top_k` keeps the k likeliest, `top_p` the smallest set whose probability
    reaches p (Holtzman et al., 2020). Ids from `vocab_size` on, which pad a model's output, are never drawn. The model
    sees the last `model.context` tokens. `on_token` is called with each new token. Raises `ValueError` for an empty
    prompt or settings out of range.
    """
    if prompt.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token")
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("expected temperature ≥ 0, top_k ≥ 1 and 0 < top_p ≤ 1")
    was_training = model.training
    model.eval()
    tokens = prompt
    for _ in range(num_tokens):
        logits = model(tokens[:, -model.context :])[:, -1].float()
        if vocab_size is not None:
            logits[:, vocab_size:] = -torch.inf
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            # The largest becomes 0 first: however small the temperature, no quotient overflows upwards.
            scaled = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).float()
            probabilities = torch.softmax(_filter(scaled, top_k, top_p), dim=-1)
            chosen = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(tokens.device)
        tokens = torch.cat([tokens, chosen], dim=1)
        if on_token is not None:
            on_token(chosen[:, 0])
    model.train(was_training)
    return tokens


def _filter(
    logits: Float[Tensor, "batch vocab"], top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch vocab"]:
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the first token always stays
        logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
    return logits
