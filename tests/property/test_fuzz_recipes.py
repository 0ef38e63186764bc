"""Whatever stands in a recipe or an override: it is taken, or refused in one line, and nothing is written."""

import os
import random
import string
from pathlib import Path
from typing import Any

import pytest
import yaml

from heterodox.app.recipe import Recipe, load_recipe
from heterodox.core.errors import HeterodoxError
from tests.tiny import tiny_recipe

SCALARS: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    10**18,
    10**40,
    -(10**400),
    0.0,
    1e-300,
    1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "x",
    "1e3",
    "null",
    "ä\u0301",
    "\ud800",
    "a" * 5000,
    "../..",
    "~nobody/x",
    "/dev/zero",
    "[",
    "{a: b",
    "&a",
    "*a",
    "!!python/x",
    "backprop",
    "gpt",
    "sparse",
    "rigl",
    [],
    {},
    [[]],
    {"name": "x"},
    {"name": ["x"]},
    [1, "a", None],
    {"a": {"b": {}}},
]
TEXTS = [
    "a: [",
    "a: &x [*x]",
    "? [1]\n: 2",
    "seed: !!int x",
    "- 1",
    "\t",
    "a: b: c",
    "---\n---\n",
    "%YAML 9\n",
    "a: 'b",
    "\x00",
    "\ufeffseed: 1",
    "seed: 2020-13-45",
    "base: recipe.yaml",
    "base: [1]",
    "base: /",
    "<<: *x",
    "<<: {a: 1}",
    "seed: 1\nseed: 2",
    "seed: 0x10",
    "seed: 1_000",
    "{" * 300,
    "a: " + "[" * 3000,
    "x: 1\n" * 2000,
    "run: {budget: {steps: 1e999}}",
    "data: {splits: {train: .nan}}",
    "model: !!set {gpt}",
]


def keys(data: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(data, dict):
        return []
    return [path for key, value in data.items() for path in ((*above, key), *keys(value, (*above, key)))]


PLAIN = tiny_recipe().dump()
KEYS = [".".join(path) for path in keys(PLAIN)] + [
    "update.topology.name",
    "update.sparsity",
    "credit.grape",
    "rating.train.rounds",
    "learner.rater.view",
    "tuning",
    "tuning.searched",
    "objective.warmup_steps",
    "data.corruption",
    "data.filter.scores",
    "nothing",
    "run.nothing",
    "",
    ".",
    "a..b",
    "data.path",
    "base",
]


def mutated(dice: random.Random) -> Any:
    """The tiny recipe with one to four of its values, at any depth, replaced, dropped or renamed."""
    data = tiny_recipe().dump()
    for _ in range(dice.randrange(1, 5)):
        paths = keys(data)
        if not paths:
            break
        *folders, leaf = dice.choice(paths)
        node = data
        for folder in folders:
            node = node[folder]
        match dice.randrange(4):
            case 0:
                del node[leaf]
            case 1:
                node["".join(dice.choices(string.printable, k=dice.randrange(1, 9)))] = node.pop(leaf)
            case _:
                node[leaf] = dice.choice(SCALARS)
    return data


def overrides(dice: random.Random) -> list[str]:
    texts = [str(scalar) for scalar in SCALARS[:-8]] + TEXTS
    found = [f"{dice.choice(KEYS)}={dice.choice(texts)}" for _ in range(dice.randrange(1, 4))]
    if dice.random() < 0.2:
        found.append("".join(dice.choices(string.printable, k=dice.randrange(40))))
    return found


def attempt(dice: random.Random, folder: Path) -> str:
    """Load one input; returns what became of it."""
    file = folder / "recipe.yaml"
    given: list[str] = []
    match dice.randrange(3):
        case 0:
            text = yaml.safe_dump(mutated(dice)) if dice.random() < 0.5 else yaml.dump(mutated(dice))
            file.write_text(text, encoding="utf-8", errors="surrogatepass")
        case 1:
            file.write_text(dice.choice(TEXTS) + dice.choice(["", "\n", "\nseed: 1\n"]), encoding="utf-8")
        case _:
            file.write_text("seed: 1\n")
            given = overrides(dice)
    before = file.read_bytes()
    try:
        recipe = load_recipe(file, given)
    except HeterodoxError as error:
        what, reason = "refused", str(error)
    else:
        reason = "none"
        assert load_recipe(recipe) == recipe == Recipe.model_validate(recipe.dump())
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(file) == recipe
        file.write_bytes(before)
        what = "taken"
    assert 0 < len(reason) < 3000, given
    assert os.listdir(folder) == ["recipe.yaml"]  # noqa: PTH208 (names alone)
    return what


def fuzz(seeds: range, folder: Path) -> dict[str, int]:
    counts = {"taken": 0, "refused": 0}
    for seed in seeds:
        try:
            counts[attempt(random.Random(seed), folder)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    return counts


def test_recipes_and_overrides(tmp_path):
    counts = fuzz(range(250), tmp_path)
    assert min(counts.values()) > 10, "inputs of one kind alone try nothing"


@pytest.mark.slow
def test_a_thousand_recipes_and_overrides(tmp_path):
    counts = fuzz(range(1000, 2500), tmp_path)
    assert min(counts.values()) > 60
