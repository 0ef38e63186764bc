"""Derivatives through training, and what is learned with them; each part is usable alone."""

from heterodox.meta.gradient import MetaGradient, meta_gradient
from heterodox.meta.steps import InnerAdamW, InnerSGD, InnerState

__all__ = ["InnerAdamW", "InnerSGD", "InnerState", "MetaGradient", "meta_gradient"]
