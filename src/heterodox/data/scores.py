"""Scores of examples in a parquet file, and training on the best of them.

A file has a row per example: `example_id`, its number among the windows of its split, and unless it is a mere index its
`score`, higher is better. What the numbers mean, the file's own metadata says: all that makes the examples, which is
corpus, tokenizer, split and how it was cut, planted noise, and context. What it does not say is not checked.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Float, Int, Shaped
from pydantic import Field

from heterodox.core.errors import CheckpointError, CorpusError
from heterodox.core.files import exists, parse_json, reading, replacing
from heterodox.core.slot import Config
from heterodox.data.dataset import Dataset, Examples, Split

KEY = b"heterodox"


class Filtered(Config):
    """Train on the best examples of a file of scores alone."""

    scores: Path = Field(description="parquet file with example_id and score, or example_id alone")
    keep: float = Field(1.0, gt=0, le=1, description="share of its rows, the best")

    def apply(self, dataset: Dataset) -> Split:
        """`train` with these examples alone. Raises `CorpusError` for a file of other examples."""
        split = dataset.splits["train"]
        ids, scores, about = read_scores(self.scores)
        for key, here in dataset.identify(split).items():
            if key in about and about[key] != here:
                raise CorpusError(
                    f"{self.scores} holds scores of another {_difference(key, about[key], here)}; score this one"
                )
        if scores is None and self.keep < 1:
            raise CorpusError(f"{self.scores} has no column score, so its best {self.keep:g} are unknown; keep 1")
        chosen = ids if scores is None else best(ids, scores, self.keep)
        return replace(split, examples=Examples(np.sort(chosen), about.get("context")))


def _difference(key: str, found: Any, here: Any) -> str:
    """`corruption.seed (0, here 1)`: the first thing in which two settings differ."""
    if isinstance(found, dict) and isinstance(here, dict):
        name = next(name for name in (*here, *found) if found.get(name) != here.get(name))
        return _difference(f"{key}.{name}", found.get(name), here.get(name))
    name = key.removesuffix("_sha256")
    if name != key:
        found, here = str(found)[:12], str(here)[:12]
    said = [value if isinstance(value, str) and name != "separator" else json.dumps(value) for value in (found, here)]
    return f"{name} ({said[0]}, here {said[1]})".replace("null", "none")


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
    require_scores(path)
    try:
        with replacing(path) as temporary:
            pyarrow.parquet.write_table(table, temporary)
    except CheckpointError as error:
        raise CorpusError(str(error)) from None


def require_scores(path: Path) -> None:
    """Raise `CheckpointError` where writing to `path` would replace what is no file of scores."""
    if not exists(path):
        return
    try:
        with reading(path):
            ours = KEY in (pyarrow.parquet.read_schema(path).metadata or {})
    except (CheckpointError, pyarrow.ArrowException):
        ours = False
    if not ours:
        raise CheckpointError(f"{path} is there already and holds no scores of heterodox; pass another --out")


def read_scores(
    path: Path,
) -> tuple[Int[np.ndarray, " examples"], Float[np.ndarray, " examples"] | None, dict[str, Any]]:
    """Ids, scores if there are any, and metadata.

    Raises `CorpusError` for a file that is missing or no parquet, without ids, or with one twice, negative or unscored,
    and for columns or metadata of another kind.
    """
    try:
        table = pyarrow.parquet.ParquetFile(path.expanduser()).read()
    except FileNotFoundError:
        raise CorpusError(f"there is no file {path}; check data.filter.scores") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusError(f"{path} is not a parquet file: {' '.join(str(error).split())}") from None
    ids = _column(path, table, "example_id", pyarrow.types.is_integer, "whole numbers").astype(np.int64)
    if not len(ids):
        raise CorpusError(f"{path} holds no example")
    values, counts = np.unique(ids, return_counts=True)
    if counts.max() > 1:
        raise CorpusError(f"{path} has example_id {values[counts.argmax()]} {counts.max()} times, expected it once")
    if values[0] < 0:
        raise CorpusError(f"{path} has example_id {values[0]}, expected 0 or more")
    scores = None
    if "score" in table.column_names:
        scores = _column(path, table, "score", _is_number, "numbers").astype(np.float64)
        if not np.isfinite(scores).all():
            raise CorpusError(f"{path} has no score for example_id {ids[~np.isfinite(scores)][0]}")
    return ids, scores, _metadata(path, table)


def _is_number(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)


def _column(
    path: Path, table: pyarrow.Table, name: str, fits: Callable[[pyarrow.DataType], bool], what: str
) -> Shaped[np.ndarray, " examples"]:
    """A column without gaps."""
    if table.column_names.count(name) != 1:
        raise CorpusError(
            f"{path} has {table.column_names.count(name)} columns {name}, expected one; its columns: "
            f"{', '.join(table.column_names) or 'none'}"
        )
    column = table[name]
    if not fits(column.type):
        raise CorpusError(f"{path} has a column {name} of {column.type}, expected {what}")
    if column.null_count:
        raise CorpusError(f"{path} has {column.null_count} rows without {name}, expected {what} in all of them")
    return column.to_numpy()


def _metadata(path: Path, table: pyarrow.Table) -> dict[str, Any]:
    text = (table.schema.metadata or {}).get(KEY, b"{}")
    try:
        about = parse_json(text)
    except ValueError:
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("context", 1), int):
        raise CorpusError(f"{path} says in its metadata {text[:60]!r}, which no score file of ours does; score again")
    return about
