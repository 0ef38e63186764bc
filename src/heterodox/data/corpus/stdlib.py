"""The embedded corpus: the running Python's own standard-library sources. On every machine, no download.

Left out: tests, vendored and machine-generated files, and folders of near-copies (`encodings` is a hundred
tables of one form, which would sit on both sides of a split). What remains is about 9 MB. Its files are
walked in the order of the hash of their path, and each that still fits into `max_bytes` is taken: a spread
over the whole library that does not change from run to run. Another Python version is another corpus;
`corpus_sha256` tells them apart.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from heterodox.core import config
from heterodox.core.errors import CorpusError
from heterodox.data.corpus.base import Corpus, Document
from heterodox.data.corpus.file import read_text

EXCLUDED_FOLDERS = frozenset(
    (
        *("__pycache__", "site-packages", "dist-packages", "ensurepip", "lib2to3"),
        *("encodings", "pydoc_data", "idlelib", "turtledemo", "test", "tests"),
    )
)
EXCLUDED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


class Stdlib(Corpus):
    """Python sources, one document per file; line ends are `\\n` on every system."""

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
