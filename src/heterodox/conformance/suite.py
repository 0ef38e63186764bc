"""What a rule must do, each as a function of a recipe and an empty folder that raises `Violation`.

The recipe is a small one, such as `tiny_recipe` gives. Checks of one signal look at the rule in float64 on the
cross-entropy, with plain SGD around it; checks of whole runs take the recipe with all its parts.
"""

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heterodox.app.plan import plan
from heterodox.app.recipe import Recipe
from heterodox.app.session import build_learner, build_model
from heterodox.app.train import train
from heterodox.conformance.tiny import ALONE, SYMBOLS, changed, one_signal, shortened, tiny_batch
from heterodox.core.comm import Solo
from heterodox.core.errors import CheckpointError, HeterodoxError, RecipeError
from heterodox.core.state import Tree, split
from heterodox.core.types import ORIGINS, Signal
from heterodox.learner.probe import exact_gradients
from heterodox.objective import CrossEntropy
from heterodox.training.checkpoint import Checkpoints
from heterodox.training.metrics import read_rows

# How a check says no.


class Violation(AssertionError):
    """A part does not do what it must."""


def require(holds: bool, problem: str) -> None:
    """Raise `Violation(problem)` unless `holds`. Not an `assert`, which `python -O` would leave out."""
    if not holds:
        raise Violation(problem)


# What runs left in their folders, compared to the bit.


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the run's last checkpoint: weights and everything that its parts remember."""
    model, state, values = Checkpoints(folder / "checkpoints").load()
    found = split({"model": model, "state": state})[0]
    return found | {"progress": torch.tensor([values["progress"][key] for key in ("step", "tokens", "flops")])}


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without the seconds that they took."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def require_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """Require that both hold the same tensors, bit for bit."""
    require(a.keys() == b.keys(), f"{what}: {sorted(a.keys() ^ b.keys())} are on one side only")
    apart = [name for name in a if not torch.equal(a[name], b[name])]
    require(not apart, f"{what}: {len(apart)} of {len(a)} tensors differ, {apart[:1]} for one")


# What a rule remembers is in its checkpoint, and a checkpoint without it is refused.


def remembers_what_it_needs(recipe: Recipe, folder: Path) -> None:
    """A rule of another seed, handed this one's state, is this one; handed nothing, it refuses."""
    one, fresh = one_signal(recipe), one_signal(recipe, seed=recipe.seed + 7)
    if not one.rule.state():
        return
    _require_draws_of_its_own(split(one.rule.state())[0], split(fresh.rule.state())[0])
    one.take()
    fresh.take(tiny_batch(4, recipe.model.context, SYMBOLS, seed=1))  # what begins alike has now seen other things
    state = one.rule.state()
    try:
        one.rule.load_state({})
    except CheckpointError as error:
        require("lacks" in str(error), f"a state without its tensors is refused, but with the words: {error}")
    else:
        raise Violation("a state without its tensors is accepted")
    fresh.rule.load_state(state)
    wanted, after = split(state)[0], split(fresh.rule.state())[0]
    apart = [name for name in wanted if name not in after or not torch.equal(after[name], wanted[name])]
    require(not apart, f"load_state did not restore {apart}")


def _require_draws_of_its_own(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Of two seeds' first states, something differs that may have been drawn.

    What begins with at most two values, as zeros, counts and unit matrices do, was not.
    """
    drawn = [name for name, tensor in one.items() if tensor.numel() > 2 and len(tensor.unique()) > 2]
    differ = not drawn or any(name not in other or not torch.equal(one[name], other[name]) for name in drawn)
    require(differ, "two seeds drew the same numbers: does it use `Streams`?")


def resume_needs_the_rules_state(recipe: Recipe, folder: Path) -> None:
    """A run whose checkpoint lacks something that the rule remembers is never resumed with fresh numbers."""
    short = shortened(recipe, 2, sampling={"tokens": 0})
    steps = train(short, folder).summary["steps"]
    checkpoints = Checkpoints(folder / "checkpoints")
    model, state, values = checkpoints.load()
    remembered = state["learner"].pop("credit", {})
    for left in _damages(remembered):
        checkpoints.save(steps, model, state | {"learner": state["learner"] | {"credit": left}}, values)
        try:
            train(short, folder, resume=True)
        except CheckpointError as error:
            require("lacks" in str(error), f"a damaged checkpoint is refused, but with the words: {error}")
        else:
            raise Violation(f"of {sorted(remembered)} the checkpoint kept {sorted(left)}, and the run went on")
    checkpoints.save(steps, model, state | {"learner": state["learner"] | {"credit": remembered}}, values)
    status = train(short, folder, resume=True).summary["status"]
    require(status == "finished", f"with the whole state the resumed run {status}")


def _damages(remembered: Tree) -> list[Tree]:
    """The state without all of it, without each group of it, and without one tensor of each group."""
    found: list[Tree] = [{}] if remembered else []
    for group, leaf in remembered.items():
        rest = {key: kept for key, kept in remembered.items() if key != group}
        found.append(rest)
        if isinstance(leaf, dict) and len(leaf) > 1:
            found.append(rest | {group: dict(list(leaf.items())[1:])})
    return found


Check = Callable[[Recipe, Path], None]


def learns_and_repeats_itself(recipe: Recipe, folder: Path) -> None:
    """120 steps beat the unigram entropy by 0.1 nats, and the same seed gives the same bits."""
    longer = changed(recipe, run={"budget": {"steps": 120}, "batch_size": 16})
    summary = train(longer, folder / "a").summary
    loss, unigram, floor = summary["val_loss"], summary["unigram_loss"], summary["floor_loss"]
    require(summary["status"] == "finished", f"the run {summary['status']}: {summary['message']}")
    require(loss < unigram - 0.1, f"after 120 steps val_loss is {loss:.3f}, the unigram entropy {unigram:.3f}")
    require(floor is None or loss > floor - 0.05, f"val_loss {loss:.3f} is below what is possible, {floor}")
    train(longer, folder / "b")
    require_same_bits(tensors(folder / "a"), tensors(folder / "b"), "two runs of one seed")


def resumes_to_the_same_bits(recipe: Recipe, folder: Path) -> None:
    """A run that was stopped and resumed equals an uninterrupted one, weights, state and metrics."""
    recipe = _with_dropout(recipe)
    train(recipe, folder / "whole")
    shutil.copytree(folder / "whole", folder / "cut")
    (folder / "cut" / "summary.json").unlink()
    checkpoints = Checkpoints(folder / "cut" / "checkpoints")
    shutil.rmtree(checkpoints.folder / checkpoints.names()[-1])
    summary = train(recipe, folder / "cut", resume=True).summary
    require(summary["steps"] == recipe.run.budget.steps, f"the resumed run ended after {summary['steps']} steps")
    require_same_bits(tensors(folder / "whole"), tensors(folder / "cut"), "a resumed run and a whole one")
    require(timeless(folder / "whole") == timeless(folder / "cut"), "the resumed run logged other metrics")


def _with_dropout(recipe: Recipe) -> Recipe:
    """Dropout draws from a random stream that must be resumed too; not every model has it."""
    try:
        return changed(recipe, model={"dropout": 0.1})
    except RecipeError:
        return recipe


def reports_its_costs(recipe: Recipe, folder: Path) -> None:
    """FLOPs are those that PyTorch counts, and tokens those of the batch."""
    one = one_signal(recipe)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        cost = one.take().cost
    counted = counter.get_total_flops()
    require(cost.flops == counted > 0, f"the rule reports {cost.flops:,} FLOPs, PyTorch counts {counted:,}")
    require(cost.tokens == one.batch.num_tokens, f"it reports {cost.tokens} tokens of {one.batch.num_tokens}")


def tells_the_truth_in_its_manifest(recipe: Recipe, folder: Path) -> None:
    """Signals called exact or backprop are the gradient, the others are not, and what is frozen gets none."""
    one = one_signal(recipe)
    manifest, names = one.manifest, {name for name, _ in one.model.named_parameters()}
    require(set(manifest) == names, f"it is wrong about the existence of {sorted(set(manifest) ^ names)}")
    grads = one.take().grads
    exact = exact_gradients(one.model, one.batch, one.weights, CrossEntropy(), Solo())
    for name, origin in manifest.items():
        require(
            origin in ORIGINS,
            f"{name}: there is no origin {origin!r}; known: {', '.join(ORIGINS)}: let `manifest` say the one that fits "
            "(docs/add-a-rule.md says what each means)",
        )
        if origin == "frozen":
            require(name not in grads, f"{name} is called frozen, but has a signal")
            continue
        require(name in grads, f"{name} is called {origin}, but has no signal")
        require(float(grads[name].norm()) > 0, f"{name} is called {origin}, but its signal is zero")
        true = torch.allclose(grads[name], exact[name], rtol=1e-9, atol=1e-12)
        claimed = origin in ("exact", "backprop")
        verdict, remedy = ("is", "call it exact or backprop") if true else ("is not", "call it what it is, or mend it")
        require(true == claimed, f"{name} is called {origin}, but {verdict} the gradient: {remedy}")


def moves_all_but_the_frozen(recipe: Recipe, folder: Path) -> None:
    """After three steps every parameter has moved but those called frozen; nobody touches `.grad`.

    Where a part refuses to run for three, after the whole run.
    """
    short = shortened(recipe, 3)
    run = train(short, folder)
    initial = build_model(short, run.model.head.out_features, "cpu").state_dict()
    manifest = build_learner(short, run.model, Solo()).manifest()
    for name, parameter in run.model.named_parameters():
        stayed = torch.equal(parameter, initial[name])
        require(stayed == (manifest[name] == "frozen"), f"{name} is {manifest[name]}, but moved: {not stayed}")
        require(parameter.grad is None, f"{name}.grad was set")


def weights_examples(recipe: Recipe, folder: Path) -> None:
    """Weight zero removes an example, and the loss is the weighted mean."""
    one = one_signal(recipe)
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    signal = one.take(weights=weights)
    mean = (signal.losses * weights).mean()
    require(torch.allclose(signal.loss, mean), f"the loss is {signal.loss:.6f}, the weighted mean {mean:.6f}")
    another = one_signal(recipe)
    another.batch.inputs[1] = (another.batch.inputs[1] + 3) % SYMBOLS
    for name, gradient in another.take(weights=weights).grads.items():
        same = torch.allclose(signal.grads[name], gradient, atol=1e-12)
        require(same, f"the signal of {name} depends on an example of weight zero")


def leaves_the_weights_to_the_update(recipe: Recipe, folder: Path) -> None:
    """The model begins with the weights that it has under every rule, and a signal does not move them."""
    one = one_signal(recipe)
    reference = build_model(changed(recipe, run={"precision": "float64"}), SYMBOLS, "cpu").state_dict()
    require_same_bits(dict(one.model.state_dict()), dict(reference), "the weights with the rule and without")
    one.take()
    require_same_bits(dict(one.model.state_dict()), dict(reference), "the weights after a signal and before")


def can_be_planned(recipe: Recipe, folder: Path) -> None:
    """`heterodox plan` traces a step of it on fake tensors, which have shapes and no numbers."""
    plan(recipe)


def keeps_its_signal_in_bfloat16(recipe: Recipe, folder: Path) -> None:
    """Its signal has a cosine of 0.99 with float32's for every parameter, or the recipe refuses bfloat16."""
    plain = changed(recipe, **ALONE, run={"precision": "float32"})
    try:
        short = changed(plain, run={"precision": "bfloat16"})
    except RecipeError:
        return
    for step, pair in enumerate(zip(_signals(plain), _signals(short), strict=True)):
        whole, rounded = (signal.grads for signal in pair)
        for name, gradient in whole.items():
            if torch.equal(gradient, rounded[name]):
                continue
            cosine = float(torch.cosine_similarity(gradient.flatten(), rounded[name].flatten(), dim=0))
            require(
                cosine >= LEAST_COSINE,
                f"the cosine of {name} in bfloat16 and in float32 is {cosine:.3f} at signal {step}: compute what is "
                "small within `with model.full_precision():` and say so in `Config.in_float32`, or refuse the "
                "precision in `Config.refusals`",
            )


LEAST_COSINE = 0.99
"""Between the signals of one parameter in bfloat16 and in float32."""


def _signals(recipe: Recipe) -> list[Signal]:
    """Two of the rule, one after the other, on the same batch and weights."""
    model = build_model(recipe, SYMBOLS, "cpu")
    learner = build_learner(recipe, model, Solo())
    batch, weights = tiny_batch(16, recipe.model.context, SYMBOLS), torch.ones(16)
    return [learner.credit.signal(model, batch, weights, CrossEntropy()) for _ in range(2)]


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        learns_and_repeats_itself,
        resumes_to_the_same_bits,
        reports_its_costs,
        tells_the_truth_in_its_manifest,
        moves_all_but_the_frozen,
        weights_examples,
        leaves_the_weights_to_the_update,
        can_be_planned,
        keeps_its_signal_in_bfloat16,
        remembers_what_it_needs,
        resume_needs_the_rules_state,
    )
}
"""Every check by name."""


# All checks of one recipe.


@dataclass(frozen=True)
class Outcome:
    """How a check went: `problem` is None where all is well; `trace` is there if the rule raised what it may not."""

    check: str
    meaning: str
    seconds: float
    problem: str | None = None
    trace: str | None = None


def run_checks(recipe: Recipe, watch: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Every check of `recipe`, each in a temporary folder of its own; `watch` hears of each as it ends."""
    outcomes = []
    for name in CHECKS:
        outcomes.append(_outcome(name, recipe))
        watch(outcomes[-1])
    return outcomes


def _outcome(name: str, recipe: Recipe) -> Outcome:
    begun, problem, trace = time.perf_counter(), None, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            CHECKS[name](recipe, Path(folder))
        except (Violation, HeterodoxError) as error:
            problem = str(error)
        except (Exception, SystemExit) as error:  # a bug in the rule
            problem, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    meaning = (CHECKS[name].__doc__ or "").split("\n")[0]
    return Outcome(name, meaning, time.perf_counter() - begun, problem, trace)
