"""A corpus, tokenized and split."""

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import platformdirs
from jaxtyping import Bool, Float, Int, UInt

from heterodox.core.errors import CheckpointError, CorpusError, HeterodoxError
from heterodox.core.files import TEMPORARY, parse_json, replacing
from heterodox.core.files import sha256 as file_sha256
from heterodox.data.grammar import window_floor
from heterodox.data.tokenizers import Tokenizer, load_tokenizer

BLOCK = 1 << 22


@dataclass(frozen=True)
class Examples:
    """Some of the examples of a split, by their numbers among its windows of `context` tokens (None: of any length)."""

    ids: Int[np.ndarray, " examples"]
    context: int | None


@dataclass(frozen=True)
class Split:
    """One of `train`, `meta`, `val`, `test`: its tokens (uint16 or uint32, memory-mapped) in order."""

    name: str
    tokens: UInt[np.ndarray, " tokens"]
    num_bytes: int
    """Bytes of the split's text in UTF-8."""
    examples: Examples | None = None
    """What is to be seen of it; None: everything."""
    labels: Int[np.ndarray, " windows"] | None = None
    """Of planted noise, for evaluation alone: 0 is clean, k + 1 the kind number k."""
    label_window: int | None = None
    """Tokens of the windows that have labels."""

    @property
    def bytes_per_token(self) -> float:
        """Nats per token / (ln 2 · this) are bits per byte; 0 if the split is empty."""
        return self.num_bytes / max(len(self.tokens), 1)


@runtime_checkable
class Noise(Protocol):
    """What plants noise in splits."""

    @property
    def kinds(self) -> tuple[str, ...]: ...

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which tokens are noise, as plain JSON data."""
        ...

    def apply(self, split: Split) -> Split: ...


class Dataset:
    """What a run trains and is measured on.

    `splits` are keyed by name, `corpus_sha256` covers the corpus' text (documents and their boundaries), and
    `entropies` are the source's exact h_0 … h_k in nats per token where they are known. `cut` says how the splits came
    to be, as plain JSON data.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        splits: Mapping[str, Split],
        corpus_sha256: str,
        num_documents: int,
        entropies: list[float] | None = None,
        noise: "Noise | None" = None,
        cut: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.splits = dict(splits)
        self.corpus_sha256 = corpus_sha256
        self.num_documents = num_documents
        self.entropies = entropies
        self.noise = noise
        self.cut = dict(cut or {})

    def identify(self, split: Split) -> dict[str, Any]:
        """All that decides which tokens `split` holds, as plain JSON data: examples are the same only if this is."""
        noise = None if self.noise is None or split.labels is None else self.noise.settings
        return {
            "corpus_sha256": self.corpus_sha256,
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "split": split.name,
            **self.cut,
            "corruption": noise,
        }

    def noisy(self, split: str) -> Split | None:
        """`split` with noise of the kind and share that `train` has, and its labels; None if `train` has none."""
        if self.noise is None:
            return None
        given = self.splits[split]
        return given if given.labels is not None else self.noise.apply(given)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the labels 1, 2, … mean."""
        return () if self.noise is None else self.noise.kinds

    def floor(self, context: int) -> float | None:
        """The least expected loss in nats per token of a model that sees at most `context` tokens, if known.

        It is the mean over the positions of a window. A finite split scatters around it: a model at the floor
        may score slightly below it.
        """
        return None if self.entropies is None else window_floor(self.entropies, context)

    def describe(self) -> dict[str, Any]:
        """Plain JSON data. `floor` is the source's entropy rate: the floor of ever longer contexts."""
        return {
            "name": self.name,
            "documents": self.num_documents,
            "bytes": sum(split.num_bytes for split in self.splits.values()),
            "tokens": {name: len(split.tokens) for name, split in self.splits.items()},
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "sha256": self.corpus_sha256,
            "floor": None if self.entropies is None else self.entropies[-1],
        }

    def unigram_loss(self, split: str) -> float:
        """Cross entropy of `split` under `train`'s add-one-smoothed token frequencies, in nats per token.

        Raises CorpusError if `split` is empty.
        """
        seen, wanted = self._counts("train") + 1.0, self._counts(split)
        if not wanted.any():
            raise CorpusError(f"the {split} split has no tokens to measure; give it a share in data.splits")
        return float(-(wanted * np.log(seen / seen.sum())).sum() / wanted.sum())

    def _counts(self, split: str) -> Float[np.ndarray, " vocab"]:
        tokens, size = self.splits[split].tokens, self.tokenizer.vocab_size
        counts = np.zeros(size)
        for start in range(0, len(tokens), BLOCK):
            counts += np.bincount(tokens[start : start + BLOCK], minlength=size)
        return counts


# Cutting a corpus into train, meta, val and test without leakage.
#
# The splits follow each other in the order of the documents (file order, if there is one document). A border is
# moved to the nearest end of a document when one is within 1 % of the corpus, and cuts through the document
# otherwise. Copies of one document are never parted: a border that falls among them moves to the end of the
# copies, however far.


SNAP = 0.01
SNAP_OF_SMALLEST = 0.25


def divide(texts: Sequence[str], digests: Sequence[bytes], fractions: Mapping[str, float]) -> dict[str, list[str]]:
    """The pieces of text in each split; a split of fraction 0 has none.

    `digests` identify the texts, and equal ones must be neighbours. Raises CorpusError if a split with a
    positive fraction would be empty.
    """
    lengths = np.array([len(text) for text in texts])
    same = np.array([a == b for a, b in pairwise(digests)], dtype=bool)
    borders = place_borders(lengths, same, list(fractions.values()))
    pieces = {}
    for (name, fraction), (start, stop) in zip(fractions.items(), pairwise(borders), strict=True):
        pieces[name] = _pieces(texts, lengths, start, stop)
        if fraction > 0 and not pieces[name]:
            raise CorpusError(
                f"the {name} split would be empty: {lengths.sum()} characters in {len(texts)} documents "
                f"({len(set(digests))} different ones) are too little for a share of {fraction:g}; "
                "take a larger corpus or change data.splits"
            )
    return pieces


def place_borders(
    lengths: Int[np.ndarray, " documents"], same: Bool[np.ndarray, " gaps"], fractions: Sequence[float]
) -> list[int]:
    """Where splits begin and end, in characters from the corpus' start: one more than there are fractions.

    `same[i]`: documents i and i + 1 are copies.
    """
    ends = lengths.cumsum()
    total = int(ends[-1])
    allowed = np.concatenate([[0], ends[:-1][~same], [total]])
    copied = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    # Half of the smallest split is left even if both its borders move towards each other.
    reach = total * min(SNAP, SNAP_OF_SMALLEST * min(fraction for fraction in fractions if fraction > 0))
    shares = np.cumsum(fractions) / np.sum(fractions)
    wanted = [0, *(round(total * float(share)) for share in shares[:-1]), total]
    borders = []
    for cut in wanted:
        nearest = int(allowed[np.abs(allowed - cut).argmin()])
        inside = min(int(np.searchsorted(ends, cut, side="right")), len(lengths) - 1)
        borders.append(nearest if abs(nearest - cut) <= reach or copied[inside] else cut)
    assert borders == sorted(borders), f"borders out of order: {borders}"
    return borders


def _pieces(texts: Sequence[str], lengths: Int[np.ndarray, " documents"], start: int, stop: int) -> list[str]:
    ends = lengths.cumsum()
    first = int(np.searchsorted(ends, start, side="right"))
    pieces = []
    for text, end in zip(texts[first:], ends[first:].tolist(), strict=True):
        begin = end - len(text)
        if begin >= stop:
            break
        pieces.append(text[max(start - begin, 0) : stop - begin])
    return [piece for piece in pieces if piece]


# Token files, kept between runs: one folder per corpus, splits and tokenizer.
#
# A folder is written under a temporary name and renamed, so that it is either whole or absent; whoever comes
# second uses what the first one wrote. Its index holds the hash of every file, and a folder that does not agree
# is made anew.


FORMAT = 2
INDEX = "index.json"
ENVIRONMENT = "HETERODOX_CACHE"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenized:
    """What a folder holds. `tokens` and `num_bytes` (of UTF-8 text) are keyed by split."""

    tokenizer: Tokenizer
    tokens: dict[str, UInt[np.ndarray, " tokens"]]
    num_bytes: dict[str, int]


def cache_root(chosen: Path | None) -> Path:
    """`chosen`, else $HETERODOX_CACHE, else the user's cache folder."""
    if chosen is not None:
        return chosen.expanduser()
    if os.environ.get(ENVIRONMENT):
        return Path(os.environ[ENVIRONMENT]).expanduser()
    return platformdirs.user_cache_path("heterodox")


def cached(root: Path, identity: dict[str, Any], build: Callable[[], Tokenized]) -> Tokenized:
    """What `build` returns, from `root` if it is there already. `identity` is JSON data that determines it.

    Where `root` cannot be written, a folder that lasts as long as this process stands in. Raises CorpusError if that
    one cannot be written either.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    found = read(root / key)
    if found is not None:
        return found
    built = build()
    try:
        return write(root / key, built)
    except OSError as error:
        log.warning("cannot write the token cache %s (%s); using a temporary folder", root, error)
    temporary = Path(tempfile.mkdtemp(prefix="heterodox-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    try:
        return write(temporary / key, built)
    except OSError as error:
        raise CorpusError(f"cannot write tokens to {root} or {temporary} ({error}); free some space") from error


def read(folder: Path) -> Tokenized | None:
    """The folder's contents with memory-mapped tokens, or None if it is missing or damaged."""
    try:
        index = parse_json((folder / INDEX).read_text(encoding="utf-8"))
        for name, sha256 in index["files"].items():
            if file_sha256(folder / name) != sha256:
                raise ValueError(f"{name} is damaged")
        tokens = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in index["num_bytes"]}
        return Tokenized(load_tokenizer(folder), tokens, index["num_bytes"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, HeterodoxError) as error:
        log.warning("the token cache %s cannot be used (%s); making it anew", folder, error)
        return None


def write(folder: Path, contents: Tokenized) -> Tokenized:
    """Put `contents` into `folder` and read it back. Raises OSError if that is impossible."""
    for _ in range(3):
        try:
            with replacing(folder, folder=True) as temporary:
                _fill(temporary, contents)
        except CheckpointError as error:
            if not folder.exists():  # else another process has been faster
                raise OSError(str(error)) from None
        found = read(folder)
        if found is not None:
            return found
        damaged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{TEMPORARY}")
        folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    raise OSError(f"other processes keep damaging {folder}")


def _fill(folder: Path, contents: Tokenized) -> None:
    for split, tokens in contents.tokens.items():
        np.save(folder / f"{split}.npy", tokens)
    contents.tokenizer.save(folder)
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    index = {"files": files, "num_bytes": contents.num_bytes}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
