"""A recipe, a model and a batch small enough to train in a test."""

from heterodox.conformance.tiny import CORPUS, tiny_batch, tiny_gpt, tiny_recipe

__all__ = ["CORPUS", "tiny_batch", "tiny_gpt", "tiny_recipe"]
