"""Text to ids and back: bytes, characters, subwords, and any `tokenizer.json`."""

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from jaxtyping import Int, Integer, UInt
from pydantic import Field
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from heterodox.core import slot as config
from heterodox.core.errors import CheckpointError, CorpusError
from heterodox.core.files import parse_json, read_text, write_atomically
from heterodox.core.slot import Slot

# What a tokenizer is: text to ids and back, and a file that says it all.


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


class Byte(Tokenizer):
    """One token per byte of UTF-8.

    256 tokens, no training; bits per byte are loss / ln 2.
    """

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


SHOWN = 10


class Char(Tokenizer):
    """One token per character (Unicode code point) that occurs in the corpus.

    Ids count the characters in code-point order.

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


# Tokens that are pieces of words, by the `tokenizers` library.


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


log = logging.getLogger(__name__)

LONGEST_WORD = 1024
LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


class BPE:
    """Byte-level byte-pair encoding, trained here on the train split alone.

    Reference: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", ACL
    2016; over bytes as in GPT-2 (Radford et al. 2019), so that any text can be expressed and decoding gives it
    back exactly.

    Builds a `Subword` over bytes. A corpus that is too small gives fewer tokens than were asked for.
    """

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


MOST_BYTES = 1 << 29

_OUTSIDE = Slot("tokenizer", object, ())
"""Tokenizers of other distributions; `parse` knows our own."""


class TokenizerFile:
    """Any `tokenizer.json`: of the `tokenizers` library, or saved by one of our own runs.

    Builds the tokenizer in `path`, taken as it is, but that sampling (BPE-dropout) is switched off.

    One that normalises text is taken, and bits per byte count the normalised text. One that loses characters is
    refused.
    """

    class Config(config.Config):
        name: Literal["file"] = "file"
        path: Path

        def identity(self) -> str:
            return hashlib.sha256(self._read().encode()).hexdigest()

        def build(self, texts: Mapping[str, str]) -> Tokenizer:
            try:
                return parse(self._read())
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise CorpusError(f"{self.path} is not a tokenizer.json: {error}") from error

        def _read(self) -> str:
            try:
                path = self.path.expanduser()
                if path.exists() and not path.is_file():
                    raise OSError("not a regular file")
                if path.exists() and path.stat().st_size > MOST_BYTES:
                    raise OSError(f"larger than the {MOST_BYTES} bytes of any tokenizer")
                return path.read_text(encoding="utf-8")
            except (OSError, ValueError, RuntimeError) as error:
                raise CorpusError(
                    f"cannot read the tokenizer {str(self.path)[:200]} ({error}); "
                    "set data.tokenizer.path to a tokenizer.json"
                ) from error


def load_tokenizer(folder: Path) -> Tokenizer:
    """What `Tokenizer.save` wrote into `folder`. Raises CheckpointError if it is missing or damaged."""
    path = folder / FILE_NAME
    try:
        return parse(read_text(path))
    except (CheckpointError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot load the tokenizer {path}: {error}") from error


def parse(text: str) -> Tokenizer:
    """The inverse of `Tokenizer.dumps`. Raises ValueError if `text` is not a tokenizer."""
    description = parse_json(text)
    match description:
        case {"heterodox": "byte"}:
            return Byte()
        case {"heterodox": "char", "characters": str(characters)} if 0 < len(characters) == len(set(characters)):
            return Char(characters)
        case {"heterodox": str(name)} if (part := _OUTSIDE.get(name)) is not None:
            if not hasattr(part, "parse"):
                raise ValueError(f"{part.__module__}:{part.__qualname__} has no function `parse` that reads it")
            return part.parse(text)
        case {"model": dict()}:
            return Subword(parse_description(text))
    raise ValueError("it describes no tokenizer that is known here")


# Whether a tokenizer keeps the text: what it drops would make bits per byte false.


PIECES, LENGTH = 32, 512
"""How many pieces of the text are tried, and their length in characters."""


def text_bytes(tokenizer: Tokenizer, text: str, ids: Ids) -> int:
    """Return how many bytes of text `ids` stand for: those of `text`, if the tokenizer gives it back.

    If it normalises the text (case, accents, white space), those of the text that it gives back. Raises CorpusError
    where it loses characters, naming the first, or encodes the same text in two ways.
    """
    if tokenizer.exact:
        return len(text.encode())
    refuse_losses(tokenizer, text)
    given = tokenizer.decode(ids)
    return len(text.encode()) if given == text else len(given.encode(errors="replace"))


def refuse_losses(tokenizer: Tokenizer, text: str) -> None:
    """Raise CorpusError if characters, or pieces of the text, do not come back from ids."""
    step = max(len(text) // PIECES, LENGTH)
    for start in range(0, len(text), step):
        piece = text[start : start + LENGTH]
        ids = tokenizer.encode(piece)
        if ids.tolist() != tokenizer.encode(piece).tolist():
            raise CorpusError("the tokenizer encodes the same text in another way each time: switch off its sampling")
    for character in sorted(set(text)):
        if character.isspace():
            continue
        given = _bare(tokenizer.decode(tokenizer.encode(character)))
        if given not in (character, _bare(tokenizer.normalize(character))) or not given:
            raise CorpusError(
                f"the tokenizer loses characters of the text: {character!r} (U+{ord(character):04X}) comes back as "
                f"{given!r}, so losses would not compare; take one that knows it, or the byte tokenizer"
            )


def _bare(text: str) -> str:
    """`text` without white space, which word tokenizers put where they like."""
    return "".join(text.split())
