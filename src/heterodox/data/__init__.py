"""Corpora, tokenizers, splits and batches."""

from heterodox.data.config import DataConfig
from heterodox.data.dataset import Dataset, Split
from heterodox.data.loader import Loader, evaluation_batches
from heterodox.data.tokenizer import load_tokenizer

__all__ = ["DataConfig", "Dataset", "Loader", "Split", "evaluation_batches", "load_tokenizer"]
