"""The baseline that a rater must beat: a linear model of what can be seen without reading.

    s = a + b · (characters of the example) + c · (share of them that are neither letters nor digits)

fitted by least squares to the labels of planted noise in train: unlike the rater, it is told what is noise.
"""

import numpy as np
from jaxtyping import Float

from heterodox.data import Dataset, Windows
from heterodox.data.tokenizer import Tokenizer

FITTED = 4096
"""Examples of train that it is fitted to, at most."""


def surface_scores(dataset: Dataset, windows: Windows, context: int) -> Float[np.ndarray, " examples"]:
    """The score of every example of `windows`, higher for what looks cleaner."""
    train = dataset.splits["train"]
    assert train.labels is not None, "there is no planted noise to fit to"
    known = Windows(train, context)
    seen = features(dataset.tokenizer, known, min(known.count, FITTED))
    clean = (train.labels[: len(seen)] == 0).astype(np.float64)
    weights = np.linalg.lstsq(seen, clean, rcond=None)[0]
    return features(dataset.tokenizer, windows, windows.count) @ weights


def features(tokenizer: Tokenizer, windows: Windows, count: int) -> Float[np.ndarray, "examples 3"]:
    """1, length and share of characters that are neither letters nor digits, of the first `count` examples."""
    rows = []
    for ids in np.array_split(np.arange(count), max(1, count // 256)):
        for tokens in windows.batch(ids).inputs.cpu().numpy():
            text = tokenizer.decode(tokens)
            other = sum(not character.isalnum() for character in text)
            rows.append([1.0, float(len(text)), other / max(1, len(text))])
    return np.array(rows)
