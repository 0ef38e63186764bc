"""What is told of the adjoint, and models whose steps cannot be taken again."""

import pytest
import torch
from torch import nn

from heterodox.meta import InnerSGD, meta_gradient
from heterodox.meta.problem import has_dropout


class Bowl(nn.Module):
    """A point x with the loss ‖x‖²/2, which SGD with rate η shrinks by 1 − η, and its adjoint alike."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))


def bowl(model: Bowl, batch: torch.Tensor) -> torch.Tensor:
    return model.x.square().sum() / 2 * batch


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("graphs", [0, 1, 7])
def test_its_norms_are_told_from_the_end_to_the_start(num_steps, graphs):
    batches = [torch.ones(1, dtype=torch.float64)] * num_steps
    found = meta_gradient(Bowl(), bowl, batches, torch.clone, batches[:1], InnerSGD(lr=0.1), graphs=graphs)
    end = 5 * 0.9**num_steps  # the gradient of the validation loss is the point itself
    wanted = [end * 0.9**back for back in range(num_steps + 1)]
    assert found.adjoint_norms.tolist() == pytest.approx(wanted, rel=1e-12)


def test_dropout_needs_a_seed():
    model, batches = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), [torch.ones(3, 2)] * 3

    def losses(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().sum(1)

    def weighting(batch: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(batch))

    def found(**options):
        return meta_gradient(model, losses, batches, weighting, batches[:1], InnerSGD(), **options)

    with pytest.raises(ValueError, match="without a seed a step taken again would not be the same step"):
        found()
    assert found(seed=1).val_loss > 0
    model.eval()
    assert found().val_loss > 0


def test_what_counts_as_dropout():
    assert not has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.LSTM(2, 2)))
    assert has_dropout(nn.Sequential(nn.Dropout2d(0.1)))
    assert has_dropout(nn.MultiheadAttention(4, 2, dropout=0.1))
