"""Sparse training: an update within masks, and the topologies that draw and change them."""

from heterodox.update.sparse.magnitude import Magnitude
from heterodox.update.sparse.rigl import RigL
from heterodox.update.sparse.set import SET
from heterodox.update.sparse.sparsae import Sparsae
from heterodox.update.sparse.static import Static
from heterodox.update.sparse.update import Sparse

__all__ = ["SET", "Magnitude", "RigL", "Sparsae", "Sparse", "Static"]
