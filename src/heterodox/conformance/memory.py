"""What a rule remembers is in its checkpoint, and a checkpoint without it is refused."""

from pathlib import Path

import torch
from torch import Tensor

from heterodox.conformance.one_signal import SYMBOLS, one_signal, shortened
from heterodox.conformance.tiny import tiny_batch
from heterodox.conformance.violation import Violation, require
from heterodox.core.errors import CheckpointError
from heterodox.core.state import Tree, split
from heterodox.recipe import Recipe
from heterodox.run.checkpoint import Checkpoints
from heterodox.run.train import train


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
