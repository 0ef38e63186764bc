"""A pre-LayerNorm GPT (Radford et al., 2019) whose every weight matrix stands alone.

Differences from GPT-2: q, k and v are separate projections, the output head is not tied to the token embedding, the
GELU is exact, and linear layers have no bias unless asked.

Switches replace softmax by sigmoid attention, derivatives by local approximations, and what the stream may carry by a
bottleneck; docs/model.md has the equation and the source of each. With a straight-through function or a LayerNorm that
is not exact, autograd's gradient is that of the model as configured, and so is what manifests and probes then call
`exact` and `backprop`: not the derivative of the loss.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heterodox.core.protocols import ForwardFlops, LanguageModel
from heterodox.core.rng import Streams
from heterodox.model.attention import SigmoidBias, SoftmaxBackward, causal_mix
from heterodox.model.block import Block
from heterodox.model.bottleneck import DirectionalVQ, FrozenSubspace
from heterodox.model.config import GPTOptions
from heterodox.model.dynamics import FeedForward, Matmuls
from heterodox.model.embedding import DroppedSum
from heterodox.model.initialise import initialise
from heterodox.model.norm import Backward, LayerNorm


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
