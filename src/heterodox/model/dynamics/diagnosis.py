"""Is the relaxation of a batch on the contractive side?"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from heterodox.core.protocols import Diagnosis
from heterodox.core.rng import Streams
from heterodox.model.dynamics.dynamics import Dynamics
from heterodox.model.dynamics.linearisation import Linearisation
from heterodox.model.dynamics.radius import SpectralRadius, spectral_radius

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
