"""Which examples count: one file per rating."""

from heterodox.rating.base import Perplexity, Random, Uniform
from heterodox.rating.data_rater import DataRater

__all__ = ["DataRater", "Perplexity", "Random", "Uniform"]
