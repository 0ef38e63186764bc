import hashlib
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heterodox.core.errors import CorpusError
from heterodox.data.corpora import Document, Gathered, gather
from heterodox.data.dataset import divide, place_borders

FRACTIONS = {"train": 0.85, "meta": 0.05, "val": 0.05, "test": 0.05}


def gathered(*texts: str) -> Gathered:
    return gather(Document(str(i), text) for i, text in enumerate(texts))


def place(lengths: list[int], fractions: list[float], same: list[bool] | None = None) -> list[int]:
    gaps = same if same is not None else [False] * (len(lengths) - 1)
    return place_borders(np.array(lengths), np.array(gaps, dtype=bool), fractions)


@st.composite
def documents(draw) -> list[str]:
    distinct = draw(st.lists(st.text("abcdé🦊", min_size=1, max_size=40), min_size=1, max_size=12))
    return [*distinct, *draw(st.lists(st.sampled_from(distinct), max_size=6))]


@st.composite
def shares(draw) -> dict[str, float]:
    weights = [draw(st.integers(1, 20)), *(draw(st.integers(0, 20)) for _ in range(3))]
    return {name: weight / sum(weights) for name, weight in zip(FRACTIONS, weights, strict=True)}


@given(documents(), shares())
def test_splits_are_disjoint_cover_the_corpus_and_never_part_copies(texts, fractions):
    corpus = gathered(*texts)
    try:
        pieces = divide(corpus.texts, corpus.digests, fractions)
    except CorpusError:
        return
    assert list(pieces) == list(FRACTIONS)
    assert "".join(piece for parts in pieces.values() for piece in parts) == "".join(corpus.texts)
    assert all(bool(parts) == (fractions[name] > 0) for name, parts in pieces.items())
    borders = set(accumulate(len("".join(parts)) for parts in pieces.values()))
    starts = [0, *accumulate(len(text) for text in corpus.texts)]
    for text in set(corpus.texts):
        copies = corpus.texts.count(text)
        if copies > 1:
            first = starts[corpus.texts.index(text)]
            assert not borders & set(range(first + 1, first + copies * len(text)))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), shares())
def test_borders_lie_within_a_hundredth_of_where_they_are_wanted(lengths, fractions):
    borders = place(lengths, list(fractions.values()))
    wanted = np.concatenate([[0], np.cumsum(list(fractions.values()))]) * sum(lengths)
    assert (borders[0], borders[-1]) == (0, sum(lengths))
    assert all(abs(a - b) <= 0.01 * sum(lengths) + 0.5 for a, b in zip(borders, wanted, strict=True))
    assert all(a <= b for a, b in pairwise(borders))


def test_a_border_moves_to_the_end_of_a_document_that_is_near_and_cuts_one_that_is_not():
    assert place([843, 157], [0.85, 0.15]) == [0, 843, 1000]
    assert place([800, 200], [0.85, 0.15]) == [0, 850, 1000]


def test_a_border_among_copies_moves_out_of_them_however_far():
    assert place([100, 300, 300, 300], [0.5, 0.5], [False, True, True]) == [0, 100, 1000]
    assert place([300, 300, 300, 100], [0.8, 0.2], [True, True, False]) == [0, 900, 1000]


def test_a_border_between_two_copies_is_no_end_of_a_document():
    assert place([500, 500, 100], [5 / 11, 6 / 11], [True, False])[1] in (0, 1000)


def test_small_splits_survive_the_moving_of_their_borders():
    lengths = [990, 4, 6]
    borders = place(lengths, [0.988, 0.004, 0.004, 0.004])
    assert all(b > a for a, b in pairwise(borders))


def test_a_single_document_is_cut_in_file_order():
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    corpus = gathered(text)
    pieces = divide(corpus.texts, corpus.digests, FRACTIONS)
    assert pieces == {
        "train": [text[:850]],
        "meta": [text[850:900]],
        "val": [text[900:950]],
        "test": [text[950:]],
    }


def test_a_share_of_nothing_is_an_empty_split():
    corpus = gathered("x" * 100)
    pieces = divide(corpus.texts, corpus.digests, {"train": 0.9, "meta": 0.0, "val": 0.1, "test": 0.0})
    assert {name: len("".join(parts)) for name, parts in pieces.items()} == {
        "train": 90,
        "meta": 0,
        "val": 10,
        "test": 0,
    }


def test_a_corpus_of_copies_cannot_be_split():
    corpus = gathered(*["the same text"] * 50)
    with pytest.raises(CorpusError, match=r"split would be empty: 650 characters in 50 documents \(1 different"):
        divide(corpus.texts, corpus.digests, FRACTIONS)


def test_documents_are_ordered_by_hash_and_named_by_nothing():
    corpus = gathered("b", "a", "b", "c")
    assert corpus.digests == sorted(corpus.digests)
    assert sorted(corpus.texts) == ["a", "b", "b", "c"]
    assert corpus.sha256 == gathered("c", "b", "a", "b").sha256
    assert corpus.sha256 != gathered("a", "b", "c").sha256
    assert gathered("ab", "c").sha256 != gathered("a", "bc").sha256
    assert gathered("text").sha256 == hashlib.sha256(b"text").hexdigest()


def test_blank_documents_are_dropped_and_a_blank_corpus_is_refused():
    assert gathered("", " \n", "x").texts == ["x"]
    with pytest.raises(CorpusError, match=r"holds no text: 2 documents, each of them empty or white space"):
        gathered("", "\n\n")
    with pytest.raises(CorpusError, match="holds no text: 0 documents"):
        gathered()


def test_a_lone_surrogate_is_named_with_its_document():
    with pytest.raises(CorpusError, match="1: character 2 is a lone surrogate"):
        gathered("fine", "no\ud800")
