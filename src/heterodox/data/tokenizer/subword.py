"""Tokens that are pieces of words, by the `tokenizers` library."""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from heterodox.core.errors import CorpusError
from heterodox.data.tokenizer.base import Ids, Tokenizer, as_ids, encoded

log = logging.getLogger(__name__)

CHUNK_CHARACTERS = 1 << 16
CHUNKS_AT_ONCE = 32
# GPT-2's word pattern makes a word of its own of a line feed between two characters that are not blank.
SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")
# A single space between two characters that are not blank begins a word: a cut before it is as safe.
SAFE_SPACE = re.compile(r"(?<=\S)(?= \S)")
LONGEST_CHUNK = 1 << 20
"""Characters after which a text without any safe place is cut all the same."""
MOST_IDS_PER_TOKEN = 100
"""Ids beyond so many times the number of tokens are taken for a damaged file."""


class Subword(Tokenizer):
    """Whatever a `tokenizer.json` describes. It adds no special tokens, but recognises those in the text."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        if getattr(inner.model, "dropout", None):  # BPE-dropout would encode the same text in another way each time
            inner.model.dropout = None
        self._inner = inner
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        description = json.loads(inner.to_str())
        self._cuttable = _words_end_at_line_feeds(description)
        self._unknown = _unknown_token(description)

    def normalize(self, text: str) -> str:
        normalizer = self._inner.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

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

    def huggingface(self) -> str:
        description = json.loads(self._inner.to_str())
        description["post_processor"] = None  # `encode` adds no special tokens
        return json.dumps(description, ensure_ascii=False)

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
    """Cut `text` into pieces of `CHUNK_CHARACTERS` or more, between two words as long as there are any."""
    start = 0
    while start + CHUNK_CHARACTERS < len(text):
        first, last = start + CHUNK_CHARACTERS, start + LONGEST_CHUNK
        if (cut := SAFE_CUT.search(text, first, last + 1)) or (cut := SAFE_SPACE.search(text, first, last + 1)):
            stop = cut.end()
        elif last < len(text):
            stop = last
            log.warning("a run of %d characters without white space is cut into pieces to encode it", LONGEST_CHUNK)
        else:
            break
        yield text[start:stop]
        start = stop
    yield text[start:]


def parse_description(text: str) -> tokenizers.Tokenizer:
    """Return the tokenizer that a `tokenizer.json` of the `tokenizers` library describes.

    Raises ValueError where it is damaged: two tokens with one id, an id out of all proportion, or what the library
    itself does not take.
    """
    description = json.loads(text)
    ids = _ids_by_token(description)
    by_id: dict[int, str] = {}
    for token, number in ids:
        if by_id.setdefault(number, token) != token:
            raise ValueError(f"the tokens {by_id[number]!r} and {token!r} have the same id {number}")
        if number < 0 or number > MOST_IDS_PER_TOKEN * len(ids) + 1000:
            raise ValueError(f"the token {token!r} has the id {number}, and there are {len(ids)} tokens")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(str(error)) from error


def _ids_by_token(description: dict[str, Any]) -> list[tuple[str, int]]:
    """Return all tokens with their ids, those of the model first."""
    vocab = description["model"].get("vocab", {})
    found = list(vocab.items()) if isinstance(vocab, dict) else [(pair[0], number) for number, pair in enumerate(vocab)]
    found += [(token["content"], token["id"]) for token in description.get("added_tokens") or []]
    if not all(isinstance(token, str) and isinstance(number, int) for token, number in found):
        raise ValueError("its vocabulary does not give each token a number")
    return found


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
