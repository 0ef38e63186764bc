"""How the weights move: one file per update."""

from heterodox.update.adamw import AdamW
from heterodox.update.sgd import SGD

__all__ = ["SGD", "AdamW"]
