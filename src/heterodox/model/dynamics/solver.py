"""Fixed points of a step z ↦ g(z): plain repetition, or Anderson acceleration.

- `damped` repeats the step. With g(z) = z + ε·F(z) that is explicit Euler, and it converges where the spectral radius
  of 1 + ε·J is below one.
- `anderson` takes the mixture Σ αᵢ g(zᵢ) of the last few steps, Σ αᵢ = 1, whose residual Σ αᵢ (g(zᵢ) − zᵢ) is
  smallest (Anderson, "Iterative procedures for nonlinear integral equations", 1965; for such networks Bai, Koltun and
  Kolter, 2022).

A state is made of units (examples, or positions) that are solved side by side and never see each other's residual:
`dot` is the inner product within each unit. With a tolerance a unit stops where it is once its last step was small.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Solver = Literal["damped", "anderson"]
Step = Callable[[Tensor], Tensor]
Dot = Callable[[Tensor, Tensor], Tensor]
Stop = Callable[[Tensor], Tensor]

_MEMORY = 5
_TINY = 1e-30


@dataclass
class Relaxed:
    """Where a solver stopped, after how many steps, and by how much of itself each unit moved in the last one."""

    state: Tensor
    steps: int
    residuals: Float[Tensor, "1 batch units 1"]

    @property
    def residual(self) -> Float[Tensor, ""]:
        """The root mean square of the units' relative last steps."""
        return self.residuals.square().mean().sqrt()


def per_example(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two stacked states within each example: 1 × batch × 1 × 1."""
    return (a * b).sum((0, 2, 3), keepdim=True)


def per_position(a: Tensor, b: Tensor) -> Tensor:
    """The inner product within each position: 1 × batch × time × 1. What it decides cannot leak to earlier tokens."""
    return (a * b).sum((0, 3), keepdim=True)


def all_before(still: Bool[Tensor, "1 batch time 1"]) -> Bool[Tensor, "1 batch time 1"]:
    """A position goes on for as long as any position before it does."""
    return still.cumsum(2) > 0


def some_steps(value: object) -> object:
    """A validator for options that count the steps of a phase: none is refused with the reason."""
    if value == 0:
        raise ValueError(
            "found 0, but a phase of no steps leaves the state where it was, so that nothing is credited; "
            "expected at least 1"
        )
    return value


def relax(
    step: Step,
    start: Tensor,
    *,
    steps: int,
    solver: Solver = "damped",
    tolerance: float | None = None,
    dot: Dot = per_example,
    going_on: Stop = lambda still: still,
) -> Relaxed:
    """Repeat `step` from `start` at most `steps` times, each unit until its relative step is within `tolerance`.

    `going_on` turns the mask of units that have not arrived into the mask of those that go on. Differentiable where
    gradients are on. A plan's fake tensors have no values, so they always take all `steps`.
    """
    mix = _Anderson(dot) if solver == "anderson" else None
    z, last = start, start
    active: Tensor | None = None
    taken = 0
    for _ in range(steps):
        image = step(z)
        moved = image if mix is None else mix(z, image)
        taken += 1
        last, stepped = z, image
        if tolerance is None:
            z = moved
            continue
        z = moved if active is None else torch.where(active, moved, z)
        still = _relative(stepped - last, last, dot) > tolerance
        active = going_on(still if active is None else still & active)
        if not isinstance(z, FakeTensor) and not bool(active.any()):
            break
    return Relaxed(z, taken, _relative((stepped - last).detach(), last.detach(), dot))


def _relative(moved: Tensor, z: Tensor, dot: Dot) -> Tensor:
    return (dot(moved, moved) / (dot(z, z) + _TINY)).sqrt()


class _Anderson:
    """Remembers the last steps and mixes their images."""

    def __init__(self, dot: Dot) -> None:
        self.dot = dot
        self.images: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.gram: list[list[Tensor]] = []

    def __call__(self, z: Tensor, image: Tensor) -> Tensor:
        if len(self.images) == _MEMORY:
            self.images, self.residuals = self.images[1:], self.residuals[1:]
            self.gram = [row[1:] for row in self.gram[1:]]
        residual = image - z
        row = [self.dot(residual, other) for other in self.residuals]
        for older, product in zip(self.gram, row, strict=True):
            older.append(product)
        self.gram.append([*row, self.dot(residual, residual)])
        self.images.append(image)
        self.residuals.append(residual)
        weights = self._weights()
        return sum((w * g for w, g in zip(weights[1:], self.images[1:], strict=True)), weights[0] * self.images[0])

    def _weights(self) -> tuple[Tensor, ...]:
        """The mixture of smallest residual, by the normal equations with a ridge at the dtype's precision."""
        gram = torch.stack([torch.stack(row, -1) for row in self.gram], -2)
        size = gram.shape[-1]
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + _TINY
        identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
        ones = torch.ones((*gram.shape[:-1], 1), dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram / scale + 4 * torch.finfo(gram.dtype).eps * identity, ones)[..., 0]
        return (solution / solution.sum(-1, keepdim=True)).unbind(-1)
