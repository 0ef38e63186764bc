"""Tokens that are pieces of words, by the `tokenizers` library."""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from heterodox.core.errors import CorpusError
from heterodox.data.tokenizer.base import Ids, Tokenizer, as_ids, encoded

CHUNK_CHARACTERS = 1 << 16
CHUNKS_AT_ONCE = 32
# GPT-2's word pattern makes a word of its own of a line feed between two characters that are not blank.
SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Subword(Tokenizer):
    """Whatever a `tokenizer.json` describes. It adds no special tokens, but recognises those in the text."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        description = json.loads(inner.to_str())
        self._cuttable = _words_end_at_line_feeds(description)
        self._unknown = _unknown_token(description)

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        encoded(text, "utf-8")
        groups = [np.empty(0, dtype=np.int64)]
        for chunks in self._groups(text):
            encodings = self._inner.encode_batch_fast(chunks, add_special_tokens=False)
            groups += [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]
        ids = np.concatenate(groups)
        if self._unknown is not None:
            self._refuse_unknown(ids, text, self._unknown)
        return ids

    def decode(self, ids: Ids) -> str:
        return self._inner.decode(as_ids(ids, self.vocab_size).tolist(), skip_special_tokens=False)

    def dumps(self) -> str:
        return self._inner.to_str()

    def _groups(self, text: str) -> Iterator[list[str]]:
        """Pieces of `text` to encode one by one with the same result as at once, in far less memory."""
        if not self._cuttable:
            yield [text]
            return
        pieces = list(chunks(text))
        for start in range(0, len(pieces), CHUNKS_AT_ONCE):
            yield pieces[start : start + CHUNKS_AT_ONCE]

    def _refuse_unknown(self, ids: Int[np.ndarray, " tokens"], text: str, unknown: str) -> None:
        found = int((ids == self._inner.token_to_id(unknown)).sum()) - text.count(unknown)
        if found > 0:
            raise CorpusError(
                f"the tokenizer turns {found} pieces of the text into its unknown token {unknown!r}, "
                "so losses would not compare; take one that knows these characters, or the byte tokenizer"
            )


def chunks(text: str) -> Iterator[str]:
    """Cut `text` at safe places into pieces of `CHUNK_CHARACTERS` or more."""
    start = 0
    while cut := SAFE_CUT.search(text, start + CHUNK_CHARACTERS):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _words_end_at_line_feeds(description: dict[str, Any]) -> bool:
    """Whether this is plain GPT-2-style byte-level splitting, for which `SAFE_CUT` holds."""
    splitter = description["pre_tokenizer"] or {}
    added = description["added_tokens"]
    return (
        description["normalizer"] is None
        and not any("\n" in token["content"] or token["lstrip"] or token["rstrip"] for token in added)
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space")
    )


def _unknown_token(description: dict[str, Any]) -> str | None:
    model = description["model"]
    if model.get("unk_token") is not None:
        return model["unk_token"]
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return None
