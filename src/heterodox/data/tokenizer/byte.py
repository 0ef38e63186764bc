"""One token per byte of UTF-8."""

import json
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Int

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

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        return np.frombuffer(encoded(text, "utf-8"), np.uint8).astype(np.int64)

    def decode(self, ids: Ids) -> str:
        return as_ids(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def dumps(self) -> str:
        return json.dumps({"heterodox": "byte"})
