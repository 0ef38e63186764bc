"""Token files, kept between runs: one folder per corpus, splits and tokenizer.

A folder is written under a temporary name and renamed, so that it is either whole or absent; whoever comes
second uses what the first one wrote. Its index holds the hash of every file, and a folder that does not agree
is made anew.
"""

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from jaxtyping import UInt

from heterodox.core.errors import CheckpointError, CorpusError, HeterodoxError
from heterodox.core.files import TEMPORARY, parse_json, replacing
from heterodox.core.files import sha256 as file_sha256
from heterodox.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2
INDEX = "index.json"
ENVIRONMENT = "HETERODOX_CACHE"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenized:
    """What a folder holds. `tokens` and `num_bytes` (of UTF-8 text) are keyed by split."""

    tokenizer: Tokenizer
    tokens: dict[str, UInt[np.ndarray, " tokens"]]
    num_bytes: dict[str, int]


def cache_root(chosen: Path | None) -> Path:
    """`chosen`, else $HETERODOX_CACHE, else the user's cache folder."""
    if chosen is not None:
        return chosen.expanduser()
    if os.environ.get(ENVIRONMENT):
        return Path(os.environ[ENVIRONMENT]).expanduser()
    return platformdirs.user_cache_path("heterodox")


def cached(root: Path, identity: dict[str, Any], build: Callable[[], Tokenized]) -> Tokenized:
    """What `build` returns, from `root` if it is there already. `identity` is JSON data that determines it.

    Where `root` cannot be written, a folder that lasts as long as this process stands in. Raises CorpusError if that
    one cannot be written either.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    found = read(root / key)
    if found is not None:
        return found
    built = build()
    try:
        return write(root / key, built)
    except OSError as error:
        log.warning("cannot write the token cache %s (%s); using a temporary folder", root, error)
    temporary = Path(tempfile.mkdtemp(prefix="heterodox-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    try:
        return write(temporary / key, built)
    except OSError as error:
        raise CorpusError(f"cannot write tokens to {root} or {temporary} ({error}); free some space") from error


def read(folder: Path) -> Tokenized | None:
    """The folder's contents with memory-mapped tokens, or None if it is missing or damaged."""
    try:
        index = parse_json((folder / INDEX).read_text(encoding="utf-8"))
        for name, sha256 in index["files"].items():
            if file_sha256(folder / name) != sha256:
                raise ValueError(f"{name} is damaged")
        tokens = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in index["num_bytes"]}
        return Tokenized(load_tokenizer(folder), tokens, index["num_bytes"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, HeterodoxError) as error:
        log.warning("the token cache %s cannot be used (%s); making it anew", folder, error)
        return None


def write(folder: Path, contents: Tokenized) -> Tokenized:
    """Put `contents` into `folder` and read it back. Raises OSError if that is impossible."""
    for _ in range(3):
        try:
            with replacing(folder, folder=True) as temporary:
                _fill(temporary, contents)
        except CheckpointError as error:
            if not folder.exists():  # else another process has been faster
                raise OSError(str(error)) from None
        found = read(folder)
        if found is not None:
            return found
        damaged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{TEMPORARY}")
        folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    raise OSError(f"other processes keep damaging {folder}")


def _fill(folder: Path, contents: Tokenized) -> None:
    for split, tokens in contents.tokens.items():
        np.save(folder / f"{split}.npy", tokens)
    contents.tokenizer.save(folder)
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    index = {"files": files, "num_bytes": contents.num_bytes}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
