"""What updates remember: all of it comes back, or the checkpoint is refused."""

import copy

import pytest
import torch
from torch import nn

from heterodox.core.errors import CheckpointError
from heterodox.core.state import join, split
from heterodox.update import SGD, AdamW

UPDATES = {"adamw": lambda: AdamW(), "sgd": lambda: SGD(momentum=0.9)}
every_update = pytest.mark.parametrize("make", UPDATES.values(), ids=list(UPDATES))


def stepped(update, parameters=None, slope=1.0):
    """The update after a step on two parameters, and these."""
    parameters = parameters or {name: nn.Parameter(torch.ones(2, 3)) for name in ("w", "feedback:w")}
    grads = {name: torch.linspace(-1, slope, 6).reshape(2, 3) for name in parameters}
    update.apply(parameters, grads)
    return update, parameters


def through_a_file(update):
    """What a checkpoint would give back of the update's state: tensors by path, and values."""
    tensors, values = split(update.state())
    return {path: tensor.clone() for path, tensor in tensors.items()}, copy.deepcopy(values)


@every_update
def test_what_was_saved_comes_back_to_the_bit(make):
    update, parameters = stepped(make())
    again = make()
    again.load_state(join(*through_a_file(update)))
    twins = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    stepped(update, parameters, 3.0)
    stepped(again, twins, 3.0)
    assert all(torch.equal(twins[name], parameter) for name, parameter in parameters.items())
    assert split(update.state())[0].keys() == split(again.state())[0].keys()
    forgetful = {name: nn.Parameter(torch.ones(2, 3)) for name in parameters}
    stepped(make(), stepped(make(), forgetful)[1], 3.0)
    assert not torch.equal(forgetful["w"], parameters["w"]), "degenerate: what is remembered does not matter"


@every_update
def test_any_tensor_that_is_missing_is_noticed(make):
    tensors, values = through_a_file(stepped(make())[0])
    assert len(tensors) in (2, 6)
    for path in tensors:
        left = {key: tensor for key, tensor in tensors.items() if key != path}
        with pytest.raises(CheckpointError, match=f"lacks the .* of {path.split('/')[1]!r}"):
            make().load_state(join(left, values))
    feedback = {key: tensor for key, tensor in tensors.items() if "feedback:" not in key}
    for left in (feedback, {}):
        with pytest.raises(CheckpointError, match=r"lacks the .* of 'feedback:w'"):
            make().load_state(join(left, values))
    with pytest.raises(CheckpointError, match=r"lacks the .* of every parameter"):
        make().load_state({})


@every_update
def test_a_moment_of_nobody_is_noticed(make):
    state = stepped(make())[0].state()
    state["names"] = ["w"]
    with pytest.raises(CheckpointError, match=r"has unknown .* of 'feedback:w'"):
        make().load_state(state)


@every_update
def test_an_update_that_has_not_moved_anything_has_nothing_to_miss(make):
    tensors, values = through_a_file(make())
    assert not tensors
    make().load_state(join(tensors, values))


def test_without_momentum_there_is_nothing_to_remember():
    update, _ = stepped(SGD())
    assert update.state() == {}
    SGD().load_state({})
    SGD().load_state({"velocity": {}})  # as written before
