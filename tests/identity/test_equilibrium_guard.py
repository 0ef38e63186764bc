"""Examples whose states did not settle get no credit, and the others theirs. float64."""

import pytest
import torch

from heterodox.credit import Equilibrium, Implicit
from heterodox.credit.equilibrium.shared import withhold_unsettled
from heterodox.model.dynamics import Relaxed
from heterodox.objective import CrossEntropy
from tests.measured import within
from tests.tiny import tiny_batch
from tests.tiny_equilibrium import WEIGHTS, distance, relaxed_names, tiny_equilibrium

GUARDED = {
    "equilibrium": lambda limit: Equilibrium(nudged_steps=3, nudged_limit=limit),
    "implicit": lambda limit: Implicit(steps=3, tolerance=None, adjoint_limit=limit),
}


def signal(rule, model, limit, weights=WEIGHTS):
    return GUARDED[rule](limit).signal(model, tiny_batch(), weights, CrossEntropy())


@pytest.mark.parametrize("rule", GUARDED)
def test_an_example_that_does_not_settle_counts_as_one_of_weight_zero(rule):
    model = tiny_equilibrium()
    names, everyone = relaxed_names(model), signal(rule, model, None)
    shares = {
        limit: float(signal(rule, model, limit).metrics["unsettled"]) for limit in torch.logspace(-2, 0, 60).tolist()
    }
    assert {0.0, 0.25, 1.0} <= set(shares.values()), "degenerate: all examples alike"
    limit = next(limit for limit, share in shares.items() if share == 0.25)
    guarded = signal(rule, model, limit)
    apart = []
    for left_out in range(4):
        weights = WEIGHTS.clone()
        weights[left_out] = 0
        apart.append(distance(guarded.grads, signal(rule, model, None, weights).grads, names))
    assert sum(within(value, 1e-12) for value in apart) == 1
    assert distance(guarded.grads, everyone.grads, names) > 1e-3
    for name in model.readout_names:  # the loss at the states that there are
        assert torch.equal(guarded.grads[name], everyone.grads[name])


@pytest.mark.parametrize("rule", GUARDED)
def test_nothing_is_withheld_from_what_settles(rule):
    model = tiny_equilibrium()
    free, guarded = signal(rule, model, None), signal(rule, model, 10.0)
    assert "unsettled" not in free.metrics
    assert guarded.metrics["unsettled"] == 0
    assert all(torch.equal(grad, guarded.grads[name]) for name, grad in free.grads.items())


def test_what_is_not_a_number_is_withheld():
    adjoint = torch.ones(1, 3, 2, 2)
    adjoint[0, 1] = torch.nan
    residuals = torch.tensor([0.05, torch.nan, 0.5]).view(1, 3, 1, 1)
    metrics: dict[str, torch.Tensor] = {}
    kept = withhold_unsettled(adjoint, Relaxed(adjoint, 3, residuals), 0.1, metrics)
    assert kept.sum((0, 2, 3)).tolist() == [4, 0, 0]
    assert torch.allclose(metrics["unsettled"], torch.tensor(2 / 3))
