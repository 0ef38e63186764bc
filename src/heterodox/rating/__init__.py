"""Which examples count: one file per rating."""

from heterodox.rating.uniform import Uniform

__all__ = ["Uniform"]
