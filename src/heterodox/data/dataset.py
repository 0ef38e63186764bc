"""A corpus, tokenized and split."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt

from heterodox.core.errors import CorpusError
from heterodox.data.corpus.grammar import window_floor
from heterodox.data.tokenizer import Tokenizer

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
