"""What a corpus is: documents of text, in a stable order."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from heterodox.core.errors import CorpusError


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
