"""Whether a tokenizer keeps the text: what it drops would make bits per byte false."""

from heterodox.core.errors import CorpusError
from heterodox.data.tokenizer.base import Ids, Tokenizer

PIECES, LENGTH = 32, 512
"""How many pieces of the text are tried, and their length in characters."""


def text_bytes(tokenizer: Tokenizer, text: str, ids: Ids) -> int:
    """Return how many bytes of text `ids` stand for: those of `text`, if the tokenizer gives it back.

    If it normalises the text (case, accents, white space), those of the text that it gives back. Raises CorpusError
    where it loses characters, naming the first, or encodes the same text in two ways.
    """
    if tokenizer.exact:
        return len(text.encode())
    refuse_losses(tokenizer, text)
    given = tokenizer.decode(ids)
    return len(text.encode()) if given == text else len(given.encode(errors="replace"))


def refuse_losses(tokenizer: Tokenizer, text: str) -> None:
    """Raise CorpusError if characters, or pieces of the text, do not come back from ids."""
    step = max(len(text) // PIECES, LENGTH)
    for start in range(0, len(text), step):
        piece = text[start : start + LENGTH]
        ids = tokenizer.encode(piece)
        if ids.tolist() != tokenizer.encode(piece).tolist():
            raise CorpusError("the tokenizer encodes the same text in another way each time: switch off its sampling")
    for character in sorted(set(text)):
        if character.isspace():
            continue
        given = _bare(tokenizer.decode(tokenizer.encode(character)))
        if given not in (character, _bare(tokenizer.normalize(character))) or not given:
            raise CorpusError(
                f"the tokenizer loses characters of the text: {character!r} (U+{ord(character):04X}) comes back as "
                f"{given!r}, so losses would not compare; take one that knows it, or the byte tokenizer"
            )


def _bare(text: str) -> str:
    """`text` without white space, which word tokenizers put where they like."""
    return "".join(text.split())
