"""Every part of the catalogue in a recipe, so that a new entry is tested without anyone writing a test for it."""

from itertools import product

from heterodox import catalog
from heterodox.core.errors import RecipeError
from heterodox.recipe import Recipe
from tests.tiny import tiny_recipe

LEARNING_RATES = {"sgd": 0.5, "adamw": 1e-2}


def names(slot: str) -> list[str]:
    return [catalog.part_name(part) for part in catalog.PARTS[slot]]


CREDITS = names("credit")
UPDATES = names("update")
PAIRS = list(product(CREDITS, UPDATES))


def recipe_of(credit: str, update: str, **sections) -> Recipe:
    """The tiny recipe with this rule and this update."""
    rate = {"lr": LEARNING_RATES.get(update, 1e-2)}
    return tiny_recipe(credit={"name": credit}, update={"name": update} | rate, **sections)


def runs(credit: str, update: str) -> bool:
    """Whether the pair makes sense; one that does not is refused when the recipe is read."""
    try:
        recipe_of(credit, update)
    except RecipeError:
        return False
    return True


RUNNING_PAIRS = [pair for pair in PAIRS if runs(*pair)]
