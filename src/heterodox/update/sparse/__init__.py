"""Sparse training: an update within masks, and the topologies that draw and change them."""

from heterodox.update.sparse.methods import SET, Magnitude, RigL, Static
from heterodox.update.sparse.sparsae import Sparsae
from heterodox.update.sparse.update import Sparse

__all__ = ["SET", "Magnitude", "RigL", "Sparsae", "Sparse", "Static"]
