"""A network as a dynamical system.

    dz/dt = F(z) = G(z) − d·z

z stacks the states of all layers, d > 0 is the decay, and G is what drives the state: the blocks, the clamped input
and whatever one layer passes on to the next. −d·z comes from an energy; G in general does not, because its Jacobian
is not symmetric.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from heterodox.core.rng import Streams
from heterodox.core.types import Diagnosis

# Fixed points of a step z ↦ g(z): plain repetition, or Anderson acceleration.
#
# - `damped` repeats the step. With g(z) = z + ε·F(z) that is explicit Euler, and it converges where the spectral radius
#   of 1 + ε·J is below one.
# - `anderson` takes the mixture Σ αᵢ g(zᵢ) of the last few steps, Σ αᵢ = 1, whose residual Σ αᵢ (g(zᵢ) − zᵢ) is
#   smallest (Anderson, "Iterative procedures for nonlinear integral equations", 1965; for such networks Bai, Koltun and
#   Kolter, 2022).
#
# A state is made of units (examples, or positions) that are solved side by side and never see each other's residual:
# `dot` is the inner product within each unit. With a tolerance a unit stops where it is once its last step was small.


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


@dataclass(frozen=True)
class Matmuls:
    """FLOPs of one evaluation's matrix products: with weights, and those of attention."""

    linear: int
    attention: int
    entering: int = 0
    """The part of `linear` whose input is the state itself, with no parameter before it."""
    leaving: int = 0
    """The part of `linear` whose output is added to the force."""


class Dynamics(ABC):
    """dz/dt = G(z) − d·z on one batch of tokens."""

    decay: float
    step_size: float
    """ε of the Euler steps that suit this system."""
    nudged_steps: int
    """Euler steps after which a nudge at the output has reached every layer."""
    acyclic: bool = False
    """Whether no state acts back on itself: then a nudge has settled for good after `nudged_steps`."""
    flops: Matmuls
    """FLOPs of one evaluation of G."""

    @abstractmethod
    def drive(self, z: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        """G(z)."""

    @abstractmethod
    def settle(self) -> Relaxed:
        """The free phase: from its starting point to the fixed point. Differentiable where gradients are on."""

    def force(self, z: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        """F(z)."""
        return torch.sub(self.drive(z), z, alpha=self.decay)


class Dynamical(Protocol):
    """A model that can be seen as a dynamical system."""

    def dynamics(self, tokens: Int[Tensor, "batch time"]) -> Dynamics: ...


# The spectral radius of a linear map that can only be applied.
#
# Arnoldi's iteration projects the map A onto the Krylov space of one vector. The eigenvalues of that small matrix,
# complex pairs included, approximate the largest ones of A. (The growth of a single vector, as in power iteration,
# never settles for a complex pair.) The space grows until the residual ‖A x − λ x‖ of the largest Ritz pair is small: λ
# is then an eigenvalue of a map that lies no further than that from A. Reference: Saad, "Numerical methods for large
# eigenvalue problems", 2011, chapter 6. We do not restart: it would save memory, but on causal maps, which are far from
# normal, it took more products to a larger error.


_ROUNDING = 10  # a new direction no longer than so many roundings is none


@dataclass(frozen=True)
class SpectralRadius:
    """The largest absolute eigenvalue found for each example, and the residual of its unit eigenvector."""

    values: Float[Tensor, " batch"]
    residuals: Float[Tensor, " batch"]
    products: int
    """Applications of the map that this took."""

    def within(self, tolerance: float) -> Bool[Tensor, " batch"]:
        """Where the residual is at most `tolerance` times the radius."""
        return self.residuals <= tolerance * self.values


@torch.no_grad()
def spectral_radius(
    apply: Callable[[Tensor], Tensor],
    start: Float[Tensor, "layers batch time width"],
    *,
    tolerance: float = 2e-3,
    most: int = 96,
) -> SpectralRadius:
    """The spectral radius for each example, to a residual of `tolerance` times itself or after `most` applications.

    `apply` maps states to states, linearly and each example on its own; `start` spans the Krylov space and should have
    a share in every direction. An unfinished radius is mostly too small. NaN where the map is not finite. The memory is
    that of one state per application.
    """
    layers, batch, time, width = start.shape
    size = layers * time * width
    most = min(most, size)
    w = start.movedim(1, 0).reshape(batch, size)
    basis = w.new_empty(batch, most, size)
    hessenberg = w.new_zeros(batch, most + 1, most)
    v = _unit(w, 0.0)
    for column in range(most):
        basis[:, column] = v
        w = apply(v.view(batch, layers, time, width).movedim(0, 1)).movedim(1, 0).reshape(batch, size)
        length, known = w.norm(dim=-1), basis[:, : column + 1]
        for _ in range(2):  # once more, or rounding makes the basis lose its right angles
            product = torch.einsum("bkn,bn->bk", known, w)
            hessenberg[:, : column + 1, column] += product
            w = w - torch.einsum("bkn,bk->bn", known, product)
        v = _unit(w, _ROUNDING * torch.finfo(w.dtype).eps * length)
        hessenberg[:, column + 1, column] = torch.einsum("bn,bn->b", v, w)
        products = column + 1
        if products % 8 == 0 or products == most:
            found = _largest(hessenberg[:, : products + 1, :products], products)
            if bool((found.within(tolerance) | found.values.isnan()).all()):
                break
    return found


def _unit(w: Float[Tensor, "batch size"], least: float | Float[Tensor, " batch"]) -> Float[Tensor, "batch size"]:
    """w at length 1, or 0 where it is not longer than `least`: there the Krylov space has come to its end."""
    length = w.norm(dim=-1)
    return torch.where(length > least, 1 / length, torch.where(length.isnan(), length, 0.0))[:, None] * w


def _largest(hessenberg: Float[Tensor, "batch rows columns"], products: int) -> SpectralRadius:
    """The largest Ritz value of each example, and its residual."""
    sound = hessenberg.isfinite().all(-1).all(-1)
    square = torch.where(sound[:, None, None], hessenberg[:, :-1], 0.0)
    eigenvalues, vectors = torch.linalg.eig(square)
    index = eigenvalues.abs().argmax(-1)
    each = torch.arange(len(index), device=index.device)
    values = eigenvalues.abs()[each, index]
    residuals = hessenberg[:, -1, -1].abs() * vectors[each, -1, index].abs()
    return SpectralRadius(torch.where(sound, values, torch.nan), torch.where(sound, residuals, torch.nan), products)


# The first derivatives of a dynamical system at a state.


class Linearisation:
    """The Jacobian J_G of G at a state, applied from both sides without ever being formed.

    One evaluation of G with autograd's graph serves any number of products. J_G v is the derivative of the linear map
    u ↦ J_Gᵀ u, which needs no forward-mode automatic differentiation. Of F the Jacobian is J_G − d·1, so that
    J − Jᵀ = J_G − J_Gᵀ.
    """

    def __init__(self, dynamics: Dynamics, z: Float[Tensor, "layers batch time width"]) -> None:
        self.z = z.detach().requires_grad_()
        self.probe = torch.zeros_like(z).requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only kernel that can be differentiated twice
            self.output = dynamics.drive(self.z)

    def aim(self, u: Float[Tensor, "layers batch time width"]) -> None:
        """Hold `pulled` at u from now on. The products do not depend on it."""
        assert "pulled" not in vars(self), "pulled has been computed at another vector"
        self.probe = u.detach().clone().requires_grad_()

    @cached_property
    def pulled(self) -> Float[Tensor, "layers batch time width"]:
        """J_Gᵀ u at the u that was aimed at, differentiable in the parameters."""
        return torch.autograd.grad(self.output, self.z, self.probe, create_graph=True)[0]

    def vjp(self, u: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        """J_Gᵀ u."""
        return torch.autograd.grad(self.output, self.z, u, retain_graph=True)[0]

    def jvp(self, v: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        """J_G v."""
        return torch.autograd.grad(self.pulled, self.probe, v, retain_graph=True)[0]

    def parameter_vjp(
        self, a: Float[Tensor, "layers batch time width"], parameters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """(∂G/∂θ)ᵀ a for each parameter θ: what it does to the force, each block seen on its own."""
        return torch.autograd.grad(self.output, parameters, a, retain_graph=True)


# Is the relaxation of a batch on the contractive side?


CONVERGED = 0.01
"""Residual over radius up to which a radius counts as measured."""


def diagnose(dynamics: Dynamics, start: Float[Tensor, "layers batch time width"], remedies: Sequence[str]) -> Diagnosis:
    """The residual after the free phase and the spectral radius of its step 1 + ε·J there; a warning from radius 1 on.

    With a radius of 1 or more the fixed point cannot be reached by damped steps, and what is read off the states is
    no gradient. An example whose state or Jacobian is not finite by then is measured at `start`, where the relaxation
    begins. A radius that did not converge counts with its residual. `remedies` are what the warning recommends.
    """
    with torch.no_grad():
        free = dynamics.settle()
    radius = step_radius(dynamics, free.state)
    lost = ~radius.values.isfinite()
    if bool(lost.any()):
        radius = _where(lost, step_radius(dynamics, start), radius)
    measured = {
        "free_residual": float(free.residual),
        "spectral_radius": float(radius.values.max()),
        "spectral_radius_residual": float(radius.residuals[radius.values.argmax()]),
    }
    unfinished = ~radius.within(CONVERGED)
    certain = lost | ~(radius.values < 1)
    outside = certain | (unfinished & ~(radius.values + radius.residuals < 1))
    values = {key: value for key, value in measured.items() if math.isfinite(value)}
    if not bool(outside.any()):
        return Diagnosis(values)
    worst = int(torch.where(outside, radius.values, -1.0).nan_to_num(torch.inf).argmax())
    found = _spell(float(radius.values[worst]), float(radius.residuals[worst]), bool(unfinished[worst]))
    verdict = "is not" if bool(certain.any()) else "may not be"
    away = f"the states of {int(lost.sum())} do not stay finite, so that theirs is measured at the start, z = x; "
    return Diagnosis(
        values,
        [
            f"the relaxation {verdict} contractive: the spectral radius of its step is {found}, and not safely below 1 "
            f"in {int(outside.sum())} of {len(outside)} examples; {away if bool(lost.any()) else ''}the residual after "
            f"{free.steps} steps is {float(free.residual):.2g}; likely remedies: {', '.join(remedies)}"
        ],
    )


def step_radius(dynamics: Dynamics, z: Float[Tensor, "layers batch time width"]) -> SpectralRadius:
    """The spectral radius of an Euler step 1 + ε·J at z, for each example; NaN where J is not finite."""
    linear = Linearisation(dynamics, z)
    kept = 1 - dynamics.step_size * dynamics.decay
    generator = Streams(0).generator("rule", "spectral radius")
    probe = torch.randn(z.shape[2:], generator=generator).to(z).expand_as(z)
    return spectral_radius(lambda v: kept * v + dynamics.step_size * linear.jvp(v), probe)


def _where(lost: Tensor, first: SpectralRadius, last: SpectralRadius) -> SpectralRadius:
    """The first radius of the examples that are lost, and the last of the others."""
    return SpectralRadius(
        torch.where(lost, first.values, last.values),
        torch.where(lost, first.residuals, last.residuals),
        first.products + last.products,
    )


def _spell(value: float, residual: float, unfinished: bool) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"at least about {value:.3f} (not converged, residual {residual:.2g})" if unfinished else f"{value:.3f}"


# An ordinary feed-forward network as a dynamical system: each layer's output is a state.
#
#     F_0(z) = −z_0 + embed(tokens),    F_l(z) = −z_l + block_l(z_{l−1})
#
# Its fixed point is the forward pass, reached in one sweep. The Jacobian of G is strictly lower block triangular, hence
# nilpotent: with ε = 1 a nudge at the output travels down one layer per step, and after as many steps as there are
# states the adjoint is exact. Equilibrium propagation is backpropagation there.


class FeedForward(Dynamics):
    """The layers of a feed-forward network on one batch."""

    decay = 1.0
    step_size = 1.0
    acyclic = True

    def __init__(
        self,
        embed: Callable[[], Float[Tensor, "batch time width"]],
        blocks: Sequence[nn.Module] | nn.ModuleList,
        flops: Matmuls,
    ) -> None:
        self.embed, self.blocks, self.flops = embed, list(blocks), flops
        self.nudged_steps = len(self.blocks) + 1

    def drive(self, z: Float[Tensor, "layers batch time width"]) -> Float[Tensor, "layers batch time width"]:
        driven = [block(state) for block, state in zip(self.blocks, z.unbind(0)[:-1], strict=True)]
        return torch.stack([self.embed(), *driven])

    def settle(self) -> Relaxed:
        states = [self.embed()]
        for block in self.blocks:
            states.append(block(states[-1]))
        return Relaxed(torch.stack(states), 1, states[0].new_zeros(1, len(states[0]), 1, 1))
