"""How the weights move: one file per update, a folder for masks around one."""

from heterodox.update.adamw import AdamW
from heterodox.update.sgd import SGD
from heterodox.update.sparse import SET, Magnitude, RigL, Sparsae, Sparse, Static

__all__ = ["SET", "SGD", "AdamW", "Magnitude", "RigL", "Sparsae", "Sparse", "Static"]
