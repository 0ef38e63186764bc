"""Topologies pass the checks whose runs are too short for their schedules, ours and those of other distributions."""

import json
from textwrap import dedent

import pytest

from heterodox.conformance import CHECKS, suite
from tests.command import heterodox, refused
from tests.plugins import distribution, installed

MINE = dedent('''\
    """SET under another name."""

    from typing import Literal

    from heterodox.update.sparse import SET
    from heterodox.update.sparse.methods import ExchangeOptions


    class Mine(SET):
        class Config(ExchangeOptions):
            name: Literal["mine"] = "mine"

            def build(self):
                return Mine(self)
''')
SHORT = ("moves_all_but_the_frozen", "resume_needs_the_rules_state")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    entries = {"heterodox.topology": {"mine": "my_topologies:Mine"}}
    with installed(distribution(tmp_path_factory.mktemp("mine"), {"my_topologies": MINE}, entries)):
        yield


@pytest.mark.parametrize("topology", ["mine", "set", "magnitude", "sparsae"])
def test_a_topology_passes_the_checks_that_are_shorter_than_its_schedule(mine, topology, monkeypatch):
    monkeypatch.setattr(suite, "CHECKS", {name: CHECKS[name] for name in SHORT})
    search = ["update.topology.micro_batch=4", "update.topology.reset.batch=4"] if topology == "sparsae" else []
    sparse = ["update.name=sparse", f"update.topology={topology}", "update.topology.every=6", *search]
    answer = heterodox("check", *sparse, "credit=kolen_pollack", "--json")
    assert {outcome["check"]: outcome["problem"] for outcome in json.loads(answer.out)} == dict.fromkeys(SHORT)
    assert answer.code == 0


def test_a_mask_that_would_never_change_is_refused_before_the_checks(mine):
    refused(heterodox("check", "update.name=sparse", "update.topology=mine"), "update.topology.every is 100, but")
