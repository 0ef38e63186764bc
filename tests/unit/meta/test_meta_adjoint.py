"""What is told of the adjoint, and models whose steps cannot be taken again."""

import pytest
import torch
from torch import nn

from heterodox.core.protocols import LanguageModel
from heterodox.core.types import Batch
from heterodox.meta import InnerSGD, meta_gradient
from heterodox.meta.problem import has_dropout
from heterodox.objective import CrossEntropy
from tests.tiny import tiny_batch, tiny_gpt


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


@pytest.mark.parametrize("options", [{}, {"graphs": 3}, {"micro_batch": 2}], ids=str)
def test_autocast_is_off_around_the_model_and_in_it(options):
    def found(inside: torch.dtype | None, outside: bool) -> list[torch.Tensor]:
        model, weights = tiny_gpt(torch.float32, layers=1), torch.linspace(0.5, 1.5, 4)
        model.autocast_dtype = inside

        def weighting(batch: Batch) -> torch.Tensor:
            return weights.clone()

        def losses(model: LanguageModel, batch: Batch) -> torch.Tensor:
            return CrossEntropy().losses(model(batch.inputs), batch)

        batches = [tiny_batch(seed=seed) for seed in range(4)]
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            gradient = meta_gradient(model, losses, batches[:3], weighting, batches[3:], InnerSGD(lr=0.1), **options)
        assert model.autocast_dtype is inside, "it was put back"
        return [*gradient.weight_grads, *gradient.losses, gradient.val_loss, gradient.state.weights]

    plain = found(None, False)
    assert all(tensor.dtype == torch.float32 for tensor in plain)
    assert all(map(torch.equal, plain, found(torch.bfloat16, False)))
    assert all(map(torch.equal, plain, found(None, True)))


def test_what_counts_as_dropout():
    assert not has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.LSTM(2, 2)))
    assert has_dropout(nn.Sequential(nn.Dropout2d(0.1)))
    assert has_dropout(nn.MultiheadAttention(4, 2, dropout=0.1))
