"""One block of the equilibrium model: what drives a layer's state besides its input."""

from jaxtyping import Float
from torch import Tensor, nn

from heterodox.model.attention import CausalMix, CausalSelfAttention
from heterodox.model.block import MLP


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
