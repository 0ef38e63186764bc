"""Text from disk: one file, a folder of files, or JSONL."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from heterodox.core import config
from heterodox.core.errors import CorpusError
from heterodox.data.corpus.base import Corpus, Document, field_of

BYTE_ORDER_MARK = "\ufeff"


class File(Corpus):
    """UTF-8 text, taken as it is (a leading byte-order mark aside).

    A file is one document, and a folder one document for each file that matches `pattern`, at any depth. In a
    `.jsonl` file, each line is a document: the text under `field`.
    """

    class Config(config.Config):
        name: Literal["file"] = "file"
        path: Path
        pattern: str = "*.txt"
        field: str = "text"

        def build(self) -> "File":
            return File(self.path, self.pattern, self.field)

    def __init__(self, path: Path, pattern: str = "*.txt", field: str = "text") -> None:
        self.path = Path(path).expanduser()
        self.pattern = pattern
        self.field = field

    @property
    def title(self) -> str:
        return self.path.name

    def documents(self) -> Iterator[Document]:
        if not self.path.is_dir():
            yield from self._read(self.path, self.path.name)
            return
        files = sorted(path for path in self._matches() if path.is_file())
        if not files:
            raise CorpusError(
                f"no file in the folder {self.path} matches {self.pattern!r}; "
                f"it holds {_suffixes(self.path)}; set data.corpus.pattern"
            )
        for file in files:
            yield from self._read(file, file.relative_to(self.path).as_posix())

    def _matches(self) -> list[Path]:
        try:
            return list(self.path.rglob(self.pattern))
        except (ValueError, NotImplementedError) as error:
            raise CorpusError(f"data.corpus.pattern {self.pattern!r} is not a file pattern: {error}") from error

    def _read(self, path: Path, name: str) -> Iterator[Document]:
        text = read_text(path)
        if path.suffix != ".jsonl":
            yield Document(name, text)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield Document(f"{name}:{number}", self._parse(line, f"{path}, line {number},"))

    def _parse(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CorpusError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{where} holds {type(record).__name__}, expected an object like {{'text': …}}")
        return field_of(record, self.field, where)


def read_text(path: Path) -> str:
    """The file's text. Raises CorpusError if it is missing, unreadable, binary or not UTF-8."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CorpusError(f"there is no file or folder {path}; check data.path") from error
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error
    if (offset := data.find(b"\0")) >= 0:
        raise CorpusError(
            f"{path} is not text: byte {offset} is NUL; expected UTF-8 text (the corpus `hf` reads parquet)"
        )
    try:
        return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; convert it to UTF-8"
        ) from error


def _suffixes(folder: Path) -> str:
    counts = Counter(path.suffix or "(no suffix)" for path in folder.rglob("*") if path.is_file())
    return ", ".join(f"{number} × {suffix}" for suffix, number in counts.most_common(8)) or "no files"
