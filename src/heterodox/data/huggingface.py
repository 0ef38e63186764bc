"""A Hugging Face dataset: from the hub, from a folder written by `save_to_disk`, or from parquet files."""

import itertools
import logging
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field

from heterodox.core import slot as config
from heterodox.core.errors import CorpusError, RecipeError
from heterodox.data.corpora import Corpus, Document, field_of

# Rows of parquet files, as the hub lays them out.


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


PROBE_SECONDS = 5.0


class HuggingFace(Corpus):
    """A Hugging Face dataset: from the hub, from a folder written by `save_to_disk`, or from parquet files.

    Parquet is read by pyarrow alone; the other two need the `hf` extra. The hub is asked once, briefly, whether
    it knows the dataset: without a network that takes seconds, where the library alone would retry for half a
    minute, and what an earlier run has downloaded still works.

    One document per row: the text in column `field`.
    """

    class Config(config.Config):
        name: Literal["hf"] = "hf"
        dataset: str
        config_name: str | None = None
        split: str = "train"
        field: str = "text"
        max_documents: int | None = Field(default=None, ge=1)

        def build(self) -> "HuggingFace":
            return HuggingFace(self.dataset, self.config_name, self.split, self.field, self.max_documents)

    def __init__(
        self,
        dataset: str,
        config_name: str | None = None,
        split: str = "train",
        field: str = "text",
        max_documents: int | None = None,
    ) -> None:
        self.dataset, self.config_name, self.split = dataset, config_name, split
        self.field, self.max_documents = field, max_documents

    @property
    def title(self) -> str:
        return self.dataset

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(itertools.islice(self._rows(), self.max_documents)):
            where = f"row {number} of {self.dataset}"
            yield Document(f"{self.split}:{number}", field_of(row, self.field, where))

    def _rows(self) -> Iterator[dict[str, Any]]:
        path = Path(self.dataset).expanduser()
        if path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
            self._refuse_config_name("parquet files")
            return read_parquet(path, self.split, self.field)
        if path.is_dir():
            self._refuse_config_name("a folder written by save_to_disk")
            return self._from_disk(path)
        return self._from_hub()

    def _refuse_config_name(self, kind: str) -> None:
        if self.config_name is not None:
            raise CorpusError(
                f"{self.dataset}: {kind} have no configurations; drop data.corpus.config_name={self.config_name!r}"
            )

    def _from_disk(self, path: Path) -> Iterator[dict[str, Any]]:
        datasets = import_datasets()
        try:
            with _quiet(datasets):
                found = datasets.load_from_disk(str(path))
        except Exception as error:
            raise CorpusError(
                f"{path} holds neither parquet files nor a dataset written by save_to_disk: {_line(error)}"
            ) from error
        splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
        if self.split not in splits:
            raise CorpusError(
                f"{path} has no split {self.split!r}, only {', '.join(map(repr, splits))}; set data.corpus.split"
            )
        return self._select(splits[self.split])

    def _from_hub(self) -> Iterator[dict[str, Any]]:
        datasets = import_datasets()
        offline = not self._hub_answers()
        try:
            with _quiet(datasets), _offline(datasets, offline):
                found = datasets.load_dataset(self.dataset, self.config_name, split=self.split)
        except Exception as error:
            if offline:
                raise CorpusError(
                    f"cannot reach the Hugging Face hub, and {self.dataset!r} is neither on disk nor in its "
                    "cache; connect, or name a folder written by save_to_disk or a .parquet file"
                ) from error
            raise CorpusError(f"cannot load the dataset {self.dataset!r}: {_line(error)}") from error
        return self._select(found)

    def _hub_answers(self) -> bool:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        try:
            HfApi().dataset_info(self.dataset, timeout=PROBE_SECONDS)
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise CorpusError(
                f"{self.dataset!r} is neither a folder or .parquet file here nor a dataset that you may read "
                "on the Hugging Face hub; check the name, or log in with `hf auth login`"
            ) from error
        except Exception:  # no network, a proxy, a timeout, a hub that is down: the cache may still have it
            return False
        return True

    def _select(self, rows: Any) -> Iterator[dict[str, Any]]:
        if self.field in rows.column_names:
            rows = rows.select_columns([self.field])
        return iter(rows)


def import_datasets() -> ModuleType:
    """The `datasets` package. Raises RecipeError if it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets
    except ImportError as error:
        raise RecipeError(
            f"the corpus `hf` needs the package `datasets` ({_line(error)}); pip install 'heterodox[hf]'"
        ) from error
    return datasets


@contextmanager
def _quiet(datasets: ModuleType) -> Generator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            datasets.disable_progress_bars()
            disable_progress_bars()
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars[0]:
                datasets.enable_progress_bars()
            if bars[1]:
                enable_progress_bars()


@contextmanager
def _offline(datasets: ModuleType, offline: bool) -> Generator[None]:
    """Neither library has a switch for one call: both read a constant that they set from the environment."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if offline:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
