"""AUC by hand."""

import numpy as np

from heterodox.meta.rater import auc, auc_by_kind


def test_it_is_the_share_of_pairs_in_the_right_order():
    assert auc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert auc([0.0], [1.0, 2.0]) == 0.0
    assert auc([1.0, 3.0], [2.0, 0.0]) == 0.75
    assert auc([1.0, 1.0], [1.0]) == 0.5
    assert auc([], [1.0]) is None


def test_each_kind_against_what_is_clean():
    scores, labels = np.array([3.0, 2.0, 0.0, 2.5, 9.0]), np.array([0, 0, 1, 3, 3])
    assert auc_by_kind(scores, labels, ["a", "b", "c"]) == {"a": 1.0, "c": 0.25}


def test_without_finite_scores_there_is_none():
    assert auc([1.0, 2.0], [0.0]) == 1.0
    assert auc([1.0, np.nan], [0.0]) is None
    assert auc([1.0, 2.0], [np.inf]) is None
