"""Any `tokenizer.json`: of the `tokenizers` library, or saved by one of our own runs."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from heterodox.core import config
from heterodox.core.errors import CheckpointError, CorpusError
from heterodox.core.files import parse_json, read_text
from heterodox.core.slot import Slot
from heterodox.data.tokenizer.base import FILE_NAME, Tokenizer
from heterodox.data.tokenizer.byte import Byte
from heterodox.data.tokenizer.char import Char
from heterodox.data.tokenizer.subword import Subword, parse_description

MOST_BYTES = 1 << 29

_OUTSIDE = Slot("tokenizer", object, ())
"""Tokenizers of other distributions; `parse` knows our own."""


class TokenizerFile:
    """Builds the tokenizer in `path`, taken as it is, but that sampling (BPE-dropout) is switched off.

    One that normalises text is taken, and bits per byte count the normalised text. One that loses characters is
    refused.
    """

    class Config(config.Config):
        name: Literal["file"] = "file"
        path: Path

        def identity(self) -> str:
            return hashlib.sha256(self._read().encode()).hexdigest()

        def build(self, texts: Mapping[str, str]) -> Tokenizer:
            try:
                return parse(self._read())
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise CorpusError(f"{self.path} is not a tokenizer.json: {error}") from error

        def _read(self) -> str:
            try:
                path = self.path.expanduser()
                if path.exists() and not path.is_file():
                    raise OSError("not a regular file")
                if path.exists() and path.stat().st_size > MOST_BYTES:
                    raise OSError(f"larger than the {MOST_BYTES} bytes of any tokenizer")
                return path.read_text(encoding="utf-8")
            except (OSError, ValueError, RuntimeError) as error:
                raise CorpusError(
                    f"cannot read the tokenizer {str(self.path)[:200]} ({error}); "
                    "set data.tokenizer.path to a tokenizer.json"
                ) from error


def load_tokenizer(folder: Path) -> Tokenizer:
    """What `Tokenizer.save` wrote into `folder`. Raises CheckpointError if it is missing or damaged."""
    path = folder / FILE_NAME
    try:
        return parse(read_text(path))
    except (CheckpointError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot load the tokenizer {path}: {error}") from error


def parse(text: str) -> Tokenizer:
    """The inverse of `Tokenizer.dumps`. Raises ValueError if `text` is not a tokenizer."""
    description = parse_json(text)
    match description:
        case {"heterodox": "byte"}:
            return Byte()
        case {"heterodox": "char", "characters": str(characters)} if 0 < len(characters) == len(set(characters)):
            return Char(characters)
        case {"heterodox": str(name)} if (part := _OUTSIDE.get(name)) is not None:
            if not hasattr(part, "parse"):
                raise ValueError(f"{part.__module__}:{part.__qualname__} has no function `parse` that reads it")
            return part.parse(text)
        case {"model": dict()}:
            return Subword(parse_description(text))
    raise ValueError("it describes no tokenizer that is known here")
