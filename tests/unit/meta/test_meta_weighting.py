"""Scores to weights, by hand, in float64."""

import math

import pytest
import torch

from heterodox.meta.options import ScoreWeighting, WeightingOptions

SCORES = torch.tensor([-3.0, -0.5, 0.2, 4.0], dtype=torch.float64)


def weighting(**options) -> ScoreWeighting:
    return ScoreWeighting(WeightingOptions(**options))


def test_sigmoid_weights_are_scaled_and_clamped():
    found = weighting(kind="sigmoid", temperature=2.0, low=0.3, high=0.8)(SCORES).tolist()
    free = [1 / (1 + math.exp(-score / 2)) for score in SCORES.tolist()]
    assert free[0] < 0.3 < free[1] < free[2] < 0.8 < free[3]
    assert found == pytest.approx([0.3, free[1], free[2], 0.8], rel=1e-12)
    assert weighting(kind="sigmoid")(SCORES).tolist() == pytest.approx(
        [0.05, *(1 / (1 + math.exp(-score)) for score in SCORES.tolist()[1:])], rel=1e-12
    )


def test_softmax_weights_are_scaled_and_add_up_to_the_batch():
    found = weighting(temperature=0.5)(SCORES).tolist()
    powers = [math.exp(2 * score) for score in SCORES.tolist()]
    assert found == pytest.approx([4 * power / sum(powers) for power in powers], rel=1e-12)
    assert max(abs(a - b) for a, b in zip(found, weighting()(SCORES).tolist(), strict=True)) > 0.1


def test_entropies_by_hand():
    shares = [1 / (1 + math.exp(-score / 2)) for score in SCORES.tolist()]
    bits = [-(p * math.log2(p) + (1 - p) * math.log2(1 - p)) for p in shares]
    assert float(weighting(kind="sigmoid", temperature=2.0).entropy(SCORES)) == pytest.approx(sum(bits) / 4, rel=1e-12)
    powers = [math.exp(score / 2) for score in SCORES.tolist()]
    logs = [power / sum(powers) * math.log(power / sum(powers)) for power in powers]
    assert float(weighting(temperature=2.0).entropy(SCORES)) == pytest.approx(-sum(logs) / math.log(4), rel=1e-12)
    for kind in ("sigmoid", "softmax"):
        assert float(weighting(kind=kind).entropy(torch.zeros(5))) == pytest.approx(1, rel=1e-6)


def test_one_example_has_no_entropy_to_speak_of():
    assert float(weighting().entropy(SCORES[:1])) == 0
    assert weighting(kind="sigmoid").entropy(SCORES[:1]).isfinite()


def test_the_share_that_is_clamped():
    assert float(weighting(kind="sigmoid", temperature=2.0, low=0.3, high=0.8).clamped(SCORES)) == 0.5
    assert float(weighting(kind="sigmoid").clamped(SCORES)) == 0.25
    assert float(weighting().clamped(SCORES)) == 0
