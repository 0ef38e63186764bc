"""Cutting a corpus into train, meta, val and test without leakage.

The splits follow each other in the order of the documents (file order, if there is one document). A border is
moved to the nearest end of a document when one is within 1 % of the corpus, and cuts through the document
otherwise. Copies of one document are never parted: a border that falls among them moves to the end of the
copies, however far.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int

from heterodox.core.errors import CorpusError

SNAP = 0.01
SNAP_OF_SMALLEST = 0.25


def divide(texts: Sequence[str], digests: Sequence[bytes], fractions: Mapping[str, float]) -> dict[str, list[str]]:
    """The pieces of text in each split; a split of fraction 0 has none.

    `digests` identify the texts, and equal ones must be neighbours. Raises CorpusError if a split with a
    positive fraction would be empty.
    """
    lengths = np.array([len(text) for text in texts])
    same = np.array([a == b for a, b in pairwise(digests)], dtype=bool)
    borders = place_borders(lengths, same, list(fractions.values()))
    pieces = {}
    for (name, fraction), (start, stop) in zip(fractions.items(), pairwise(borders), strict=True):
        pieces[name] = _pieces(texts, lengths, start, stop)
        if fraction > 0 and not pieces[name]:
            raise CorpusError(
                f"the {name} split would be empty: {lengths.sum()} characters in {len(texts)} documents "
                f"({len(set(digests))} different ones) are too little for a share of {fraction:g}; "
                "take a larger corpus or change data.splits"
            )
    return pieces


def place_borders(
    lengths: Int[np.ndarray, " documents"], same: Bool[np.ndarray, " gaps"], fractions: Sequence[float]
) -> list[int]:
    """Where splits begin and end, in characters from the corpus' start: one more than there are fractions.

    `same[i]`: documents i and i + 1 are copies.
    """
    ends = lengths.cumsum()
    total = int(ends[-1])
    allowed = np.concatenate([[0], ends[:-1][~same], [total]])
    copied = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    # Half of the smallest split is left even if both its borders move towards each other.
    reach = total * min(SNAP, SNAP_OF_SMALLEST * min(fraction for fraction in fractions if fraction > 0))
    shares = np.cumsum(fractions) / np.sum(fractions)
    wanted = [0, *(round(total * float(share)) for share in shares[:-1]), total]
    borders = []
    for cut in wanted:
        nearest = int(allowed[np.abs(allowed - cut).argmin()])
        inside = min(int(np.searchsorted(ends, cut, side="right")), len(lengths) - 1)
        borders.append(nearest if abs(nearest - cut) <= reach or copied[inside] else cut)
    assert borders == sorted(borders), f"borders out of order: {borders}"
    return borders


def _pieces(texts: Sequence[str], lengths: Int[np.ndarray, " documents"], start: int, stop: int) -> list[str]:
    ends = lengths.cumsum()
    first = int(np.searchsorted(ends, start, side="right"))
    pieces = []
    for text, end in zip(texts[first:], ends[first:].tolist(), strict=True):
        begin = end - len(text)
        if begin >= stop:
            break
        pieces.append(text[max(start - begin, 0) : stop - begin])
    return [piece for piece in pieces if piece]
