"""What a rater that no longer learns makes of a batch, and the inner models that it learned from."""

import pytest
import torch

from heterodox.app.recipe import Recipe
from heterodox.core.comm import Solo
from heterodox.core.rng import Streams
from heterodox.core.services import Services
from heterodox.learner.rater import inner_update
from heterodox.meta.training import TrainOptions, inner_adamw
from heterodox.rating import DataRater
from tests.tiny import tiny_batch, tiny_gpt

RATER = {"layers": 0, "width": 8}


def deployed(mode: str, **weighting) -> DataRater:
    """One whose training is over, and that prefers some examples."""
    rating = DataRater(mode=mode, train=TrainOptions(rater=RATER, weighting=weighting))
    rating.connect(Services(tiny_gpt(), Streams(0), Solo()))
    rating.trained = True
    with torch.no_grad():
        rating.network.head.weight.copy_(torch.linspace(-3, 3, 8)[None])
    return rating


@pytest.mark.parametrize(
    "weighting", [{}, {"temperature": 2.0}, {"kind": "sigmoid"}, {"kind": "sigmoid", "low": 0.4, "high": 0.6}]
)
def test_reweighting_keeps_every_example_and_counts_the_better_ones_more(weighting):
    rating, batch = deployed("reweight", **weighting), tiny_batch(10)
    scores, scale = rating.score(batch), weighting.get("temperature", 1.0)
    shares = (scores / scale).softmax(0) if "kind" not in weighting else torch.sigmoid(scores)
    if "kind" in weighting:
        shares = shares.clamp(weighting.get("low", 0.05), weighting.get("high", 1.0))
    found = rating.weights(rating.select(batch))
    assert rating.select(batch) is batch
    assert torch.allclose(found, 10 * shares / shares.sum(), rtol=1e-10)
    assert float(found.std()) > 0.05
    assert rating.kept(10) == 10


def test_filtering_drops_the_worst_and_counts_the_rest_alike():
    rating, batch = deployed("filter"), tiny_batch(10)
    kept = rating.select(batch)
    assert kept.ids.tolist() == sorted(rating.score(batch).argsort(descending=True)[:7].tolist())
    assert rating.weights(kept).tolist() == [1.0] * 7


@pytest.mark.parametrize("warmup", [0, 7])
def test_inner_models_of_a_rater_train_alike_wherever_it_is_trained(warmup):
    """By the optimizer of a recipe that says nothing of it."""
    model, options = tiny_gpt(), TrainOptions(inner_lr=3e-3, inner_warmup=warmup, eps_root=1e-10)
    update = Recipe.model_validate({"update": {"lr": 3e-3}}).update.build()
    wanted = inner_update(update, model, eps_root=1e-10, warmup=warmup)
    found = inner_adamw(options, model)
    assert (found.lr, found.betas, found.eps, found.eps_root) == (3e-3, (0.9, 0.99), 1e-8, 1e-10)
    assert torch.equal(found.weight_decay, wanted.weight_decay)
    assert 0 < int((found.weight_decay == 0).sum()) < len(found.weight_decay)
    assert found.warmup == wanted.warmup == warmup
    assert (found.lr, found.betas, found.eps) == (wanted.lr, wanted.betas, wanted.eps)
