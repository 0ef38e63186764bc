"""Which examples count: one file per rating."""

from heterodox.rating.data_rater import DataRater
from heterodox.rating.perplexity import Perplexity
from heterodox.rating.random import Random
from heterodox.rating.uniform import Uniform

__all__ = ["DataRater", "Perplexity", "Random", "Uniform"]
