"""Learners: what one step is."""

from heterodox.learner.gradient import Gradient

__all__ = ["Gradient"]
