"""Two ranks, each with half of the population or of the batch, are one rank with all of it."""

import json

from tests.command import answer_of
from tests.conformance.test_ranks import torchrun


def test_two_ranks_are_one():
    answer = answer_of(torchrun("tests/conformance/rater_ranks_worker.py"), timeout=300)
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert [name for name, *_ in rows] == ["learner", "filter", "reweight", "random", "perplexity"]
    for name, apart, moved in rows:
        assert apart < 1e-12, name
        assert moved > 1e-3, name
