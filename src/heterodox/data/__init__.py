"""Corpora, tokenizers, splits and batches."""

from heterodox.data.config import DataConfig
from heterodox.data.dataset import Dataset, Split
from heterodox.data.loader import Loader, Windows, evaluation_batches, labelled_batches
from heterodox.data.tokenizers import load_tokenizer

__all__ = [
    "DataConfig",
    "Dataset",
    "Loader",
    "Split",
    "Windows",
    "evaluation_batches",
    "labelled_batches",
    "load_tokenizer",
]
