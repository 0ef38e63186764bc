"""How numbers that a critic puts out become a matrix ΔW, and what its sparse mask keeps or drops.

    elementwise   every entry of ΔW is an output           units: entries
    low_rank      ΔW = Σ_r a_r b_rᵀ                          units: rank-one terms, by ‖a_r‖ ‖b_r‖
    block         tiles of side s, each with a score: ΔW_tile = σ(score) · content
                                                            units: tiles, by norm

These are for outputs that are means over all tokens. `outer.py` has the fourth, whose outputs are per token. Vectors
(gains, biases) are elementwise and whole under each.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.credit.meta_critic.mask import largest, units_kept

Shape = tuple[int, ...]


class Structure(ABC):
    """A form of ΔW. `density` is the share of units that the mask keeps."""

    def __init__(self, density: float = 1.0) -> None:
        self.density = density

    @abstractmethod
    def units(self, shape: Shape) -> int:
        """Among how many units of a matrix the mask chooses."""

    @abstractmethod
    def num_outputs(self, shape: Shape) -> int:
        """How many numbers describe a matrix."""

    @abstractmethod
    def matrix(self, outputs: Float[Tensor, " outputs"], shape: Shape) -> Float[Tensor, "fan_out fan_in"]:
        """ΔW, differentiable in the outputs."""

    @abstractmethod
    def regression_target(self, gradient: Tensor) -> Tensor:
        """What gradient regression asks for: the gradient, sparse where units are of the matrix itself."""

    def misfit(self, shape: Shape) -> str:
        """Why a matrix cannot have this form, but for its name; empty if it can."""
        units = self.units(shape)
        if units_kept(self.density, units):
            return ""
        return f"credit.density {self.density:g} keeps none of the {units} units of"

    def macs(self, shape: Shape) -> int:
        """Multiply–adds of `matrix`."""
        return 0

    def _keep(self, scores: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
        keep = units_kept(self.density, scores.shape[-1])
        return torch.ones_like(scores) if keep == scores.shape[-1] else largest(scores, keep).to(scores.dtype)


class Elementwise(Structure):
    """Every entry for itself."""

    def units(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def num_outputs(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def matrix(self, outputs: Tensor, shape: Shape) -> Tensor:
        return (outputs * self._keep(outputs.detach().abs())).view(shape)

    def regression_target(self, gradient: Tensor) -> Tensor:
        return gradient * self._keep(gradient.flatten().abs()).view_as(gradient)


class LowRank(Structure):
    """ΔW = A B with A of `rank` columns."""

    def __init__(self, rank: int, density: float = 1.0) -> None:
        super().__init__(density)
        self.rank = rank

    def misfit(self, shape: Shape) -> str:
        if self.rank > min(shape):
            return f"credit.rank is {self.rank}, above the rank {min(shape)} of"
        return super().misfit(shape)

    def units(self, shape: Shape) -> int:
        return self.rank

    def num_outputs(self, shape: Shape) -> int:
        return self.rank * sum(shape)

    def matrix(self, outputs: Tensor, shape: Shape) -> Tensor:
        left, right = outputs.split([self.rank * shape[0], self.rank * shape[1]])
        left, right = left.view(self.rank, shape[0]), right.view(self.rank, shape[1])
        keep = self._keep((left.norm(dim=1) * right.norm(dim=1)).detach())
        return (left * keep[:, None]).T @ right

    def regression_target(self, gradient: Tensor) -> Tensor:
        return gradient

    def macs(self, shape: Shape) -> int:
        return self.rank * shape[0] * shape[1]


class Block(Structure):
    """Square tiles, each with a score: ΔW_tile = σ(score) · content; kept are the tiles of largest norm."""

    def __init__(self, side: int, density: float = 1.0) -> None:
        super().__init__(density)
        self.side = side

    def misfit(self, shape: Shape) -> str:
        if any(size % self.side for size in shape):
            return f"credit.block is {self.side}, which does not divide"
        return super().misfit(shape)

    def units(self, shape: Shape) -> int:
        return (shape[0] // self.side) * (shape[1] // self.side)

    def num_outputs(self, shape: Shape) -> int:
        return shape[0] * shape[1] + self.units(shape)

    def matrix(self, outputs: Tensor, shape: Shape) -> Tensor:
        content, scores = outputs.split([shape[0] * shape[1], self.units(shape)])
        tiles = self._tiles(content.view(shape)) * scores.sigmoid()[:, None, None]
        keep = self._keep(tiles.detach().norm(dim=(1, 2)))
        return self._joined(tiles * keep[:, None, None], shape)

    def regression_target(self, gradient: Tensor) -> Tensor:
        tiles = self._tiles(gradient)
        return self._joined(tiles * self._keep(tiles.norm(dim=(1, 2)))[:, None, None], tuple(gradient.shape))

    def _tiles(self, matrix: Tensor) -> Float[Tensor, "tiles side side"]:
        s = self.side
        return matrix.unflatten(1, (-1, s)).unflatten(0, (-1, s)).transpose(1, 2).flatten(0, 1)

    def _joined(self, tiles: Tensor, shape: Shape) -> Tensor:
        s = self.side
        return tiles.unflatten(0, (shape[0] // s, shape[1] // s)).transpose(1, 2).reshape(shape)
