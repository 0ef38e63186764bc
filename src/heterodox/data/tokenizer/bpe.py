"""Byte-level byte-pair encoding, trained here on the train split alone.

Reference: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", ACL
2016; over bytes as in GPT-2 (Radford et al. 2019), so that any text can be expressed and decoding gives it
back exactly.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Literal

import tokenizers
from pydantic import Field
from tokenizers import decoders, models, pre_tokenizers, trainers

from heterodox.core import config
from heterodox.data.tokenizer.subword import Subword, chunks

log = logging.getLogger(__name__)

LONGEST_WORD = 1024
LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


class BPE:
    """Builds a `Subword` over bytes. A corpus that is too small gives fewer tokens than were asked for."""

    class Config(config.Config):
        name: Literal["bpe"] = "bpe"
        vocab_size: int = Field(default=1024, ge=256)

        def identity(self) -> str:
            return f"{self.model_dump_json()} by tokenizers {tokenizers.__version__}"

        def build(self, texts: Mapping[str, str]) -> Subword:
            return Subword(train(texts["train"], self.vocab_size))


def train(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """Merge the most frequent pairs of `text` until there are `vocab_size` tokens."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_words(text), trainer)
    return inner


def _words(text: str) -> Iterator[str]:
    """The text in pieces, without words longer than `LONGEST_WORD`: merging takes the square of a word's length."""
    told = False
    for chunk in chunks(text):
        start = 0
        for long in LONG_WORD.finditer(chunk):
            if not told:
                log.warning("words of more than %d characters are cut to train the tokenizer", LONGEST_WORD)
                told = True
            yield chunk[start : long.start()]
            for piece in range(long.start(), long.end(), LONGEST_WORD):
                yield chunk[piece : min(piece + LONGEST_WORD, long.end())]
            start = long.end()
        yield chunk[start:]
