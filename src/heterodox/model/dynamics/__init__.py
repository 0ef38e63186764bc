"""Networks as dynamical systems: what moves the state, how it comes to rest, how it answers to a push."""

from heterodox.model.dynamics.diagnosis import diagnose
from heterodox.model.dynamics.dynamics import Dynamical, Dynamics, Matmuls
from heterodox.model.dynamics.feedforward import FeedForward
from heterodox.model.dynamics.linearisation import Linearisation
from heterodox.model.dynamics.radius import SpectralRadius, spectral_radius
from heterodox.model.dynamics.solver import Relaxed, Solver, all_before, per_example, per_position, relax, some_steps

__all__ = [
    "Dynamical",
    "Dynamics",
    "FeedForward",
    "Linearisation",
    "Matmuls",
    "Relaxed",
    "Solver",
    "SpectralRadius",
    "all_before",
    "diagnose",
    "per_example",
    "per_position",
    "relax",
    "some_steps",
    "spectral_radius",
]
