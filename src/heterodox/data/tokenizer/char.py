"""One token per character (Unicode code point) that occurs in the corpus."""

import json
from collections.abc import Mapping
from typing import Literal

import numpy as np
import tokenizers
from jaxtyping import Int, UInt
from tokenizers import decoders, models, pre_tokenizers

from heterodox.core import config
from heterodox.core.errors import CorpusError
from heterodox.data.tokenizer.base import Ids, Tokenizer, as_ids, encoded

SHOWN = 10


class Char(Tokenizer):
    """Ids count the characters in code-point order.

    The inventory is that of the whole corpus, held-out splits included, as is the custom of character-level
    work: which characters exist is known beforehand, how often they occur is not.
    """

    class Config(config.Config):
        name: Literal["char"] = "char"

        def identity(self) -> str:
            return self.model_dump_json()

        def build(self, texts: Mapping[str, str]) -> "Char":
            return Char("".join(sorted(set().union(*texts.values()))))

    exact = True

    def __init__(self, characters: str) -> None:
        """`characters`: the inventory, each once, in order of its ids."""
        if len(set(characters)) != len(characters):
            twice = next(character for character in characters if characters.count(character) > 1)
            raise ValueError(f"the character {twice!r} is there twice")
        assert characters, "an inventory holds a character"
        self.characters = characters
        self.vocab_size = len(characters)
        self._points = _code_points(characters)
        self._ids = np.full(int(self._points.max()) + 2, -1, dtype=np.int64)
        self._ids[self._points] = np.arange(self.vocab_size)

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if (ids < 0).any():
            unknown = sorted(set(text) - set(self.characters))
            listed = ", ".join(map(repr, unknown[:SHOWN])) + (", …" if len(unknown) > SHOWN else "")
            raise CorpusError(
                f"{len(unknown)} characters of the text are not in the vocabulary of {self.vocab_size}: "
                f"{listed}; remove them, or train with the byte tokenizer"
            )
        return ids

    def decode(self, ids: Ids) -> str:
        return self._points[as_ids(ids, self.vocab_size)].tobytes().decode("utf-32-le")

    def dumps(self) -> str:
        return json.dumps({"heterodox": "char", "characters": self.characters})

    def huggingface(self) -> str:
        unknown = "\ufffd\ufffd"  # no token: a character that is not there is an error, as here
        vocab = {character: number for number, character in enumerate(self.characters)}
        inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=unknown))
        inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
        return inner.to_str()


def _code_points(text: str) -> UInt[np.ndarray, " characters"]:
    return np.frombuffer(encoded(text, "utf-32-le"), dtype="<u4")
