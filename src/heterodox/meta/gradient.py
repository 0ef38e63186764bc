"""The derivative of a validation loss in what weighted the training examples, through many optimizer steps.

    θ_{t+1} = step(θ_t, clip(g_t)),   g_t = ∇ mean_i(w_ti ℓ_i(θ_t)),   w_t = weighting(batch_t; φ)
    ∂L_val(θ_T)/∂w_ti = ⟨∇ℓ_i(θ_t), λ_g⟩/n,   λ ← pull(λ),   λ_θ ← λ_θ + ∇²(mean_i w_ti ℓ_i) λ_g

An explicit adjoint instead of a graph through time. Forwards no graph is kept, only a few states as the schedule says;
backwards, states are restored, steps in between taken again, and (λ_θ, λ_m, λ_v) is carried through each step of the
optimizer with one Hessian-vector product. That product's own pass yields the derivative in each example's weight, so no
per-example gradient is formed, and what computes the weights never enters second-order differentiation: it is asked for
one ordinary backward pass per step. Memory is that of one step and of the stored states.

Reference: Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through reversible learning", ICML
2015, for the adjoint of training; Calian et al., "DataRater: Meta-learned dataset curation", 2025, for its use.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heterodox.meta.problem import Losses, Recorded, WeightedLoss, has_dropout, num_examples
from heterodox.meta.steps import Adjoint, Flat, InnerState, InnerUpdate, clip, pull_clip, why_not_finite

# Which states of a long run to keep, so that it can be walked backwards step by step in little memory.
#
# To reverse step t one needs the state before it. A schedule is a list of moves over T steps: store the current state,
# advance it by a step, turn round at the end, restore a stored state, reverse a step. What it costs is the number of
# states stored at a time and the number of steps taken again.
#
#     all        T states, no step again
#     sqrt       2√T states, almost every step once again
#     binomial   about log₂ T states, every step O(log T) times again: with s states and r repetitions C(s + r, s) steps
#                can be reversed, and no schedule can do more
#
# Reference: Griewank and Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 2000.


Schedule = Literal["all", "sqrt", "binomial"]
Move = tuple[Literal["store", "advance", "turn", "restore", "drop", "reverse"], int]
"""What to do, and at which step: `advance` t leads from the state before step t to the one behind it."""


def moves(schedule: str, num_steps: int, slots: int | None = None) -> Iterator[Move]:
    """The moves that reverse `num_steps` steps. `slots`: states that `binomial` may hold, by default ⌈log₂ T⌉ + 1.

    Raises `ValueError` for an unknown schedule, for less than one step or one slot.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"there is no schedule {schedule!r}; known: {', '.join(get_args(Schedule))}")
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps to go back through, expected at least 1")
    if slots is not None and (schedule != "binomial" or slots < 1):
        raise ValueError(f"{slots} slots for the schedule {schedule}; only binomial has them, and at least 1")
    if schedule == "binomial":
        slots = slots or math.ceil(math.log2(num_steps)) + 1
        yield "store", 0
        yield from _binomial(0, num_steps, slots - 1, last=True)
        yield "drop", 0
        return
    length = num_steps if schedule == "all" else math.ceil(math.sqrt(num_steps))
    yield from _segments(num_steps, length)


def recorded(plan: Sequence[Move], most: int) -> set[int]:
    """Which moves of `plan` are advances whose graph is to be kept for the reverse, of at most `most` graphs at a time.

    Each spares the reverse a forward pass and a gradient. Those kept for the shortest time come first.
    """
    spans, last = [], {}
    for number, (move, step) in enumerate(plan):
        if move == "advance":
            last[step] = number
        elif move == "reverse" and step in last:
            spans.append((number - last[step], last[step], number))
    chosen, alive = set(), [0] * len(plan)
    for _, start, end in sorted(spans):
        if max(alive[start:end]) < most:
            chosen.add(start)
            alive[start:end] = [count + 1 for count in alive[start:end]]
    return chosen


def _segments(num_steps: int, length: int) -> Iterator[Move]:
    """The state at the start of each segment, and every state of the segment that is being reversed."""
    starts = range(0, num_steps, length)
    for step in range(num_steps):
        if step in starts or step >= starts[-1]:
            yield "store", step
        yield "advance", step
    yield "turn", num_steps
    for start in reversed(starts):
        end = min(start + length, num_steps)
        if end < num_steps:
            yield "restore", start
            for step in range(start, end - 1):
                yield "advance", step
                yield "store", step + 1
        for step in reversed(range(start, end)):
            yield "restore", step
            yield "reverse", step
            yield "drop", step


def _binomial(start: int, end: int, slots: int, *, last: bool) -> Iterator[Move]:
    """Reverse the steps from `start`, whose state is stored and current, to `end`; `slots` more may be stored."""
    if slots == 0 or end - start == 1:
        for step in reversed(range(start, end)):
            if step < end - 1:
                yield "restore", start
            for before in range(start, step):
                yield "advance", before
            if last and step == end - 1:
                yield from _turn(step, stored=step == start)
            yield "reverse", step
        return
    middle = start + _first_part(end - start, slots)
    for step in range(start, middle):
        yield "advance", step
    yield "store", middle
    yield from _binomial(middle, end, slots - 1, last=last)
    yield "drop", middle
    yield "restore", start
    yield from _binomial(start, middle, slots, last=False)


def _turn(step: int, *, stored: bool) -> Iterator[Move]:
    """Over the last step to the end and back again."""
    if not stored:
        yield "store", step
    yield "advance", step
    yield "turn", step + 1
    yield "restore", step
    if not stored:
        yield "drop", step


def _first_part(num_steps: int, slots: int) -> int:
    """How far to go before the next state is stored; `slots` include that one."""
    repetitions = 1
    while math.comb(slots + 1 + repetitions, repetitions) < num_steps:
        repetitions += 1
    most = math.comb(slots + repetitions, slots + 1)  # steps that the first part can hold at one repetition less
    return max(1, min(most, num_steps - math.comb(slots + repetitions - 1, slots)))


Weighting = Callable[[Any], Float[Tensor, " batch"]]
"""Of a batch: one weight per example. What it depends on is up to it."""


@dataclass(frozen=True)
class MetaGradient:
    """What `meta_gradient` found.

    `grads` are the derivatives of `val_loss` in the given parameters of the weighting, in their order, and
    `weight_grads` those in the weights themselves, step by step. `losses` are the examples' in each step, `weights`
    theirs. `adjoint_norms` holds ‖λ_θ‖ on the way back: at the end, then before each step, the last step first; entry k
    is the one k steps before the end. `state` is the one behind the last step.
    """

    val_loss: Float[Tensor, ""]
    grads: list[Tensor]
    weight_grads: list[Tensor]
    losses: list[Tensor]
    weights: list[Tensor]
    adjoint_norms: Float[Tensor, " steps_and_end"]
    state: InnerState
    num_advances: int
    """Steps taken forwards, those taken again included."""


def meta_gradient(
    model: nn.Module,
    losses: Losses,
    batches: Sequence[Any],
    weighting: Weighting,
    validation: Sequence[Any],
    update: InnerUpdate,
    *,
    parameters: Sequence[Tensor] | None = None,
    start: InnerState | None = None,
    clip_norm: float | None = None,
    schedule: Schedule = "sqrt",
    slots: int | None = None,
    graphs: int = 1,
    micro_batch: int | None = None,
    seed: int | None = None,
    check: bool = True,
) -> MetaGradient:
    """∂L_val/∂φ after one training step per batch in `batches`, each on mean(weighting(batch) · losses(model, batch)).

    `losses(model, batch)` gives one loss per example, twice differentiable in the model's parameters; L_val is the mean
    of the `validation` batches' mean losses. `weighting(batch)` gives one weight per example; φ are `parameters`, by
    default those of `weighting` if it is a module. `update` is an `InnerAdamW` or `InnerSGD`, which begins at `start`
    or else afresh at the model's weights, and gradients are clipped to `clip_norm`. `schedule` says which states are
    kept (`slots`: how many, for `binomial`), `graphs` of how many steps at a time the gradient's graph is kept between
    going over them and coming back, which saves computing it again, and `micro_batch` how many examples go through the
    model at a time (no graph is then kept); none of them changes the result. A model with dropout needs a `seed`, from
    which each step has masks of its own: a step taken again is then the same step (with a `micro_batch`, each part of
    the batch is masked by itself, so other masks are drawn than without).

    Raises `FloatingPointError`, which says why, where a derivative is not finite (without `check` it is returned), and
    `ValueError` for dropout without a seed.
    The model ends with the trained weights, `state.weights`, and in the mode in which it came. Buffers are not tracked:
    a model whose forward pass changes them has no exact meta-gradient here. Autocast is off, around the
    model and in it: in bfloat16 the result is wrong by tens of percent.
    """
    if parameters is None:
        parameters = list(weighting.parameters()) if isinstance(weighting, nn.Module) else []
    if not validation:
        raise ValueError("no validation batch: there is nothing to differentiate")
    if seed is None and model.training and has_dropout(model):
        raise ValueError("the model has dropout, and without a seed a step taken again would not be the same step")
    problem = WeightedLoss(model, losses, micro_batch=micro_batch, seed=seed)
    with torch.autocast(problem.parameters[0].device.type, enabled=False):
        walk = _Walk(problem, batches, weighting, list(parameters), update, clip_norm)
        state, adjoint, stored = start or update.begin(problem.weights()), None, {}
        val_loss, end = torch.zeros(()), state
        plan = list(moves(schedule, len(batches), slots))
        keep = set() if micro_batch else recorded(plan, graphs)
        for number, (move, step) in enumerate(plan):
            match move:
                case "store":
                    stored[step] = state
                case "advance":
                    state = walk.advance(state, step, keep=number in keep)
                case "turn":
                    end = state
                    val_loss, adjoint = _validate(problem, end, validation)
                    walk.norms[0] = adjoint.weights.norm()
                case "restore":
                    state = stored[step]
                case "drop":
                    del stored[step]
                case "reverse":
                    assert adjoint is not None
                    adjoint = walk.reverse(state, step, adjoint)
    problem.move_to(end.weights)
    found = MetaGradient(
        val_loss,
        walk.grads,
        walk.weight_grads,
        walk.losses,
        walk.weights,
        walk.norms,
        end,
        walk.num_advances,
    )
    if check and (why := why_not_finite(val_loss, found.losses, found.adjoint_norms, found.grads + found.weight_grads)):
        raise FloatingPointError(why)
    return found


class _Walk:
    """Steps forwards and backwards over the batches, and what they leave.

    What is kept of each step lies in rows that are made beforehand: small tensors that stay, made between large ones
    that go, would keep the allocator from using the large ones' place again, and memory would grow with every step.
    """

    def __init__(
        self,
        problem: WeightedLoss,
        batches: Sequence[Any],
        weighting: Weighting,
        parameters: list[Tensor],
        update: InnerUpdate,
        clip_norm: float | None,
    ) -> None:
        self.problem, self.batches, self.weighting = problem, batches, weighting
        self.parameters, self.update, self.clip_norm = parameters, update, clip_norm
        like, counts = problem.parameters[0].detach(), [num_examples(batch) for batch in batches]
        self.weights, self.losses, self.weight_grads = (
            list(like.new_zeros(sum(counts)).split(counts)) for _ in range(3)
        )
        self.weighed = [False] * len(batches)
        self.norms = like.new_zeros(len(batches) + 1)
        self.grads = [torch.zeros_like(parameter) for parameter in parameters]
        self.num_advances = 0
        self.recorded: dict[int, Recorded] = {}

    def advance(self, state: InnerState, step: int, *, keep: bool) -> InnerState:
        """One training step, whose graph is kept or not. The weights of a step are computed the first time only."""
        batch = self.batches[step]
        if not self.weighed[step]:
            with torch.no_grad():
                self.weights[step].copy_(self.weighting(batch))
            self.weighed[step] = True
        self.num_advances += 1
        if keep:
            found = self.recorded[step] = self.problem.record(state.weights, batch, self.weights[step], state.step)
            gradient, losses = found.gradient(), found.losses
        else:
            self.problem.move_to(state.weights)
            gradient, losses = self.problem.gradient(batch, self.weights[step], state.step)
        self.losses[step].copy_(losses)
        return self.update.take(state, clip(gradient, self.clip_norm))

    def reverse(self, state: InnerState, step: int, adjoint: Adjoint) -> Adjoint:
        """The adjoint before the step, from that behind it; φ's share of the step is added to `grads`."""
        batch, before = self.batches[step], adjoint

        def direction_of(gradient: Flat) -> Flat:
            nonlocal before
            before, to_clipped = self.update.pull(state, clip(gradient, self.clip_norm), adjoint)
            return pull_clip(gradient, to_clipped, self.clip_norm)

        if (kept := self.recorded.pop(step, None)) is not None:
            curvature, slope = kept.second_order(direction_of(kept.gradient()))
        else:
            self.problem.move_to(state.weights)
            curvature, slope = self.problem.second_order(batch, self.weights[step], state.step, direction_of)
        self.weight_grads[step].copy_(slope)
        self._add_to_grads(batch, slope)
        weights = before.weights + curvature
        self.norms[len(self.batches) - step] = weights.norm()
        return Adjoint(weights, before.moments)

    def _add_to_grads(self, batch: Any, slope: Float[Tensor, " batch"]) -> None:
        if not self.parameters:
            return
        with torch.enable_grad():
            weights = self.weighting(batch)
        if weights.requires_grad:
            found = torch.autograd.grad(weights, self.parameters, slope, materialize_grads=True)
            torch._foreach_add_(self.grads, list(found))


def _validate(problem: WeightedLoss, state: InnerState, batches: Sequence[Any]) -> tuple[Tensor, Adjoint]:
    """L_val and its derivative in the state, which does not depend on the moments. Dropout is off."""
    problem.move_to(state.weights)
    training = problem.model.training
    problem.model.eval()
    total, gradient = torch.zeros_like(state.weights[0]), torch.zeros_like(state.weights)
    for batch in batches:
        part, losses = problem.gradient(batch, state.weights.new_ones(num_examples(batch)), 0)
        gradient += part / len(batches)
        total += losses.mean() / len(batches)
    problem.model.train(training)
    return total, Adjoint(gradient, tuple(torch.zeros_like(moment) for moment in state.moments))
