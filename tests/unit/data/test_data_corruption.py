"""Planted noise: how much, of which kind, and where."""

import numpy as np
import pytest

from heterodox.core.errors import RecipeError
from heterodox.data import DataConfig, Windows
from tests.tiny import CORPUS, tiny_recipe

KINDS = ["shuffled", "foreign", "repeated", "duplicate"]


PLAIN = {"corpus": CORPUS, "tokenizer": "char"}


def dataset(**corruption):
    options = {"window": 16, "kinds": KINDS, "rate": 0.4} | corruption
    return DataConfig.model_validate(PLAIN | {"corruption": options}).build()


def test_as_much_of_each_kind_as_was_asked_for():
    noisy, clean = dataset(), DataConfig.model_validate(PLAIN).build()
    train, before = noisy.splits["train"], clean.splits["train"]
    assert train.labels is not None
    counts = np.bincount(train.labels)
    assert counts[1:].sum() == round(0.4 * len(train.labels))
    assert counts[1:].max() - counts[1:].min() <= 1
    windows = train.tokens[: len(train.labels) * 16].reshape(-1, 16)
    others = np.asarray(before.tokens)[: len(train.labels) * 16].reshape(-1, 16)
    for number, kind in enumerate(["clean", *KINDS]):
        mine, was = windows[train.labels == number], others[train.labels == number]
        same = (mine == was).all(1).mean()
        assert same == 1 if kind == "clean" else same < 0.1, kind
        if kind == "shuffled":
            assert (np.sort(mine, 1) == np.sort(was, 1)).all()
        if kind == "foreign":
            assert len(set(zip(was.ravel().tolist(), mine.ravel().tolist(), strict=True))) == 8
        if kind == "repeated":
            assert len(np.unique(mine, axis=0)) == 1
        if kind == "duplicate":
            assert 1 < len(np.unique(mine, axis=0)) <= 4
    for name in ("meta", "val", "test"):
        assert np.array_equal(noisy.splits[name].tokens, clean.splits[name].tokens)
        assert noisy.splits[name].labels is None
    assert noisy.entropies is None is not clean.entropies
    assert noisy.corpus_sha256 == clean.corpus_sha256


def test_the_same_noise_every_time_and_other_noise_for_another_seed():
    first, again, other = dataset().splits["train"], dataset().splits["train"], dataset(seed=1).splits["train"]
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)


def test_a_held_out_split_gets_the_boilerplate_of_train():
    noisy = dataset(kinds=["repeated"])
    train, val = noisy.splits["train"], noisy.noisy("val")
    assert val is not None
    phrases = [s.tokens[: len(s.labels) * 16].reshape(-1, 16)[s.labels == 1][0] for s in (train, val)]
    assert np.array_equal(*phrases)
    assert dataset(kinds=["repeated"], keep="clean").noisy("val") is not None


def test_the_clean_examples_alone():
    train = dataset(keep="clean").splits["train"]
    windows = Windows(train, 16)
    assert train.labels is not None
    assert windows.count == (train.labels == 0).sum() < len(train.labels)
    assert (train.labels[windows.batch(np.arange(windows.count)).ids.numpy()] == 0).all()


@pytest.mark.parametrize(
    ("corruption", "message"),
    [
        ({"rate": 1.0}, "rate"),
        ({"kinds": []}, "kinds"),
        ({"kinds": ["shuffled", "shuffled"]}, "name one twice"),
        ({"keep": "clean"}, "corruption.keep clean and filter both choose"),
    ],
)
def test_refuses(corruption, message):
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(data={"corruption": corruption, "filter": {"scores": "scores.parquet"}})
