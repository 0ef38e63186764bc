"""Meta-training step by step: the controls, the rater's own optimizer, its average, and lives of inner models."""

import pytest
import torch

from heterodox.meta.problem import WeightedLoss
from heterodox.meta.training import TokenLoss, adjoint_growth, explosion
from tests.meta_training import meta_trainer, weights_of
from tests.tiny import tiny_batch, tiny_gpt


def rounds(trainer, count: int):
    """So many rounds of two steps in one window; what the last one told."""
    for _ in range(count):
        found = trainer.step()
    return found


def inner_weights(trainer, k: int = 0) -> torch.Tensor:
    return trainer.population.states[k].weights


def test_detached_weights_count_but_nothing_leads_back():
    free, detached = meta_trainer(), meta_trainer(control="detached")
    before = weights_of(detached)
    ends = [rounds(trainer, 1) for trainer in (free, detached)]
    assert torch.equal(inner_weights(detached), inner_weights(free))
    assert float(ends[1].grad_norm) == 0 < float(ends[0].grad_norm)
    rounds(detached, 2)
    assert torch.equal(weights_of(detached), before)
    assert not torch.equal(weights_of(free), before)


def trained_by_hand(twin, count: int):
    """Where so many rounds of plain training lead; and of the last step, the state before it and its batch."""
    population = twin.population
    state, problem = population.states[0], WeightedLoss(population.problem.model, population.problem.losses)
    for _ in range(2 * count):
        before, batch = state, population.train[0].next_batch()
        problem.move_to(state.weights)
        gradient, _ = problem.gradient(batch, torch.ones(4, dtype=torch.float64), 0)
        state = population.update.take(state, gradient * min(1.0, 1 / (float(gradient.norm()) + 1e-6)))
    return state, (before, batch)


def test_constant_weights_train_as_if_there_were_no_rater():
    constant, weighted = meta_trainer(control="constant"), meta_trainer()
    before = weights_of(constant)
    state, _ = trained_by_hand(meta_trainer(), 3)
    rounds(constant, 3)
    rounds(weighted, 3)
    assert torch.allclose(inner_weights(constant), state.weights, rtol=1e-10, atol=1e-14)
    assert float((inner_weights(weighted) - state.weights).abs().max()) > 1e-6
    assert torch.equal(weights_of(constant), before)


def test_shuffled_weights_are_those_of_other_examples():
    trainer = meta_trainer(control="shuffled", batch_size=8)
    first, other = (tiny_batch(batch=8, seed=seed) for seed in (1, 2))
    other.ids.add_(100)
    own = trainer.weigh_scores(trainer.rater(first.inputs))
    found = trainer._weights(first)
    assert float(own.detach().std()) > 0.1
    assert torch.equal(found.sort().values, own.sort().values)
    assert not torch.equal(found, own)
    assert found.requires_grad
    assert torch.equal(trainer._weights(first), found)  # when the step is taken again
    orders = [
        [int((weight == trainer.weigh_scores(trainer.rater(batch.inputs))).nonzero()[0]) for weight in weights]
        for batch, weights in ((first, found), (other, trainer._weights(other)))
    ]
    assert orders[0] != orders[1]
    assert float(rounds(trainer, 1).grad_norm) > 0


def test_an_auxiliary_rater_learns_what_the_inner_model_finds_easy():
    """Its gradient is that of a regression of scores on minus the losses, standardised, of the round's last batch."""
    trainer, twin = meta_trainer(control="auxiliary"), meta_trainer()
    end = rounds(trainer, 1)
    state, (first, last) = trained_by_hand(twin, 1)
    problem = twin.population.problem
    problem.move_to(first.weights)
    losses = problem.losses(problem.model, last).detach()
    wanted = -(losses - losses.mean()) / (losses - losses.mean()).square().sum().div(3).sqrt()
    regression = (twin.rater(last.inputs) - wanted).square().mean()
    by_hand = torch.cat([grad.flatten() for grad in torch.autograd.grad(regression, twin.parameters)])
    assert torch.allclose(trainer.moments[0][0], 0.1 * by_hand, rtol=1e-9, atol=1e-13)
    assert float(end.grad_norm) == pytest.approx(float(by_hand.norm()), rel=1e-9)
    assert float(by_hand.norm()) > 0.1
    assert torch.allclose(inner_weights(trainer), state.weights, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_penalty_makes_weights_less_sure(kind):
    """What it adds to the gradient leads away from the entropy of the round's last batch, by its strength."""
    free, penalised = meta_trainer(weighting={"kind": kind}), meta_trainer(weighting={"kind": kind, "entropy": 3.0})
    ends = [rounds(trainer, 1) for trainer in (free, penalised)]
    twin = meta_trainer(weighting={"kind": kind})
    _, (_, last) = trained_by_hand(twin, 1)
    entropy = twin.weigh_scores.entropy(twin.rater(last.inputs))
    by_hand = torch.cat([grad.flatten() for grad in torch.autograd.grad(-3 * entropy, twin.parameters)])
    added = penalised.moments[0][0] - free.moments[0][0]
    assert torch.allclose(added, 0.1 * by_hand, rtol=1e-9, atol=1e-13)
    assert float(by_hand.norm()) > 0.01
    assert float(entropy.detach()) < 0.999
    assert float(ends[0].grad_norm) > 1e-4


def test_a_meta_gradient_is_clipped():
    free, clipped = meta_trainer(), meta_trainer(clip=1e-4)
    norms = [float(rounds(trainer, 1).grad_norm) for trainer in (free, clipped)]
    assert norms[0] == norms[1] > 1e-3  # what is told is the norm before
    sizes = [float(trainer.moments[0][0].norm()) for trainer in (free, clipped)]
    assert sizes == pytest.approx([0.1 * norms[0], 0.1 * 1e-4], rel=1e-3)  # 1 − β₁ of it is the first moment


@pytest.mark.parametrize("ema", [0.99, 0.05])
def test_what_scores_is_the_moving_average(ema):
    trainer = meta_trainer(ema=ema)
    average = weights_of(trainer)
    for number in range(3):
        rounds(trainer, 1)
        share = min(ema, (1 + number) / (10 + number))
        average = share * average + (1 - share) * weights_of(trainer)
        assert torch.allclose(trainer.average, average, rtol=1e-12)
    now, batch = weights_of(trainer), tiny_batch()
    assert float((average - now).abs().max()) > 1e-5
    scores = trainer.scores(batch)
    assert torch.equal(weights_of(trainer), now)
    assert not torch.equal(scores, trainer.rater(batch.inputs))
    trainer._move_to(average)
    assert torch.allclose(scores, trainer.rater(batch.inputs), rtol=1e-9)


def test_lives_end_one_after_the_other():
    """Lifetime 6, rounds of 2 steps: the first life of the first member is half as long, those behind it are whole."""
    trainer = meta_trainer(population=2, lifetime=6)
    generations = []
    for _ in range(7):
        trainer.step()
        generations.append(list(trainer.population.generation))
    assert generations == [[0, 0], [0, 0], [1, 0], [1, 1], [1, 1], [2, 1], [2, 2]]


def test_fresh_ones_begin_in_every_round():
    trainer, old = meta_trainer(reset="fresh", population=2), meta_trainer(population=2)
    population = trainer.population
    for number in range(1, 4):
        trainer.step()
        assert population.generation == [number - 1, number - 1]
        assert [state.step for state in population.states.values()] == [2, 2]
    begun = []
    for number in range(3, 6):
        population.renew()
        assert population.generation == [number, number]
        assert [state.step for state in population.states.values()] == [0, 0]
        begun.append([state.weights.clone() for state in population.states.values()])
    every = [weights for pair in begun for weights in pair]
    assert all(float((a - b).abs().max()) > 0.01 for i, a in enumerate(every) for b in every[:i])
    rounds(old, 3)
    assert [state.step for state in old.population.states.values()] == [6, 6]


def test_dropout_masks_are_new_in_every_life():
    population = meta_trainer(reset="fresh", population=2, model={"dropout": 0.1}).population
    seeds = [population.seed_of(0), population.seed_of(1)]
    assert seeds == [population.seed_of(0), population.seed_of(1)]
    population.renew()
    seeds += [population.seed_of(0), population.seed_of(1)]
    assert len(set(seeds)) == 4
    assert meta_trainer().population.seed_of(0) is None


def test_the_growth_of_the_adjoint_and_when_it_is_worth_a_warning():
    assert float(adjoint_growth(torch.tensor([2.0, 3.0, 8.0, 5.0]))) == 4
    for norms in ([1.0, torch.nan], [torch.nan, 1.0], [1.0, torch.inf], [torch.inf, torch.inf]):
        assert float(adjoint_growth(torch.tensor(norms))) == torch.inf
    assert explosion(1000.0, 8, "do this").warnings == []
    assert explosion(1001.0, 8, "do this").warnings == [
        "the adjoint grew 1e+03 times along a window of 8 steps: the meta-gradient is that of a chaotic run; do this"
    ]
    assert "grew inf times" in explosion(torch.inf, 8, "").warnings[0]
    trainer = meta_trainer(inner_steps=3, backprop_steps=2)
    assert "adjoint_growth" not in trainer.step().metrics
    end = trainer.step()
    assert trainer.growth == float(end.metrics["adjoint_growth"]) > 1


def test_losses_of_another_model_are_no_gradient_of_zero():
    model, other, batch = tiny_gpt(), tiny_gpt(), tiny_batch()
    problem = WeightedLoss(model, lambda _, batch: TokenLoss().losses(other(batch.inputs), batch))
    even = torch.ones(4, dtype=torch.float64)
    for ask in (
        lambda: problem.gradient(batch, even, 0),
        lambda: problem.second_order(batch, even, 0, lambda gradient: gradient),
    ):
        with pytest.raises(AssertionError, match="do not depend on the weights"):
            ask()
