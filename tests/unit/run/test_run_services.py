"""What a part that asks for them is handed."""

import pytest
import torch

from heterodox.app.session import build_learner, build_model, open_session
from heterodox.core.comm import Solo
from heterodox.core.rng import Streams
from heterodox.core.services import Connected, Services, no_supply
from heterodox.rating import Uniform
from tests.tiny import tiny_recipe


class Asking(Uniform):
    """A rating that keeps what it is handed."""

    services: Services

    def connect(self, services):
        self.services = services


@pytest.fixture
def asking(monkeypatch):
    part = Asking()
    monkeypatch.setattr(Uniform.Config, "build", lambda self: part)
    return part


def test_a_part_is_connected_before_the_run_begins(asking):
    recipe = tiny_recipe()
    session = open_session(recipe, Solo(), "cpu")
    assert not isinstance(Uniform(), Connected)
    services = asking.services
    assert services.model is session.model
    assert services.comm is session.comm
    assert services.steps == recipe.run.budget.steps
    assert services.streams.derive("rule") == session.streams.derive("rule")


def test_batches_of_ones_own_come_in_an_order_of_their_own(asking):
    session = open_session(tiny_recipe(), Solo(), "cpu")
    supply, size = asking.services.supply, session.recipe.run.batch_size
    mine, again, other = supply("train", size, "mine"), supply("train", size, "mine"), supply("train", size, "other")
    first = mine.next_batch()
    assert torch.equal(first.ids, again.next_batch().ids)
    assert not torch.equal(first.ids, other.next_batch().ids)
    assert not torch.equal(first.ids, session.loader.next_batch().ids)
    assert not torch.equal(supply("meta", 2, "mine").next_batch().inputs, first.inputs[:2])
    state = mine.state()
    after = mine.next_batch()
    again.load_state(state)
    assert torch.equal(again.next_batch().ids, after.ids)


def test_without_a_corpus_asking_for_batches_says_so(asking):
    recipe = tiny_recipe()
    build_learner(recipe, build_model(recipe, 11, "cpu"), Solo())
    assert asking.services.supply is no_supply
    with pytest.raises(LookupError, match="meta split"):
        asking.services.supply("meta", 4, "")
    assert asking.services.streams.derive("rule") == Streams(recipe.seed).derive("rule")
