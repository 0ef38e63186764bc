"""What a tokenizer is: text to ids and back, and a file that says it all."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer
from torch import Tensor

from heterodox.core.errors import CorpusError
from heterodox.core.files import write_atomically

FILE_NAME = "tokenizer.json"
Ids = Sequence[int] | Integer[np.ndarray, " tokens"] | Integer[Tensor, " tokens"]


class Tokenizer(ABC):
    """Ids are 0 … vocab_size − 1."""

    vocab_size: int
    exact = False
    """Whether `decode(encode(text)) == text` for every text, by construction."""

    def normalize(self, text: str) -> str:
        """Return what the tokenizer makes of `text` before it looks for tokens; by default the text itself."""
        return text

    @abstractmethod
    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Ids as int64. Raises CorpusError for text that the vocabulary cannot express."""

    @abstractmethod
    def decode(self, ids: Ids) -> str:
        """The text of `ids`, if a tensor then one on the CPU; incomplete UTF-8 becomes U+FFFD."""

    @abstractmethod
    def dumps(self) -> str:
        """The contents of `tokenizer.json`; `load_tokenizer` understands it."""

    def huggingface(self) -> str | None:
        """Return a `tokenizer.json` of the `tokenizers` library that gives the same ids; None if there is none."""
        return None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `dumps`: equal for tokenizers that work alike."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into `folder`, which is made if need be."""
        write_atomically(folder / FILE_NAME, self.dumps())


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], written: Sequence[int]) -> str:
    """Return the text that `written` adds behind `prompt`, as the two read together.

    A tokenizer may put the space between two words into the second of them, and drop it at the beginning of a text.
    """
    together, before = tokenizer.decode([*prompt, *written]), tokenizer.decode(list(prompt))
    same = next((n for n, (a, b) in enumerate(zip(together, before, strict=False)) if a != b), len(before))
    return together[same:]


def as_ids(ids: Ids, vocab_size: int) -> Int[np.ndarray, " tokens"]:
    """`ids` as an int64 array, checked to lie within the vocabulary."""
    array = np.asarray(ids, dtype=np.int64)
    assert not array.size or (array.min() >= 0 and array.max() < vocab_size), f"ids outside 0 … {vocab_size - 1}"
    return array


def encoded(text: str, encoding: str) -> bytes:
    """`text` in `encoding`. Raises CorpusError for lone surrogates, which no encoding has."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise CorpusError(f"character {error.start} is a lone surrogate ({text[error.start]!r}), not text") from error
