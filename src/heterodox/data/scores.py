"""Scores of examples in a parquet file, and training on the best of them.

A file has a row per example: `example_id`, its number among the windows of its split, and unless it is a mere index its
`score`, higher is better. What the numbers mean, the file's own metadata says: split, context, corpus and tokenizer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Float, Int
from pydantic import Field

from heterodox.core.config import Config
from heterodox.core.errors import CorpusError
from heterodox.data.dataset import Examples, Split

KEY = b"heterodox"


class Filtered(Config):
    """Train on the best examples of a file of scores alone."""

    scores: Path = Field(description="parquet file with example_id and score, or example_id alone")
    keep: float = Field(1.0, gt=0, le=1, description="share of its rows, the best")

    def apply(self, split: Split, corpus_sha256: str, tokenizer_sha256: str) -> Split:
        """`split` with these examples alone. Raises `CorpusError` for a file of other examples."""
        ids, scores, about = read_scores(self.scores)
        wanted = {"corpus_sha256": corpus_sha256, "tokenizer_sha256": tokenizer_sha256, "split": split.name}
        for key, value in wanted.items():
            if about.get(key) not in (None, value):
                raise CorpusError(
                    f"{self.scores} holds scores of another {key.removesuffix('_sha256')} "
                    f"({str(about[key])[:12]}, here {value[:12]}); score this one"
                )
        context = int(about["context"]) if "context" in about else None
        if scores is None and self.keep < 1:
            raise CorpusError(f"{self.scores} has no column score, so its best {self.keep:g} are unknown; keep 1")
        chosen = ids if scores is None else best(ids, scores, self.keep)
        return Split(
            split.name,
            split.tokens,
            split.num_bytes,
            Examples(np.sort(chosen), context),
            split.labels,
            split.label_window,
        )


def best(
    ids: Int[np.ndarray, " examples"], scores: Float[np.ndarray, " examples"], keep: float
) -> Int[np.ndarray, " kept"]:
    """The ids of the share `keep` with the highest scores; among equal ones the first."""
    if not 0 < keep <= 1:
        raise CorpusError(f"a share of {keep:g} cannot be kept, expected one in (0, 1]")
    size = max(1, int(len(ids) * keep + 1e-9))
    return ids[np.argsort(-scores, kind="stable")[:size]]


def write_scores(
    path: Path,
    ids: Int[np.ndarray, " examples"],
    scores: Float[np.ndarray, " examples"] | None,
    about: Mapping[str, Any],
) -> None:
    """Write the file, with `about` as its metadata. Raises `CorpusError` where that is not possible."""
    columns: dict[str, Any] = {"example_id": ids.astype(np.int64)}
    if scores is not None:
        columns["score"] = scores.astype(np.float64)
    table = pyarrow.table(columns).replace_schema_metadata({KEY: json.dumps(dict(about)).encode()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, path)
    except OSError as error:
        raise CorpusError(f"cannot write {path}: {error}") from None


def read_scores(
    path: Path,
) -> tuple[Int[np.ndarray, " examples"], Float[np.ndarray, " examples"] | None, dict[str, Any]]:
    """Ids, scores if there are any, and metadata.

    Raises `CorpusError` for a file that is missing or no parquet, without ids, or with one twice, negative or unscored.
    """
    try:
        table = pyarrow.parquet.read_table(path.expanduser())
    except FileNotFoundError:
        raise CorpusError(f"there is no file {path}; check data.filter.scores") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"{path} is not a parquet file: {' '.join(str(error).split())}") from None
    if "example_id" not in table.column_names or not pyarrow.types.is_integer(table["example_id"].type):
        raise CorpusError(f"{path} has no column example_id of whole numbers; its columns: {table.column_names}")
    ids = table["example_id"].to_numpy().astype(np.int64)
    if not len(ids):
        raise CorpusError(f"{path} holds no example")
    values, counts = np.unique(ids, return_counts=True)
    if counts.max() > 1:
        raise CorpusError(f"{path} has example_id {values[counts.argmax()]} {counts.max()} times, expected it once")
    if values[0] < 0:
        raise CorpusError(f"{path} has example_id {values[0]}, expected 0 or more")
    scores = None
    if "score" in table.column_names:
        scores = table["score"].to_numpy().astype(np.float64)
        if not np.isfinite(scores).all():
            raise CorpusError(f"{path} has no score for example_id {ids[~np.isfinite(scores)][0]}")
    about = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
    return ids, scores, about
