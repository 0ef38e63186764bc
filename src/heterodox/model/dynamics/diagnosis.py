"""Is the relaxation of a batch on the contractive side?"""

import torch

from heterodox.core.protocols import Diagnosis
from heterodox.core.rng import Streams
from heterodox.model.dynamics.dynamics import Dynamics
from heterodox.model.dynamics.linearisation import Linearisation
from heterodox.model.dynamics.radius import spectral_radius


def diagnose(dynamics: Dynamics) -> Diagnosis:
    """The residual after the free phase and the spectral radius of its step 1 + ε·J there; a warning from radius 1 on.

    With a radius of 1 or more the fixed point cannot be reached by damped steps, and what is read off the states is
    no gradient.
    """
    with torch.no_grad():
        free = dynamics.settle()
    linear = Linearisation(dynamics, free.state)
    kept = 1 - dynamics.step_size * dynamics.decay
    generator = Streams(0).generator("rule", "spectral radius")
    start = torch.randn(free.state.shape[2:], generator=generator).to(free.state).expand_as(free.state)
    radii = spectral_radius(lambda v: kept * v + dynamics.step_size * linear.jvp(v), start)
    values = {"free_residual": float(free.residual), "spectral_radius": float(radii.max())}
    warnings = []
    if not values["spectral_radius"] < 1:
        outside = int((~(radii < 1)).sum())
        warnings.append(
            f"the relaxation is not contractive: the spectral radius of its step is {values['spectral_radius']:.3f}, "
            f"{outside} of {len(radii)} examples at 1 or more (expected below 1), and the residual after {free.steps} "
            f"steps {values['free_residual']:.2g}; more damping, a smaller step_size or a jacobian_penalty help"
        )
    return Diagnosis(values, warnings)
