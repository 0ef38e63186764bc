"""Planting known noise in a split, and keeping the labels for evaluation alone.

The split's tokens are cut into windows as long as the model's context, so that an example is noisy or clean as a whole.
A share of the windows, drawn at random, is replaced, in equal parts by each of the kinds asked for:

    shuffled    the window's own tokens in random order                            high loss
    foreign     the window in a substitution cipher, "another language"            high loss
    repeated    one phrase of the split, over and over: boilerplate                low loss
    duplicate   a copy of one of a few windows of the split                        low loss

What is drawn depends on the corruption's own seed and on the split, never on the run's seed: all runs see one corpus.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt
from pydantic import Field, field_validator

from heterodox.core.slot import Config
from heterodox.data.dataset import Examples, Split

Kind = Literal["shuffled", "foreign", "repeated", "duplicate"]
PHRASE = 16
COPIED = 4
"""Tokens of the boilerplate phrase, and windows that duplicates are copies of."""


class Corruption(Config):
    """Noise to plant in `train`; held-out splits stay clean, but for measuring scores."""

    rate: float = Field(0.3, gt=0, lt=1, description="share of the windows that become noise")
    kinds: tuple[Kind, ...] = Field(("shuffled", "repeated"), min_length=1, description="in equal parts")
    window: int = Field(64, ge=2, description="tokens of a window; must be the model's context")
    seed: int = Field(0, ge=0, description="of what is drawn")
    keep: Literal["all", "clean"] = Field("all", description="clean: what a perfect filter would leave")

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"kinds {', '.join(kinds)} name one twice; each gets an equal part")
        return kinds

    def apply(self, split: Split, source: Split) -> Split:
        """`split` with noise in it; boilerplate and duplicates come from `source`, the train split."""
        count = (len(split.tokens) - 1) // self.window
        labels = self._labels(split.name, count)
        tokens = np.array(split.tokens)
        windows = tokens[: count * self.window].reshape(count, self.window)
        for number, kind in enumerate(self.kinds, start=1):
            chosen = np.flatnonzero(labels == number)
            windows[chosen] = self._noise(kind, windows[chosen], source, self._random(split.name, kind))
        examples = split.examples
        if self.keep == "clean":
            examples = Examples(np.flatnonzero(labels == 0), self.window)
        return replace(split, tokens=tokens, examples=examples, labels=labels, label_window=self.window)

    def _labels(self, split: str, count: int) -> Int[np.ndarray, " windows"]:
        """0 for clean, k + 1 for the kind number k."""
        labels = np.zeros(count, dtype=np.int64)
        noisy = self._random(split, "which").permutation(count)[: round(self.rate * count)]
        labels[noisy] = 1 + np.arange(len(noisy)) % len(self.kinds)
        return labels

    def _noise(
        self,
        kind: Kind,
        windows: UInt[np.ndarray, "chosen window"],
        source: Split,
        rng: np.random.Generator,
    ) -> UInt[np.ndarray, "chosen window"]:
        given, fixed = np.asarray(source.tokens), self._random("", kind)
        if kind == "shuffled":
            return rng.permuted(windows, axis=1)
        if kind == "foreign":
            used = np.unique(given)
            cipher = np.arange(int(given.max()) + 1, dtype=windows.dtype)
            cipher[used] = fixed.permutation(used)
            return cipher[np.minimum(windows, len(cipher) - 1)]
        if kind == "repeated":
            phrase = given[int(fixed.integers(max(1, len(given) - PHRASE))) :][:PHRASE]
            return np.tile(np.resize(phrase, self.window), (len(windows), 1)).astype(windows.dtype)
        whole = given[: len(given) // self.window * self.window].reshape(-1, self.window)
        copied = whole[fixed.permutation(len(whole))[:COPIED]]
        return copied[rng.integers(len(copied), size=len(windows))].astype(windows.dtype)

    def _random(self, *names: str) -> np.random.Generator:
        text = "/".join(["corruption", str(self.seed), *names])
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


@dataclass(frozen=True)
class Planted:
    """A corruption, and the clean train split that its boilerplate and its duplicates come from."""

    corruption: Corruption
    source: Split

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.corruption.kinds

    @property
    def settings(self) -> dict[str, Any]:
        return self.corruption.model_dump(mode="json", exclude={"keep"})

    def apply(self, split: Split) -> Split:
        return self.corruption.apply(split, self.source)
