"""The `data` section of a recipe."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from heterodox.core.slot import Config, part_config
from heterodox.data import parts
from heterodox.data.corpora import File, Stdlib, gather
from heterodox.data.dataset import Dataset, Split, Tokenized, cache_root, cached, divide
from heterodox.data.noise import Corruption, Planted
from heterodox.data.scores import Filtered
from heterodox.data.tokenizers import Byte, text_bytes

DEFAULT_CORPUS, DEFAULT_TOKENIZER = "stdlib", "byte"


class Splits(Config):
    """Shares of the corpus, in the order in which they are cut from it."""

    train: float = Field(default=0.85, gt=0, le=1)
    meta: float = Field(default=0.05, ge=0, le=1)
    val: float = Field(default=0.05, ge=0, le=1)
    test: float = Field(default=0.05, ge=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> "Splits":
        fractions = self.model_dump()
        total = math.fsum(fractions.values())
        if abs(total - 1) > 1e-9:
            listed = ", ".join(f"{name} {fraction:g}" for name, fraction in fractions.items())
            raise ValueError(f"the splits add up to {total:g} ({listed}), expected 1; change one of them")
        return self


class DataConfig(Config):
    """Which text, cut and tokenized how."""

    corpus: parts.CorpusConfig = Stdlib.Config()
    path: Path | None = None
    """Shorthand: read this file or folder, whatever `corpus` says. Resolved, it becomes a `file` corpus."""
    tokenizer: parts.TokenizerConfig = Byte.Config()
    splits: Splits = Splits()
    separator: str = "\n\n"
    """Put between the documents of a split."""
    corruption: Corruption | None = None
    """Noise to plant in `train`, for studies of raters."""
    filter: Filtered | None = None
    """Examples of `train` to learn from, by a file of scores."""
    cache: Path | None = None
    """Folder of token files; by default $HETERODOX_CACHE or the user's cache folder."""

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = dict(given)
        for key, name in (("corpus", DEFAULT_CORPUS), ("tokenizer", DEFAULT_TOKENIZER)):
            part = given.get(key)
            if isinstance(part, str):  # `tokenizer: char` is short for `tokenizer: {name: char}`
                given[key] = {"name": part}
            elif isinstance(part, dict) and "name" not in part:
                given[key] = {"name": name, **part}
        path = given.pop("path", None)
        if path is not None:
            given["corpus"] = _as_file(given.get("corpus", {}), path)
        return given

    @model_validator(mode="after")
    def _one_choice_of_examples(self) -> "DataConfig":
        if self.filter is not None and self.corruption is not None and self.corruption.keep == "clean":
            raise ValueError("corruption.keep clean and filter both choose the examples of train; leave one out")
        return self

    def build(self) -> Dataset:
        """Read, split and tokenize the corpus; the tokens come from the cache if they are there.

        Raises CorpusError for a corpus that is missing, empty, too short or not text.
        """
        corpus = self.corpus.build()
        gathered = gather(corpus.documents())
        fractions = self.splits.model_dump()

        def tokenize() -> Tokenized:
            pieces = divide(gathered.texts, gathered.digests, fractions)
            texts = {name: self.separator.join(parts) for name, parts in pieces.items()}
            tokenizer = self.tokenizer.build(texts)
            dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
            tokens = {name: tokenizer.encode(text) for name, text in texts.items()}
            num_bytes = {name: text_bytes(tokenizer, text, tokens[name]) for name, text in texts.items()}
            return Tokenized(tokenizer, {name: ids.astype(dtype) for name, ids in tokens.items()}, num_bytes)

        cut = {"splits": fractions, "separator": self.separator}
        identity = {"corpus": gathered.sha256, "tokenizer": self.tokenizer.identity(), **cut}
        stored = cached(cache_root(self.cache), identity, tokenize)
        splits = {name: Split(name, stored.tokens[name], stored.num_bytes[name]) for name in fractions}
        symbolwise = self.corruption is None and all(len(split.tokens) == split.num_bytes for split in splits.values())
        noise = None if self.corruption is None else Planted(self.corruption, splits["train"])
        if noise is not None:
            splits["train"] = noise.apply(splits["train"])
        dataset = Dataset(
            corpus.title,
            stored.tokenizer,
            splits,
            gathered.sha256,
            len(gathered.texts),
            corpus.entropies() if symbolwise else None,
            noise,
            cut,
        )
        if self.filter is not None:
            dataset.splits["train"] = self.filter.apply(dataset)
        return dataset


def _as_file(corpus: Any, path: Any) -> Any:
    """The `file` corpus at `path`. It inherits the keys of `corpus` that are not that other corpus' own."""
    if isinstance(corpus, File.Config):
        return {**corpus.model_dump(), "path": path}
    if not isinstance(corpus, dict):
        return {"name": "file", "path": path}
    part = parts.CORPORA.get(corpus.get("name", DEFAULT_CORPUS))
    if part is File or part is None:
        return {**corpus, "path": path}
    known = part_config(part).model_fields
    return {"name": "file", "path": path, **{key: value for key, value in corpus.items() if key not in known}}
