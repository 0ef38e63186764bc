"""One token per byte of UTF-8."""

import json
from collections.abc import Mapping
from typing import Literal

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers

from heterodox.core import config
from heterodox.data.tokenizer.base import Ids, Tokenizer, as_ids, encoded


class Byte(Tokenizer):
    """256 tokens, no training; bits per byte are loss / ln 2."""

    class Config(config.Config):
        name: Literal["byte"] = "byte"

        def identity(self) -> str:
            return self.model_dump_json()

        def build(self, texts: Mapping[str, str]) -> "Byte":
            return Byte()

    vocab_size = 256
    exact = True

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        return np.frombuffer(encoded(text, "utf-8"), np.uint8).astype(np.int64)

    def decode(self, ids: Ids) -> str:
        return as_ids(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def dumps(self) -> str:
        return json.dumps({"heterodox": "byte"})

    def huggingface(self) -> str:
        letters = bytes_to_letters()
        inner = tokenizers.Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        return inner.to_str()


def bytes_to_letters() -> dict[int, str]:
    """Return the letter that stands for each byte in byte-level vocabularies (Radford et al., 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(others)}
