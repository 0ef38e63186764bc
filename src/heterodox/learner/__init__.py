"""Learners: what one step is."""

from heterodox.learner.data_rater import DataRater
from heterodox.learner.gradient import Gradient

__all__ = ["DataRater", "Gradient"]
