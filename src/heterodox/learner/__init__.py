"""Learners: what one step is."""

from heterodox.learner.rater import DataRater
from heterodox.learner.step import Gradient

__all__ = ["DataRater", "Gradient"]
