"""A meta-gradient that is not finite says why."""

import pytest
import torch
from torch import nn

from heterodox.meta import InnerSGD, meta_gradient


class Point(nn.Module):
    """A number in each coordinate."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([0.3, 0.4], dtype=dtype))


def bumpy(model: Point, batch: torch.Tensor) -> torch.Tensor:
    """Bounded, but gradient descent with a step of 1 is the map x ← x + 3 sin(3x), which is chaotic."""
    return torch.cos(3 * model.x).sum() * batch


def found(num_steps: int, dtype: torch.dtype, losses=bumpy, lr: float = 1.0, **options):
    batches = [torch.ones(1, dtype=dtype)] * num_steps
    return meta_gradient(Point(dtype), losses, batches, torch.clone, batches[:1], InnerSGD(lr=lr), **options)


def test_an_adjoint_that_leaves_float32_raises():
    """The derivative is there in float64: only the range is at fault."""
    with pytest.raises(FloatingPointError, match=r"left float32 \d+ steps before the end.*chaotic"):
        found(200, torch.float32)
    assert found(200, torch.float64).adjoint_norms.max() > torch.finfo(torch.float32).max
    assert found(200, torch.float32, lr=0.01).adjoint_norms.max() < 2


def test_without_a_check_it_is_returned():
    given = found(200, torch.float32, check=False)
    assert not torch.stack(given.weight_grads).isfinite().all()
    assert torch.stack(given.losses).isfinite().all()


def test_a_loss_that_is_not_finite_is_told_apart():
    def steep(model: Point, batch: torch.Tensor) -> torch.Tensor:
        return model.x.square().sum() * batch

    with pytest.raises(FloatingPointError, match=r"a loss of inner step \d+ is not"):
        found(200, torch.float32, steep, lr=3.0)


def test_weights_without_a_derivative_are_told_apart():
    weight, batches = torch.zeros(1, requires_grad=True), [torch.ones(1)]

    def weighting(_: torch.Tensor) -> torch.Tensor:
        return weight.sqrt()

    with pytest.raises(FloatingPointError, match="what computes the weights"):
        meta_gradient(Point(torch.float32), bumpy, batches, weighting, batches, InnerSGD(), parameters=[weight])
