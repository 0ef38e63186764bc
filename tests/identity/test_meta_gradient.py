"""The adjoint through training against the naive unroll, finite differences and PyTorch's optimizers, in float64."""

import dataclasses

import pytest
import torch
from torch import nn

from heterodox.core.types import Batch
from heterodox.meta import InnerAdamW, InnerSGD, meta_gradient
from heterodox.meta.problem import WeightedLoss
from heterodox.objective import CrossEntropy
from tests.measured import within
from tests.tiny import tiny_batch
from tests.tiny import tiny_gpt as tiny_gpt_of
from tests.unrolled import adamw, sgd, unrolled

ADAMW = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-3, "eps_root": 1e-8, "weight_decay": 0.1}
HEAVY = {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}
UPDATES = {
    "adamw": (InnerAdamW(**ADAMW), adamw(**ADAMW)),
    "sgd": (InnerSGD(lr=0.1), sgd(lr=0.1)),
    "momentum": (InnerSGD(lr=0.1, momentum=0.8), sgd(lr=0.1, momentum=0.8)),
    "nesterov": (InnerSGD(**HEAVY), sgd(**HEAVY)),
}
STOCK = {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.1}
STEPS = 5
CLIP = 0.2  # below every gradient norm here


def tiny_gpt(**options) -> nn.Module:
    """One block."""
    return tiny_gpt_of(layers=1, **options)


class TinyRater(nn.Module):
    """One weight per example from the counts of its tokens."""

    def __init__(self, vocab: int = 11) -> None:
        super().__init__()
        self.score = nn.Linear(vocab, 1, dtype=torch.float64)
        for parameter in self.score.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))

    def scores(self, batch: Batch) -> torch.Tensor:
        counts = nn.functional.one_hot(batch.inputs, self.score.in_features).double().mean(1)
        return self.score(counts)[:, 0]

    def forward(self, batch: Batch) -> torch.Tensor:
        return torch.sigmoid(self.scores(batch))


class SoftmaxRater(TinyRater):
    def forward(self, batch: Batch) -> torch.Tensor:
        return len(batch.ids) * self.scores(batch).softmax(0)


def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    return CrossEntropy().losses(model(batch.inputs), batch)


def train_batches(count: int = STEPS) -> list[Batch]:
    return [tiny_batch(seed=seed) for seed in range(count)]


VALIDATION = [tiny_batch(batch=3, seed=100), tiny_batch(batch=3, seed=101)]


def both(update: str, rater=None, model=None, batches=None, **options):
    """The adjoint's answer and the unroll's: L_val and the derivatives in φ and in the weights."""
    inner, step = UPDATES[update]
    rater, model, batches = rater or TinyRater(), model or tiny_gpt(), batches or train_batches()
    val_loss, used, _ = unrolled(model, losses, batches, rater, VALIDATION, step, clip_norm=options.get("clip_norm"))
    grads = torch.autograd.grad(val_loss, [*rater.parameters(), *used])
    found = meta_gradient(model, losses, batches, rater, VALIDATION, inner, **options)
    return found, val_loss, grads[:2], grads[2:]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the larger entry."""
    return float((a - b).abs().max() / b.abs().max())


def assert_same(found, val_loss, grads, by_weight) -> None:
    assert abs(float(found.val_loss - val_loss.detach())) < 1e-12
    assert float(grads[0].abs().max()) > 1e-6
    assert within(distance(*(torch.cat([g.flatten() for g in each]) for each in (found.grads, grads))), 1e-10)
    assert within(max(distance(a, b) for a, b in zip(found.weight_grads, by_weight, strict=True)), 1e-10)
    assert len({float(w[0]) for w in found.weight_grads}) == len(by_weight)


@pytest.mark.parametrize("clip_norm", [None, CLIP])
@pytest.mark.parametrize(
    ("schedule", "slots", "micro_batch"),
    [("all", None, None), ("sqrt", None, 1), ("binomial", None, None), ("binomial", 1, 3)],
)
@pytest.mark.parametrize("update", UPDATES)
def test_the_adjoint_is_the_naive_unroll(update, schedule, slots, clip_norm, micro_batch):
    found = both(update, schedule=schedule, slots=slots, clip_norm=clip_norm, micro_batch=micro_batch)
    assert_same(*found)


@pytest.mark.parametrize("graphs", [0, 2, STEPS])
@pytest.mark.parametrize("schedule", ["all", "sqrt", "binomial"])
def test_with_graphs_kept_it_is_the_naive_unroll(schedule, graphs):
    """By whichever way the second derivative comes; the model ends where it would have without."""
    model, plain = tiny_gpt(), tiny_gpt()
    assert_same(*both("adamw", model=model, schedule=schedule, graphs=graphs, clip_norm=CLIP))
    both("adamw", model=plain, schedule=schedule, graphs=1, clip_norm=CLIP)
    assert torch.equal(model.head.weight, plain.head.weight)


def test_the_clip_is_active_and_matters():
    free, clipped = both("adamw"), both("adamw", clip_norm=CLIP)
    norms = unrolled(tiny_gpt(), losses, train_batches(), TinyRater(), VALIDATION, adamw(**ADAMW), clip_norm=CLIP)[2]
    assert min(norms) > CLIP
    assert distance(clipped[0].grads[0], free[0].grads[0]) > 1e-2
    between = float(sorted(norms)[STEPS // 2])  # some steps clipped, some not
    assert_same(*both("adamw", clip_norm=between))


def test_softmax_weights_too():
    assert_same(*both("adamw", SoftmaxRater(), clip_norm=0.4))
    assert_same(*both("adamw", SoftmaxRater(), schedule="binomial"))


@pytest.mark.parametrize("num_steps", [1, 2, 8, 32])
@pytest.mark.parametrize("update", ["adamw", "nesterov"])
def test_both_are_finite_differences(update, num_steps):
    """Along a random direction of φ; the best step h of the sweep, of order h⁴, reaches 1e-8."""
    inner = UPDATES[update][0]
    model, batches, rater = tiny_gpt(), train_batches(num_steps), TinyRater()
    initial = WeightedLoss(model, losses).weights()
    found, _, exact, _ = both(update, rater, batches=batches)
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(9), dtype=p.dtype) for p in exact]
    wanted = sum(float((g * d).sum()) for g, d in zip(exact, direction, strict=True))
    assert abs(wanted) > 1e-6

    def val_loss(distance: float) -> float:
        moved = TinyRater()
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(distance * d)
        problem = WeightedLoss(model, losses)
        state = inner.begin(initial)
        for number, batch in enumerate(batches):
            problem.move_to(state.weights)
            state = inner.take(state, problem.gradient(batch, moved(batch).detach(), number)[0])
        problem.move_to(state.weights)
        with torch.no_grad():
            return float(torch.stack([losses(model, batch).mean() for batch in VALIDATION]).mean())

    errors = {}
    for h in (0.1, 1e-2, 1e-3):
        slope = (8 * (val_loss(h) - val_loss(-h)) - (val_loss(2 * h) - val_loss(-2 * h))) / (12 * h)
        errors[h] = abs(slope - wanted) / abs(wanted)
    assert within(min(errors.values()), 1e-8), errors
    assert errors[0.1] > 10 * min(errors.values())
    adjoint = sum(float((g * d).sum()) for g, d in zip(found.grads, direction, strict=True))
    assert within(abs(adjoint - wanted) / abs(wanted), 1e-9)


@pytest.mark.parametrize(
    ("inner", "stock", "options"),
    [
        (InnerAdamW(lr=0.02, eps=1e-4, weight_decay=0.1), torch.optim.AdamW, STOCK),
        (InnerSGD(**HEAVY), torch.optim.SGD, HEAVY),
    ],
)
@pytest.mark.parametrize("clip_norm", [None, CLIP])
def test_with_constant_weights_it_trains_as_torch_does(inner, stock, options, clip_norm):
    model, reference = tiny_gpt(), tiny_gpt()
    optimizer = stock(reference.parameters(), **options)
    for batch in train_batches():
        optimizer.zero_grad()
        losses(reference, batch).mean().backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(reference.parameters(), clip_norm)
        optimizer.step()

    def ones(batch):
        return torch.ones(len(batch.ids), dtype=torch.float64)

    found = meta_gradient(model, losses, train_batches(), ones, VALIDATION, inner, clip_norm=clip_norm)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-13)
    assert found.grads == []
    assert found.weight_grads[0].abs().min() > 0


def test_detached_weights_have_no_gradient_and_their_attached_twins_do():
    rater = TinyRater()
    arguments = (losses, train_batches(), VALIDATION, InnerAdamW(**ADAMW))
    for weighting, expected in ((lambda b: rater(b).detach(), False), (rater, True)):
        found = meta_gradient(
            tiny_gpt(), arguments[0], arguments[1], weighting, *arguments[2:], parameters=list(rater.parameters())
        )
        assert bool(found.grads[0].abs().max() > 0) == expected


def test_a_joint_shuffle_changes_nothing_and_shuffled_weights_do():
    order = torch.tensor([2, 0, 3, 1])
    plain = both("adamw")[0]
    together = [Batch(b.inputs[order], b.targets[order], b.ids[order]) for b in train_batches()]
    shuffled = both("adamw", batches=together)[0]
    assert within(abs(float(shuffled.val_loss - plain.val_loss)), 1e-12, "absolute")
    assert within(distance(shuffled.grads[0], plain.grads[0]), 1e-10)
    for mine, other in zip(shuffled.weight_grads, plain.weight_grads, strict=True):
        assert within(distance(mine, other[order]), 1e-9)

    class Astray(TinyRater):
        def forward(self, batch):
            return super().forward(batch)[order]

    astray = both("adamw", Astray())[0]
    assert abs(float(astray.val_loss - plain.val_loss)) > 1e-6
    assert distance(astray.grads[0], plain.grads[0]) > 1e-2


def test_softmax_weights_of_identical_examples_have_no_gradient():
    """Whatever the rater says, they share the batch equally."""
    same = [Batch(b.inputs[:1].repeat(4, 1), b.targets[:1].repeat(4, 1), b.ids) for b in train_batches()]
    assert within(both_grad(SoftmaxRater(), same), 1e-14, "absolute")
    assert both_grad(SoftmaxRater(), train_batches()) > 1e-5
    assert both_grad(TinyRater(), same) > 1e-5


def both_grad(rater: nn.Module, batches: list[Batch]) -> float:
    found = meta_gradient(tiny_gpt(), losses, batches, rater, VALIDATION, InnerAdamW(**ADAMW))
    return float(found.grads[0].abs().max())


def test_frozen_parameters_and_dropout():
    """Weights that do not learn are left alone; with a seed, dropout is the same in replay as in the first pass."""
    model = tiny_gpt(frozen_embeddings=True)
    frozen = model.tok_emb.weight.clone()
    assert_same(*both("adamw", model=model))
    assert torch.equal(model.tok_emb.weight, frozen)
    found = []
    ways = [{"schedule": schedule, "micro_batch": 2} for schedule in ("all", "sqrt", "binomial")]
    for options in (*ways, {"graphs": 0}, {"graphs": 3}):
        model = tiny_gpt(dropout=0.3)
        rater, inner = TinyRater(), InnerAdamW(**ADAMW)
        state = torch.get_rng_state()
        found.append(meta_gradient(model, losses, train_batches(), rater, VALIDATION, inner, seed=5, **options))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(other.grads[0], found[0].grads[0]) for other in found[:3])
    assert within(distance(found[3].grads[0], found[4].grads[0]), 1e-12)
    assert distance(found[3].grads[0], found[0].grads[0]) > 1e-2  # other pieces, other masks
    assert distance(found[0].grads[0], both("adamw")[0].grads[0]) > 1e-2


def test_it_goes_on_from_a_state():
    """Ten steps in two halves train as ten in one, and the second half's gradient is the tail of the whole's."""
    batches, inner = train_batches(10), InnerAdamW(**ADAMW, warmup=4)
    whole = meta_gradient(tiny_gpt(), losses, batches, TinyRater(), VALIDATION, inner, clip_norm=CLIP)
    model = tiny_gpt()
    first = meta_gradient(model, losses, batches[:6], TinyRater(), VALIDATION, inner, clip_norm=CLIP)
    second = meta_gradient(
        model, losses, batches[6:], TinyRater(), VALIDATION, inner, start=first.state, clip_norm=CLIP
    )
    assert torch.equal(second.state.weights, whole.state.weights)
    assert second.state.step == 10
    for mine, other in zip(second.weight_grads, whole.weight_grads[6:], strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(second.grads[0], whole.grads[0])


def test_where_nothing_has_moved_yet_eps_root_keeps_it_finite():
    """Embeddings that no batch has touched have v = 0."""
    for eps_root in (0.0, 1e-12):
        inner = InnerAdamW(lr=0.02, eps_root=eps_root)
        found = meta_gradient(tiny_gpt(bias=False), losses, train_batches(3), TinyRater(), VALIDATION, inner)
        assert found.grads[0].isfinite().all()
        assert found.adjoint_norms.isfinite().all()


def test_a_token_that_comes_late_or_never_is_no_exception():
    """Token 10 occurs from the fourth step on, token 9 in validation only: g, m and v are exactly 0 until then."""
    batches = [
        dataclasses.replace(batch, inputs=batch.inputs.clamp(max=8 if step < 3 else 10).where(batch.inputs != 9, 0))
        for step, batch in enumerate(train_batches())
    ]
    assert not any((batch.inputs == 9).any() for batch in batches)
    assert [bool((batch.inputs == 10).any()) for batch in batches] == [False, False, False, True, True]
    assert any((batch.inputs == 9).any() for batch in VALIDATION)
    found = both("adamw", batches=batches)
    assert_same(*found)
    assert found[0].adjoint_norms.isfinite().all()
