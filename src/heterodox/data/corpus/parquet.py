"""Rows of parquet files, as the hub lays them out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heterodox.core.errors import CorpusError, RecipeError

SPLITS = frozenset({"train", "validation", "valid", "val", "dev", "test"})


def read_parquet(path: Path, split: str, field: str) -> Iterator[dict[str, Any]]:
    """Rows, with `field` alone where it exists, of a `.parquet` file or of a folder's files of that split.

    In a folder, a file belongs to the split that its name begins with (`train-00000-of-00001.parquet`) or a
    folder above it is called; files that tell none belong to `train`. Raises CorpusError if there is no such
    file or it is not parquet.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise RecipeError(f"parquet needs the package `pyarrow`, which cannot be imported: {error}") from error

    for file in _files(path, split):
        try:
            with parquet.ParquetFile(file) as source:
                names = source.schema_arrow.names
                if field not in names:
                    yield dict.fromkeys(names)
                for block in source.iter_batches(columns=[field]):
                    yield from block.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise CorpusError(f"cannot read {file} as parquet: {error}") from error


def _files(path: Path, split: str) -> list[Path]:
    if not path.exists():
        raise CorpusError(f"there is no file {path}; check data.corpus.dataset")
    if path.is_dir():
        told = {file: told_splits(file.relative_to(path)) for file in sorted(path.rglob("*.parquet"))}
    else:
        told = {path: told_splits(Path(path.name)) if split != "train" else set()}
    found = [file for file, names in told.items() if split in names or (split == "train" and not names & SPLITS)]
    if not found:
        raise CorpusError(
            f"no parquet file of split {split!r} in {path}, only {', '.join(file.name for file in told)}; "
            "set data.corpus.split"
        )
    return found


def told_splits(file: Path) -> set[str]:
    """What a file's name and its folders may be telling about its split."""
    return {file.stem.split("-")[0], *file.parts[:-1]}
