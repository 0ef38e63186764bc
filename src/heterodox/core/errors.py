"""What we say to users. Each message names what was found, what was expected and what to do, in one line.

The command line prints the message and exits with code 2. A bug is an `assert`, never one of these.
"""

import difflib
from collections.abc import Iterable

MOST_CHARACTERS = 2000
"""Of a message; what is quoted in it may be of any length."""


class HeterodoxError(Exception):
    """Any error that the user can mend."""

    def __str__(self) -> str:
        text, half = super().__str__(), MOST_CHARACTERS // 2
        return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


class RecipeError(HeterodoxError):
    """A recipe that cannot be read, or that asks for what cannot be done."""


class CorpusError(HeterodoxError):
    """A corpus or tokenizer that is missing, empty, too short or not text."""


class CheckpointError(HeterodoxError):
    """A checkpoint or run folder that is missing, damaged, of another model, or cannot be written."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word closest to `word`, or the list of all known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
