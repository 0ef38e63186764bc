"""What enters the residual stream."""

from jaxtyping import Float
from torch import Tensor, nn


class DroppedSum(nn.Dropout):
    """Dropout of the sum of token and position embeddings: a module of both, so that rules see what it drops."""

    def forward(  # pyrefly: ignore[bad-override]
        self, tokens: Float[Tensor, "*batch time width"], positions: Float[Tensor, "time width"]
    ) -> Float[Tensor, "*batch time width"]:
        return super().forward(tokens + positions)
