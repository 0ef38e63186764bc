import logging
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from heterodox.core.errors import CorpusError
from heterodox.data import DataConfig
from heterodox.data import dataset as cache
from heterodox.data.tokenizers import Byte

CORPUS = {"name": "grammar", "length": 2000}


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """Grows by one for each text that the byte tokenizer encodes."""
    calls: list[int] = []
    encode = Byte.encode

    def counted(self: Byte, text: str) -> np.ndarray:
        calls.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Byte, "encode", counted)
    return calls


def folders(root: Path) -> list[Path]:
    return sorted(root.iterdir())


def tokens(config: DataConfig) -> list[int]:
    return np.concatenate([split.tokens for split in config.build().splits.values()]).tolist()


def test_the_second_build_does_not_tokenize_again(encodings, token_cache):
    first = tokens(DataConfig(corpus=CORPUS))
    assert len(encodings) == 4
    assert tokens(DataConfig(corpus=CORPUS)) == first
    assert len(encodings) == 4
    assert len(folders(token_cache)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": {**CORPUS, "seed": 1}},
        {"tokenizer": {"name": "char"}},
        {"splits": {"train": 0.86, "meta": 0.04}},
        {"separator": " "},
    ],
)
def test_whatever_determines_the_tokens_determines_the_folder(change, token_cache):
    DataConfig(corpus=CORPUS).build()
    DataConfig.model_validate({"corpus": CORPUS, **change}).build()
    assert len(folders(token_cache)) == 2


def test_a_trained_tokenizer_comes_back_from_the_cache(monkeypatch):
    config = DataConfig(corpus=CORPUS, tokenizer={"name": "bpe", "vocab_size": 300})
    first = config.build()
    monkeypatch.setattr("heterodox.data.tokenizers.train", None)
    second = config.build()
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.splits["train"].num_bytes == 1700


@pytest.mark.parametrize("name", ["train.npy", "index.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_a_damaged_folder_is_made_anew(encodings, token_cache, caplog, name, damage):
    first = tokens(DataConfig(corpus=CORPUS))
    (folder,) = folders(token_cache)
    data = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if damage == "flip":
        data[-1] ^= 1
    if damage != "delete":
        (folder / name).write_bytes({"flip": data, "truncate": data[: len(data) // 2], "empty": b""}[damage])
    assert tokens(DataConfig(corpus=CORPUS)) == first
    assert len(encodings) == 8
    assert tokens(DataConfig(corpus=CORPUS)) == first
    assert len(encodings) == 8
    assert folders(token_cache) == [folder]


def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    config = DataConfig(corpus=CORPUS, cache=tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        dataset = config.build()
    assert "cannot write the token cache" in caplog.text
    assert isinstance(dataset.splits["train"].tokens, np.memmap)
    assert len(dataset.splits["train"].tokens) == 1700


def test_a_full_disk_is_one_clear_line(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    with pytest.raises(CorpusError, match=r"cannot write tokens to .*No space left on device.*free some space"):
        DataConfig(corpus=CORPUS).build()


def test_whoever_comes_second_takes_what_the_first_one_wrote(token_cache, monkeypatch):
    config = DataConfig(corpus=CORPUS)
    first = tokens(config)
    (folder,) = folders(token_cache)
    written = (folder / "train.npy").stat().st_mtime_ns
    real, calls = cache.read, []

    def blind_once(path: Path) -> cache.Tokenized | None:
        calls.append(path)
        return None if len(calls) == 1 else real(path)

    monkeypatch.setattr(cache, "read", blind_once)
    assert tokens(config) == first
    assert folders(token_cache) == [folder]
    assert (folder / "train.npy").stat().st_mtime_ns == written


def build(root: Path) -> list[int]:
    return tokens(DataConfig(corpus=CORPUS, cache=root))


def test_processes_may_build_the_same_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(build, [tmp_path / "shared"] * 4, chunksize=1)
    assert all(result == results[0] for result in results)
    assert len(folders(tmp_path / "shared")) == 1
