"""Parts of other distributions: found by name, imported when needed, refused with a reason that names the place."""

import json
import sys
from textwrap import dedent

import pytest

from heterodox.app import catalog
from heterodox.app.recipe import check, load_recipe
from heterodox.app.train import train
from heterodox.core.errors import RecipeError
from heterodox.data.tokenizers import parse
from tests.command import heterodox, recipe_file, refused
from tests.plugins import distribution, installed
from tests.tiny import CORPUS, tiny_recipe

HALF = dedent('''\
    """Half of the gradient."""

    from typing import Literal

    from heterodox.core import config
    from heterodox.credit import Backprop


    class Half(Backprop):
        class Config(config.Config):
            name: Literal["half"] = "half"
            size: float = 0.5

            def build(self, model, streams):
                return Half(self.size)

        def __init__(self, size):
            self.size = size

        def signal(self, *given):
            signal = super().signal(*given)
            signal.grads = {name: self.size * grad for name, grad in signal.grads.items()}
            return signal


    class Mute:
        class Config(Half.Config):
            name: Literal["mute"] = "mute"

        def manifest(self, model):
            return {}


    class Nameless:
        class Config(config.Config):
            pass


    NOBODY = 3
''')
OTHERS = dedent('''\
    """A corpus of one letter, a tokenizer of one token, and a topology that never changes."""

    import hashlib
    import json
    from typing import Literal

    import numpy as np

    from heterodox.core import config
    from heterodox.data.corpora import Corpus, Document
    from heterodox.data.tokenizers import Tokenizer
    from heterodox.update.sparse.topology import Topology


    class Letters(Corpus):
        class Config(config.Config):
            name: Literal["letters"] = "letters"
            letters: str = "ab"

            def build(self):
                return Letters(self.letters)

        title = "letters"

        def __init__(self, letters):
            self.letters = letters

        def documents(self):
            yield Document("0", self.letters * 4000)


    class Vowels(Tokenizer):
        class Config(config.Config):
            name: Literal["vowels"] = "vowels"

            def identity(self):
                return "vowels 1"

            def build(self, texts):
                return Vowels()

        vocab_size = 2

        def encode(self, text):
            return np.array([letter in "aeiou" for letter in text], dtype=np.int64)

        def decode(self, ids):
            return "".join("ba"[int(i)] for i in ids)

        def dumps(self):
            return json.dumps({"heterodox": "vowels"})

        @classmethod
        def parse(cls, text):
            return cls()


    class Asleep(Topology):
        class Config(config.Config):
            name: Literal["asleep"] = "asleep"

            def build(self):
                return Asleep()

        def change(self, sight):
            return None
''')
CREDITS = {
    "half": "acme:Half",
    "mute": "acme:Mute",
    "nobody": "acme:NOBODY",
    "nameless": "acme:Nameless",
    "other": "acme:Half",
    "absent": "acme:Absent",
    "broken": "acme_broken:Rule",
}


@pytest.fixture
def acme(tmp_path):
    modules = {"acme": HALF, "acme_broken": "import no_such_module\n"}
    with installed(distribution(tmp_path / "acme", modules, {"heterodox.credit": CREDITS})):
        yield


def test_a_part_is_imported_when_a_recipe_names_it_and_not_before(acme):
    assert check({"credit": "head_only"}).credit.name == "head_only"
    assert "half" in catalog.SLOTS["credit"].names
    assert "acme" not in sys.modules
    recipe = load_recipe(tiny_recipe(), ["credit=half", "credit.size=0.25"])
    assert "acme" in sys.modules
    assert recipe.credit.size == 0.25
    assert load_recipe(recipe.dump()) == recipe
    assert recipe.dump()["credit"] == {"name": "half", "size": 0.25}
    assert recipe.distributions() == {"acme-rules": "1.2"}
    assert tiny_recipe().distributions() == {}
    assert load_recipe(recipe, ["credit=backprop"]).credit == catalog.Backprop.Config()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("credit.sise=1", "unknown key 'credit.sise'; did you mean 'size'?"),
        ("credit.size=much", "credit.size: found 'much', expected a valid number"),
        ("credit.name=halv", "credit.name: there is no 'halv'; did you mean 'half'?"),
        ("credit.name=zzz", "; known: absent, backprop, "),
    ],
)
def test_mistakes_in_its_section_are_told_as_in_ours(acme, override, line):
    with pytest.raises(RecipeError) as error:
        load_recipe({"credit": "half"}, [override])
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("broken", "credit 'broken' is declared as acme_broken:Rule of acme-rules 1.2, which cannot be imported: "
         "ModuleNotFoundError: No module named 'no_such_module'"),
        ("absent", "which cannot be imported: AttributeError: module 'acme' has no attribute 'Absent'"),
        ("nobody", "acme:NOBODY of acme-rules 1.2, which is not a part: it is a int, expected a class"),
        ("mute", "which is not a part: it has no signal, state, load_state, which Credit asks for"),
        ("nameless", "which is not a part: its Config says no `name: Literal['nameless'] = 'nameless'`"),
        ("other", "which is not a part: its Config says no `name: Literal['other'] = 'other'`"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_whoever_names_it_alone(acme, name, line, tmp_path):
    assert heterodox("plan", recipe_file(tmp_path)).code == 0
    refused(heterodox("plan", recipe_file(tmp_path), f"credit={name}"), line)
    refused(heterodox("explain", name), line)
    rows = {row["name"]: row for row in json.loads(heterodox("list", "--json").out)}
    assert rows[name]["description"].startswith("cannot be used: credit")
    assert line in rows[name]["description"]
    assert rows["half"] == {
        "slot": "credit", "name": "half", "description": "Half of the gradient.", "distribution": "acme-rules 1.2",
    }  # fmt: skip
    assert rows["adamw"]["distribution"] == "heterodox"


def test_a_name_that_is_taken_is_refused_with_both_places(tmp_path, acme):
    taken = {
        "heterodox.credit": {"backprop": "acme2:Rule", "half": "acme2:Half"},
        "heterodox.tokenizer": {"byte": "x:y"},
    }
    path = recipe_file(tmp_path)
    with installed(distribution(tmp_path / "acme2", {"acme2": ""}, taken, name="acme2")):
        for credit, first in (
            ("half", "acme:Half of acme-rules 1.2"),
            ("backprop", "heterodox.credit.backprop:Backprop of heterodox itself"),
        ):
            answer = heterodox("plan", path, f"credit={credit}")
            refused(answer, f"credit '{credit}' is there twice: ", first, "of acme2 1.2", "uninstall one of them")
        with pytest.raises(RecipeError, match="credit 'backprop' is there twice"):
            check({})  # by default, too
        assert "is there twice" in heterodox("list").out
        assert heterodox("explain", "adamw").code == 0
    assert heterodox("plan", path, "credit=half").code == 0


def test_a_group_that_is_no_slot_is_listed(tmp_path):
    with installed(distribution(tmp_path / "acme", {}, {"heterodox.credits": {"half": "acme:Half"}})):
        rows = json.loads(heterodox("list", "--json").out)
    (row,) = (row for row in rows if row["slot"] == "credits")
    assert row["name"] == "half"
    assert row["description"].startswith("cannot be used: there is no slot 'credits'; did you mean 'credit'?")


def test_corpora_tokenizers_and_topologies_come_from_outside_too(tmp_path):
    entries = {
        "heterodox.corpus": {"letters": "acme_others:Letters"},
        "heterodox.tokenizer": {"vowels": "acme_others:Vowels"},
        "heterodox.topology": {"asleep": "acme_others:Asleep"},
    }
    sparse = {"name": "sparse", "topology": "asleep"}
    with installed(distribution(tmp_path / "acme", {"acme_others": OTHERS}, entries)):
        recipe = tiny_recipe(data={"corpus": {"name": "letters"}, "tokenizer": "vowels"}, update=sparse)
        run = train(recipe, tmp_path / "run")
        assert run.summary["status"] == "finished"
        assert run.summary["val_loss"] < 0.5 < run.summary["unigram_loss"]
        assert recipe.distributions() == {"acme-rules": "1.2"}
        assert set(heterodox("generate", tmp_path / "run", "--prompt", "a", "--tokens", 9).out.strip()) == {"a", "b"}
        moved = load_recipe(recipe, ["data.path=text.txt"])
        assert moved.data.corpus == check({"data": {"path": "text.txt"}}).data.corpus
    with pytest.raises(ValueError, match="no tokenizer that is known here"):
        parse('{"heterodox": "vowels"}')
    assert tiny_recipe().data.corpus.name == CORPUS["name"]
