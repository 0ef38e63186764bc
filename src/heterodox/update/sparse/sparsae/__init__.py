"""Sparsae: an evolution strategy over masks."""

from heterodox.update.sparse.sparsae.search import Sparsae

__all__ = ["Sparsae"]
