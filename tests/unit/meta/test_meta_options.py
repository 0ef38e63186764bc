"""Options of meta-training that would have no effect, or cannot work, are refused with the reason."""

import pytest
from pydantic import ValidationError

from heterodox.meta.options import MetaOptions, WeightingOptions

SIGMOID = {"kind": "sigmoid"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": {"low": 0.1}}, "low is for sigmoid weights only, and weighting.kind is softmax"),
        ({"weighting": {"high": 0.9}}, "high is for sigmoid weights only"),
        ({"weighting": SIGMOID | {"low": 0.9, "high": 0.5}}, "weighting.low 0.9 is not below weighting.high 0.5"),
        ({"weighting": SIGMOID | {"high": 0.05}}, "weighting.low 0.05 is not below weighting.high 0.05"),
        ({"reset": "fresh", "lifetime": 100}, "lifetime 100 is for the reset staggered only"),
        ({"micro_batch": 4, "graphs": 2}, "micro_batch keeps no graph for the way back, but graphs is 2"),
        ({"micro_batch": 33}, "micro_batch 33 is more than the batch_size of 32"),
        ({"graphs": 3}, "graphs 3 is more than there are in a window of 2 backprop_steps"),
        ({"inner_steps": 501}, "a lifetime of 500 steps is shorter than the 501 inner_steps"),
        ({"control": "auxiliary", "batch_size": 1, "weighting": SIGMOID}, "control auxiliary compares the losses of a"),
        ({"control": "detached", "weighting": {"entropy": 0.1}}, r"weighting\.entropy 0\.1 would move it"),
        ({"control": "constant", "weighting": {"entropy": 0.1}}, r"weighting\.entropy 0\.1 would move it"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValidationError, match=message):
        MetaOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": SIGMOID | {"low": 0.1, "high": 0.9}},
        {"reset": "fresh", "inner_steps": 501},
        {"micro_batch": 4},
        {"batch_size": 1, "weighting": SIGMOID},
        {"control": "auxiliary", "weighting": {"entropy": 0.1}},
    ],
)
def test_takes_what_works_and_reads_what_it_writes(options):
    found = MetaOptions(**options)
    assert MetaOptions(**found.model_dump()) == found


def test_bounds_have_defaults():
    assert WeightingOptions(kind="sigmoid").bounds == (0.05, 1.0)
    assert WeightingOptions(kind="sigmoid", low=0.2, high=0.6).bounds == (0.2, 0.6)
    assert MetaOptions().steps_of_life == 500
