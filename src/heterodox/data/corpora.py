"""Where text comes from: documents, files on disk, and the standard library's sources."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import sysconfig
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import Field

from heterodox.core import slot as config
from heterodox.core.errors import CorpusError

# What a corpus is: documents of text, in a stable order.


@dataclass(frozen=True)
class Document:
    """A text with boundaries. `id` says where it came from and is unique within its corpus."""

    id: str
    text: str


class Corpus(ABC):
    """A source of documents."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, the same ones in the same order on every call.

        Raises CorpusError if the source is missing or is not text.
        """

    @property
    @abstractmethod
    def title(self) -> str:
        """What reports call this corpus."""

    def entropies(self) -> list[float] | None:
        """h_j = H(X_j | X_0 … X_{j−1}) in nats per character for j = 0 … order, where known exactly."""
        return None


def field_of(record: Mapping[str, Any], field: str, where: str) -> str:
    """The text under `field`; null counts as empty. Raises CorpusError, naming `where`, if there is none."""
    if field not in record:
        raise CorpusError(f"{where} has no field {field!r}, only {_listed(record)}; set data.corpus.field")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise CorpusError(f"{where}: field {field!r} holds {type(text).__name__}, expected text")
    return text


def _listed(record: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in record) or "nothing"


# A corpus, gathered: its documents in the order in which they are split.


@dataclass(frozen=True)
class Gathered:
    """Documents in the order of their hash, which is as good as random and brings copies together.

    `sha256` covers texts and boundaries, not the documents' ids: a corpus moved to another folder is the same
    corpus. With a single document it is that text's own SHA-256.
    """

    texts: list[str]
    digests: list[bytes]

    @property
    def sha256(self) -> str:
        if len(self.digests) == 1:
            return self.digests[0].hex()
        return hashlib.sha256(b"".join(self.digests)).hexdigest()


def gather(documents: Iterable[Document]) -> Gathered:
    """Read all documents; those that are blank are dropped. Raises CorpusError if nothing is left."""
    found = []
    blank = 0
    for document in documents:
        if document.text.isspace() or not document.text:
            blank += 1
        else:
            found.append((_digest(document), document.text))
    if not found:
        raise CorpusError(
            f"the corpus holds no text: {blank} document{'s' * (blank != 1)}, each of them empty "
            "or white space; check data.corpus"
        )
    found.sort(key=lambda pair: pair[0])
    return Gathered([text for _, text in found], [digest for digest, _ in found])


def _digest(document: Document) -> bytes:
    try:
        return hashlib.sha256(document.text.encode()).digest()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{document.id}: character {error.start} is a lone surrogate, which is not text; remove it"
        ) from error


BYTE_ORDER_MARK = "\ufeff"
MOST_BYTES = 16 << 30
"""The largest text, in bytes once it is unpacked, that is read into memory."""

Format = Literal["text", "jsonl", "json", "csv", "tsv"]
RECORDS: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".tab": "tsv",
}  # fmt: skip
"""Formats of lists of records, by suffix; any other suffix means plain text."""

FOREIGN_SUFFIXES = {
    ".parquet": "parquet", ".arrow": "Arrow", ".feather": "Arrow", ".pdf": "PDF", ".docx": "Word", ".doc": "Word",
    ".odt": "OpenDocument", ".epub": "EPUB", ".xlsx": "Excel", ".xls": "Excel", ".zip": "zip", ".tar": "tar",
    ".tgz": "tar", ".7z": "7-Zip", ".rar": "RAR", ".lz4": "LZ4", ".br": "Brotli", ".npy": "NumPy", ".npz": "NumPy",
    ".pt": "PyTorch", ".safetensors": "safetensors", ".sqlite": "SQLite", ".db": "SQLite", ".bin": "binary",
}  # fmt: skip
"""Formats that are not text, by suffix."""
FOREIGN_MAGIC = {
    b"PAR1": "parquet", b"ARROW1": "Arrow", b"%PDF-": "PDF", b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
    b"\x93NUMPY": "NumPy", b"SQLite format 3": "SQLite", b"\x04\x22\x4d\x18": "LZ4", b"\x7fELF": "program",
    b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF",
}  # fmt: skip
"""Formats that are not text, by their first bytes."""
REMEDIES = {
    "parquet": "read it with data.corpus.name=hf data.corpus.dataset=FILE",
    "Arrow": "read it with data.corpus.name=hf, or write it as parquet",
}


MAGIC_OF_COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""The first bytes of a compressed file, by suffix."""


def _opened(path: Path, suffix: str) -> Any:
    """Open a compressed file as a context that gives something to `read`."""
    if suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix](path)


UNICODE_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
LOOKED_AT = 20
"""Lines of a plain text that are looked at for whether they are records."""


class File(Corpus):
    """Text from disk: one file, a folder of files, or a list of records (JSON lines, a JSON array, CSV, TSV).

    What a file holds is told by its name and by its first bytes; a file that is something else than its name says, or
    that no reader here knows, is refused by the name of its format. Compressed files (gzip, bzip2, xz, zstandard) are
    read as what they hold.

    Text on disk: a file, a folder of files, or the records of JSON lines, a JSON array, CSV or TSV.

    Text is UTF-8, or UTF-16 and UTF-32 with a byte-order mark, and is taken as it is. A file is one document; a folder
    is one document for each file that matches `pattern`, at any depth. In a list of records each record is a document:
    the text under `field` (a key, or a column). Compressed files (.gz, .bz2, .xz, .zst) are read as what they hold.
    """

    class Config(config.Config):
        name: Literal["file"] = "file"
        path: Path
        pattern: str = "*.txt"
        field: str = "text"
        format: Literal["auto", "text", "jsonl", "json", "csv", "tsv"] = "auto"

        def build(self) -> "File":
            return File(self.path, self.pattern, self.field, self.format)

    def __init__(self, path: Path, pattern: str = "*.txt", field: str = "text", format: str = "auto") -> None:
        self.path = expanded(Path(path))
        self.pattern = pattern
        self.field = field
        self.format = format

    @property
    def title(self) -> str:
        return self.path.name

    def documents(self) -> Iterator[Document]:
        if not is_folder(self.path):
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
        except OSError as error:
            raise CorpusError(f"cannot read the folder {self.path}: {error.strerror}") from error

    def _read(self, path: Path, name: str) -> Iterator[Document]:
        text, inner = read_file(path)
        given = None if self.format == "auto" else self.format
        form = given or RECORDS.get(inner.suffix.lower(), "text")
        if form == "text" and given is None and _looks_like_records(text):
            raise CorpusError(
                f"{path} holds a JSON object in each line: set data.corpus.format=jsonl to read the field "
                f"{self.field!r} of each, or data.corpus.format=text to train on the JSON itself"
            )
        if form == "text":
            yield Document(name, text)
            return
        for number, record in _records(text, form, path):
            where = f"{path}, {'line' if form == 'jsonl' else 'record'} {number},"
            yield Document(f"{name}:{number}", field_of(record, self.field, where))


def _records(text: str, form: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of `text` with their numbers, from 1; of JSON lines, the numbers of their lines."""
    if form == "jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, _record(_parse(line, f"{path}, line {number},"), f"{path}, line {number},")
    elif form == "json":
        found = _parse(text, str(path))
        if not isinstance(found, list):
            raise CorpusError(
                f"{path} holds one JSON {type(found).__name__}, expected an array of objects like [{{'text': …}}, …]; "
                "JSON lines are called .jsonl"
            )
        for number, record in enumerate(found, start=1):
            yield number, _record(record, f"{path}, record {number},")
    else:
        yield from _rows(text, "," if form == "csv" else "\t", path)


def _rows(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    before = csv.field_size_limit(1 << 30)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise CorpusError(
                    f"{path}, record {number}, has another number of columns than the header, which names "
                    f"{len(reader.fieldnames or ())}; quote what holds a {'comma' if delimiter == ',' else 'tab'}"
                )
            yield number, row
    except csv.Error as error:
        raise CorpusError(f"{path} is not {'CSV' if delimiter == ',' else 'TSV'}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: an integer of thousands of digits, too
        raise CorpusError(f"{where} is not JSON: {_short(error)}") from error


def _record(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise CorpusError(f"{where} holds {type(record).__name__}, expected an object like {{'text': …}}")
    return record


def _looks_like_records(text: str) -> bool:
    """Whether the first lines, of at least two, are all JSON objects."""
    lines = [line for line in text[: 1 << 20].split("\n")[: LOOKED_AT + 1] if line.strip()][:LOOKED_AT]
    if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
        return False
    try:
        return all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def expanded(path: Path) -> Path:
    """`path` with a leading `~` replaced. Raises CorpusError for a user whom this machine does not know."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise CorpusError(f"{path}: there is no such user on this machine") from error


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise CorpusError(f"cannot read {str(path)[:80]}: {_short(error)}") from error


def read_text(path: Path) -> str:
    """Return the text of a file; see `read_file`."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[str, PurePath]:
    """The text of a file, unpacked if it is compressed, and its name without the suffix of the compression.

    Raises CorpusError if it is missing, unreadable, no regular file, too large, of a format that is not text, or in an
    encoding that does not say what it is.
    """
    inner = PurePath(path.name)
    data = _bytes(path)
    for suffix, magic in MAGIC_OF_COMPRESSED.items():
        if data.startswith(magic):
            data = _unpacked(path, suffix)
            inner = inner.with_suffix("") if inner.suffix.lower() == suffix else inner
            break
        if inner.suffix.lower() == suffix:
            raise CorpusError(f"{path} is called {suffix}, but is not compressed like that; rename or repack it")
    _refuse_foreign(path, inner, data)
    for mark, encoding in UNICODE_MARKS.items():
        if data.startswith(mark):
            try:
                return data.decode(encoding), inner
            except UnicodeDecodeError as error:
                raise CorpusError(f"{path} begins as {encoding} and is not: {error.reason}") from error
    if (offset := data.find(b"\0")) >= 0:
        raise CorpusError(f"{path} is not text: byte {offset} is NUL; expected UTF-8, or UTF-16 with a byte-order mark")
    try:
        return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK), inner
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; convert it to UTF-8"
        ) from error


def _refuse_foreign(path: Path, inner: PurePath, data: bytes) -> None:
    found = next((name for magic, name in FOREIGN_MAGIC.items() if data.startswith(magic)), None)
    found = found or FOREIGN_SUFFIXES.get(inner.suffix.lower())
    if found:
        remedy = REMEDIES.get(found, "unpack or convert it to text first")
        raise CorpusError(f"{path} is a {found} file, not text; {remedy}")


def _bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CorpusError(f"{path} is not a regular file; write its contents into a file first")
        if status.st_size > MOST_BYTES:
            raise CorpusError(
                f"{path} has {status.st_size} bytes, more than the {MOST_BYTES} that fit; take a part of it"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CorpusError(f"there is no file or folder {path}; check data.path") from error
    except OSError as error:
        raise CorpusError(f"cannot read {str(path)[:200]}: {error.strerror}") from error
    except ValueError as error:
        raise CorpusError(f"cannot read {str(path)[:200]!r}: {error}") from error


def _unpacked(path: Path, suffix: str) -> bytes:
    try:
        with _opened(path, suffix) as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise CorpusError(f"cannot unpack {path}: {_short(error)}") from error
    if len(data) > MOST_BYTES:
        raise CorpusError(f"{path} unpacks to more than the {MOST_BYTES} bytes that fit; take a part of it")
    return data


def _short(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _suffixes(folder: Path) -> str:
    counts = Counter(path.suffix or "(no suffix)" for path in folder.rglob("*") if path.is_file())
    return ", ".join(f"{number} × {suffix}" for suffix, number in counts.most_common(8)) or "no files"


EXCLUDED_FOLDERS = frozenset(
    (
        *("__pycache__", "site-packages", "dist-packages", "ensurepip", "lib2to3"),
        *("encodings", "pydoc_data", "idlelib", "turtledemo", "test", "tests"),
    )
)
EXCLUDED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


class Stdlib(Corpus):
    """The embedded corpus: the running Python's own standard-library sources. On every machine, no download.

    Left out: tests, vendored and machine-generated files, and folders of near-copies (`encodings` is a hundred
    tables of one form, which would sit on both sides of a split). What remains is about 9 MB. Its files are
    walked in the order of the hash of their path, and each that still fits into `max_bytes` is taken: a spread
    over the whole library that does not change from run to run. Another Python version is another corpus;
    `corpus_sha256` tells them apart.

    Python sources, one document per file; line ends are `\n` on every system.
    """

    class Config(config.Config):
        name: Literal["stdlib"] = "stdlib"
        max_bytes: int = Field(default=4_000_000, ge=1)

        def build(self) -> "Stdlib":
            return Stdlib(self.max_bytes)

    def __init__(self, max_bytes: int = 4_000_000, root: Path | None = None) -> None:
        self.max_bytes = max_bytes
        self.root = root or Path(sysconfig.get_path("stdlib"))

    @property
    def title(self) -> str:
        return "stdlib"

    def documents(self) -> Iterator[Document]:
        paths = self._chosen()
        if not paths:
            raise CorpusError(
                f"found no Python source of at most {self.max_bytes} bytes in {self.root}; raise "
                "data.corpus.max_bytes, or set data.path to a text of your own"
            )
        for path in sorted(paths):
            yield Document(path, read_text(self.root / path).replace("\r\n", "\n"))

    def _chosen(self) -> list[str]:
        chosen, free = [], self.max_bytes
        for path in sorted(self._eligible(), key=lambda path: hashlib.sha256(path.encode()).digest()):
            size = (self.root / path).stat().st_size
            if 0 < size <= free:
                chosen.append(path)
                free -= size
        return chosen

    def _eligible(self) -> Iterator[str]:
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]
            for name in files:
                if name.endswith(".py") and not name.startswith(EXCLUDED_FILES):
                    yield (Path(folder) / name).relative_to(self.root).as_posix()
