"""A corpus, gathered: its documents in the order in which they are split."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from heterodox.core.errors import CorpusError
from heterodox.data.corpus.base import Document


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
