import json

import numpy as np
import pytest
from pydantic import ValidationError

from heterodox.core.errors import CorpusError
from heterodox.data import DataConfig
from heterodox.data.corpora import File, Stdlib
from heterodox.data.dataset import cache_root
from heterodox.data.grammar import Grammar
from heterodox.data.tokenizers import Byte

SMALL = {"name": "grammar", "length": 4000}


def test_the_default_is_bytes_of_the_standard_library():
    config = DataConfig()
    assert config.corpus == Stdlib.Config()
    assert config.tokenizer == Byte.Config()
    assert DataConfig.model_validate({"corpus": {"max_bytes": 9}}).corpus == Stdlib.Config(max_bytes=9)


@pytest.mark.parametrize(
    "corpus",
    [
        None,
        {"name": "stdlib", "max_bytes": 5},
        {"max_bytes": 5},
        Grammar.Config(),
        {"name": "hf", "dataset": "x", "field": "body"},
    ],
)
def test_path_alone_turns_any_corpus_into_a_file(tmp_path, corpus):
    given = {"path": str(tmp_path)} if corpus is None else {"path": str(tmp_path), "corpus": corpus}
    config = DataConfig.model_validate(given)
    assert config.corpus == File.Config(path=tmp_path)
    assert config.path is None
    assert DataConfig.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    "corpus",
    [
        {"field": "body"},
        {"name": "stdlib", "max_bytes": 5, "field": "body"},
        {"name": "file", "field": "body"},
        {"name": "file", "path": "elsewhere", "field": "body"},
        File.Config(path="elsewhere", field="body"),
    ],
)
def test_path_keeps_what_is_said_about_the_file(tmp_path, corpus):
    assert DataConfig(path=tmp_path, corpus=corpus).corpus == File.Config(path=tmp_path, field="body")


def test_unknown_keys_are_refused_with_and_without_a_path(tmp_path):
    for extra in ({}, {"path": tmp_path}):
        with pytest.raises(ValidationError, match="max_bites"):
            DataConfig.model_validate({"corpus": {"max_bites": 5}, **extra})
        with pytest.raises(ValidationError, match="grammer"):
            DataConfig.model_validate({"corpus": {"name": "grammer"}, **extra})


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": 0.9}, r"add up to 1\.05 \(train 0\.9, meta 0\.05, val 0\.05, test 0\.05\), expected 1"),
        ({"train": 0.0, "meta": 0.9}, "greater than 0"),
        ({"train": 1.0, "meta": -0.05, "val": 0.0}, "greater than or equal to 0"),
    ],
)
def test_splits_must_be_shares(splits, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"splits": splits})


def test_a_dataset_is_the_corpus_cut_and_tokenized(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    dataset = DataConfig(path=tmp_path / "a.txt").build()
    text = "".join(dataset.tokenizer.decode(split.tokens) for split in dataset.splits.values())
    assert text == "0123456789" * 10
    assert [len(split.tokens) for split in dataset.splits.values()] == [85, 5, 5, 5]
    assert [split.num_bytes for split in dataset.splits.values()] == [85, 5, 5, 5]
    assert dataset.splits["val"].bytes_per_token == 1
    assert all(isinstance(split.tokens, np.memmap) for split in dataset.splits.values())


def test_a_share_of_nothing_is_an_empty_split(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    dataset = DataConfig(path=tmp_path, splits={"train": 0.9, "meta": 0, "val": 0.1, "test": 0}).build()
    assert len(dataset.splits["meta"].tokens) == 0
    assert dataset.splits["meta"].bytes_per_token == 0
    with pytest.raises(CorpusError, match="meta split has no tokens to measure"):
        dataset.unigram_loss("meta")


def test_the_separator_stands_between_documents(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    dataset = DataConfig(path=tmp_path, separator="||", splits={"train": 1, "meta": 0, "val": 0, "test": 0}).build()
    text = dataset.tokenizer.decode(dataset.splits["train"].tokens)
    assert sorted(text.split("||")) == ["a" * 100, "b" * 100, "c" * 100]


@pytest.mark.parametrize("contents", ["", " \n\t\n"])
def test_an_empty_file_is_refused(tmp_path, contents):
    (tmp_path / "a.txt").write_text(contents)
    with pytest.raises(CorpusError, match="the corpus holds no text: 1 document, each"):
        DataConfig(path=tmp_path / "a.txt").build()


def test_describe_is_plain_data():
    dataset = DataConfig(corpus=SMALL).build()
    described = dataset.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == "grammar"
    assert described["bytes"] == 4000
    assert described["tokens"] == {"train": 3400, "meta": 200, "val": 200, "test": 200}
    assert described["floor"] == Grammar().entropies()[-1]
    assert described["sha256"] == dataset.corpus_sha256


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_the_floor_is_known_where_a_token_is_a_symbol(tokenizer):
    dataset = DataConfig(corpus=SMALL, tokenizer={"name": tokenizer}).build()
    assert dataset.floor(8) == Grammar().floor(8)


def test_the_floor_is_unknown_elsewhere(tmp_path):
    assert DataConfig(corpus=SMALL, tokenizer={"name": "bpe", "vocab_size": 300}).build().floor(8) is None
    (tmp_path / "a.txt").write_text("x" * 100)
    assert DataConfig(path=tmp_path).build().floor(8) is None


def test_unigram_loss_is_the_smoothed_cross_entropy(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 6 + "b" * 2 + "ab")
    splits = {"train": 0.8, "meta": 0, "val": 0.2, "test": 0}
    dataset = DataConfig(path=tmp_path, tokenizer={"name": "char"}, splits=splits).build()
    assert dataset.unigram_loss("val") == pytest.approx(-0.5 * np.log(7 / 10) - 0.5 * np.log(3 / 10))


def test_the_cache_folder_is_chosen_by_recipe_then_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HETERODOX_CACHE", str(tmp_path / "environment"))
    assert cache_root(tmp_path / "recipe") == tmp_path / "recipe"
    assert cache_root(None) == tmp_path / "environment"
    monkeypatch.delenv("HETERODOX_CACHE")
    assert cache_root(None).name == "heterodox"


def test_large_vocabularies_take_four_bytes_a_token(tmp_path):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x10000, 0x10000 + 65_537))), encoding="utf-8")
    dataset = DataConfig(path=tmp_path, tokenizer={"name": "char"}).build()
    assert dataset.splits["train"].tokens.dtype == np.uint32
    assert dataset.splits["train"].bytes_per_token == 4
