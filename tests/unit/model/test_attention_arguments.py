"""What attention and bottlenecks refuse when they are built from Python."""

import pytest

from heterodox.model import GPT, DirectionalVQ, FrozenSubspace

SIZES = {"vocab_size": 5, "layers": 1, "heads": 1, "width": 4, "context": 3}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sigmoid_bias": "zero"}, "attention is softmax"),
        ({"straight_through_sigmoid": True}, "attention is softmax"),
        ({"attention": "sigmoid", "softmax_backward": "fused"}, "attention is sigmoid"),
        ({"softmax_backward": "centred", "dropout": 0.1}, "under dropout, which is 0.1"),
        ({"subspace_rank": 5}, "ranks from 1 to 4; found 5"),
    ],
)
def test_options_of_the_other_attention_and_ranks_above_the_width(options, reason):
    with pytest.raises(ValueError, match=reason):
        GPT(**SIZES, **options)


def test_empty_codebooks_and_subspaces():
    with pytest.raises(ValueError, match="at least one code; found 0"):
        DirectionalVQ(4, 0)
    with pytest.raises(ValueError, match="found 0"):
        FrozenSubspace(4, 0)
