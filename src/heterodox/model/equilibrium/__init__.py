"""The language model whose hidden state is a fixed point."""

from heterodox.model.equilibrium.model import BlockDynamics, Equilibrium

__all__ = ["BlockDynamics", "Equilibrium"]
