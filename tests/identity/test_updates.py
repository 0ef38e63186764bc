"""Updates against PyTorch's own optimizers."""

import pytest
import torch
from torch import nn

from heterodox.core.comm import Solo
from heterodox.core.errors import RecipeError
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.update import SGD, AdamW
from tests.tiny import tiny_gpt


def walk(make_ours, make_theirs, steps: int = 8):
    """The same gradients through our update and through a stock optimizer; the weights after each step."""
    torch.manual_seed(0)
    start = {"matrix": torch.randn(3, 4).double(), "gain": torch.randn(4).double()}
    ours = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    update, optimizer = make_ours(), make_theirs(theirs)
    for step in range(steps):
        scale = 1 - step / steps
        grads = {name: torch.randn_like(value) for name, value in start.items()}
        for group in optimizer.param_groups:
            group["lr"] = update.lr * scale
        for name, parameter in theirs.items():
            parameter.grad = grads[name].clone()
        optimizer.step()
        update.apply(ours, grads, scale)
        yield {name: (ours[name].detach(), theirs[name].detach(), start[name]) for name in start}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torch_sgd(momentum, nesterov):
    if nesterov and not momentum:
        with pytest.raises(ValueError, match="momentum"):
            SGD.Config(nesterov=True)
        return
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.01}

    def stock(parameters):
        return torch.optim.SGD(parameters.values(), **options)

    for weights in walk(lambda: SGD(**options), stock):
        for ours, theirs, start in weights.values():
            assert torch.equal(ours, theirs)
            assert not torch.equal(ours, start)


@pytest.mark.parametrize(
    ("which", "decayed"),
    [
        ({"decay": "matrices"}, {"matrix"}),
        ({"decay": "all"}, {"matrix", "gain"}),
        ({"decay": "all", "spared": ["mat*"]}, {"gain"}),
    ],
)
def test_adamw_is_torch_adamw(which, decayed):
    options = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8}

    def stock(parameters):
        groups = [{"params": [p], "weight_decay": 0.3 * (name in decayed)} for name, p in parameters.items()]
        return torch.optim.AdamW(groups, **options)

    for weights in walk(lambda: AdamW(**options, weight_decay=0.3, **which), stock):
        for ours, theirs, start in weights.values():
            assert torch.allclose(ours, theirs, rtol=1e-13, atol=0)
            assert not torch.equal(ours, start)


@pytest.mark.parametrize("update", [SGD(momentum=0.9, weight_decay=0.1), AdamW(weight_decay=0.1)])
def test_a_parameter_without_a_gradient_neither_moves_nor_decays(update):
    parameters = {"moving": nn.Parameter(torch.ones(2, 2)), "frozen": nn.Parameter(torch.ones(2, 2))}
    for _ in range(3):
        update.apply(parameters, {"moving": torch.ones(2, 2)}, 1.0)
    assert torch.equal(parameters["frozen"], torch.ones(2, 2))
    assert not torch.equal(parameters["moving"], torch.ones(2, 2))
    assert not any(p.grad is not None for p in parameters.values())


def test_a_pattern_of_spared_names_must_match():
    model = tiny_gpt()
    services = Services(model, Streams(0), Solo())
    AdamW(spared=["*_emb.weight"]).connect(services)
    with pytest.raises(RecipeError, match=r"'\*_embedding' matches no parameter; there is, for one, tok_emb.weight"):
        AdamW(spared=["*_embedding"]).connect(services)
