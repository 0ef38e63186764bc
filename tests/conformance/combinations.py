"""Every part of the catalogue in a recipe, so that a new entry is tested without anyone writing a test for it."""

from itertools import product
from typing import Any

from heterodox.app import catalog
from heterodox.app.recipe import Recipe
from heterodox.core.errors import RecipeError
from tests.tiny import tiny_recipe

LEARNING_RATES = {"sgd": 0.5, "adamw": 1e-2}

SPARSE = {"name": "sparse", "sparsity": 0.4, "burn_in": {"steps": 1}}
SPARSAE = {
    "name": "sparsae", "every": 2, "until": 1.0, "children": 2, "mutation": 0.1, "micro_batch": 8,
    "reset": {"batch": 8}, "bounds": {"min_sparsity": 0.1},
}  # fmt: skip
UPDATE_VARIANTS: dict[str, dict[str, Any]] = {
    "sparse": SPARSE | {"topology": {"name": "rigl", "every": 2, "until": 1.0}},
    "sparse static": SPARSE | {"topology": {"name": "static"}},
    "sparse magnitude": SPARSE | {"topology": {"name": "magnitude", "every": 2, "until": 1.0}},
    "sparse set": SPARSE | {"topology": {"name": "set", "every": 2, "until": 1.0}, "new_weights": "small"},
    "sparse sparsae": SPARSE | {"topology": SPARSAE | {"reset": {"batch": 8, "probability": 0.3}}},
    "sparse sparsae literal": SPARSE | {
        "topology": SPARSAE | {
            "judge": "at_once", "signal": "micro_batch", "drop": "uniform", "grow": "uniform", "scope": "global",
            "survival": "plus", "decay": "constant", "selection": "random", "margin": 0.0,
        },
        "new_weights": "he", "around": {"name": "sgd", "momentum": 0.9},
    },
}  # fmt: skip
"""Updates at other options than their defaults, and those that need some at this size."""

VARIANTS: dict[str, dict[str, Any]] = {
    "feedback_alignment orthogonal": {"name": "feedback_alignment", "feedback": "orthogonal", "feedback_std": 0.05},
    "feedback_alignment orthogonal_he": {"name": "feedback_alignment", "feedback": "orthogonal_he"},
    "feedback_alignment sparse": {"name": "feedback_alignment", "feedback": "sparse", "sparse_k": 3},
    "feedback_alignment grape": {"name": "feedback_alignment", "grape": {"probes": 4, "head": True}},
    "feedback_alignment grape jacobian": {
        "name": "feedback_alignment", "elsewhere": "backprop",
        "grape": {"cosine": "jacobian", "norm": "keep", "head": True},
    },
    "sign_symmetry fixed": {"name": "sign_symmetry", "magnitude": "fixed"},
    "sign_symmetry random": {"name": "sign_symmetry", "magnitude": "random", "elsewhere": "frozen"},
    "kolen_pollack sparse": {"name": "kolen_pollack", "feedback": "sparse"},
    "direct_feedback own": {"name": "direct_feedback", "route": "own"},
    "direct_feedback orthogonal": {"name": "direct_feedback", "feedback": "orthogonal"},
    "meta_critic sampled": {
        "name": "meta_critic", "layers_per_step": 1, "meta_every": 2, "target": "token", "density": 0.5,
        "critic": "mlp",
    },
    "meta_critic activations": {
        "name": "meta_critic", "hypothesis": "activations", "transport": "attention", "layers_per_step": 2,
    },
    "meta_critic floor": {"name": "meta_critic", "hypothesis": "activations", "floor": 3.0},
    "meta_critic shared": {"name": "meta_critic", "shared": True, "objective": "regression", "point": "output"},
    "meta_critic low_rank": {"name": "meta_critic", "structure": "low_rank", "density": 0.5, "reuse_target": True},
    "meta_critic source": {
        "name": "meta_critic", "target": "pooled", "structure": "elementwise", "density": 0.05, "critic": "mlp",
        "linear": False, "penalty": 0.0, "embeddings": "frozen", "matrices": ["mlp.proj"], "joint_every": 2,
    },
}  # fmt: skip
"""Rules at other options than their defaults."""
REMEMBERING = [
    "feedback_alignment grape", "feedback_alignment grape jacobian", "sign_symmetry random",
    "meta_critic sampled", "meta_critic floor", "meta_critic shared", "meta_critic low_rank", "meta_critic source",
]  # fmt: skip
"""Variants that keep a state of another form than the rule at its defaults does, or tell their ranks something else:
they too must resume."""


EQUILIBRIUM = {
    "name": "equilibrium", "layers": 1, "heads": 2, "width": 16, "context": 16, "mlp_ratio": 2,
    "scale": 0.5, "steps": 8, "weight_std": 0.1,
}  # fmt: skip
OWN_MODELS = {"bptt": EQUILIBRIUM, "implicit": EQUILIBRIUM, "equilibrium": EQUILIBRIUM}
"""Rules that need another model than the tiny GPT, or are at home on one."""
OWN_OPTIONS = {
    "equilibrium": {"nudged_steps": 6},
    "implicit": {"tolerance": None, "steps": 8},  # FLOPs that do not depend on who shares a batch
}


def names(slot: str) -> list[str]:
    return list(catalog.SLOTS[slot].own)


CREDITS = names("credit")
RULES = [*CREDITS, *VARIANTS]
ON_GPT = [credit for credit in CREDITS if credit not in OWN_MODELS]
"""Rules that train the GPT with any of its switches."""
UPDATES = names("update")
PAIRS = list(product(CREDITS, UPDATES))


def recipe_of(credit: str, update: str, **sections) -> Recipe:
    """The tiny recipe with this rule, or variant of one, and this update: see `sections_of`."""
    return tiny_recipe(**sections_of(credit, update, **sections))


def sections_of(credit: str, update: str, **sections) -> dict[str, Any]:
    """What the tiny recipe needs over it for this rule, or variant of one, and this update.

    On the model that the rule needs if none is named; the equilibrium model has no dropout.
    """
    changed = UPDATE_VARIANTS.get(update, {"name": update})
    inner = changed.get("around", {}).get("name", "adamw") if update in UPDATE_VARIANTS else update
    rate = {"lr": LEARNING_RATES.get(inner, 1e-2) / (5 if "around" in changed else 1)}
    if credit in OWN_MODELS and "name" not in sections.get("model", {}):
        given = {key: value for key, value in sections.pop("model", {}).items() if key != "dropout"}
        sections["model"] = OWN_MODELS[credit] | given
    rule = VARIANTS.get(credit, {"name": credit}) | OWN_OPTIONS.get(credit, {})
    return {"credit": rule, "update": changed | rate} | sections


def runs(credit: str, update: str) -> bool:
    """Whether the pair makes sense; one that does not is refused when the recipe is read."""
    try:
        recipe_of(credit, update)
    except RecipeError:
        return False
    return True


RUNNING_PAIRS = [pair for pair in PAIRS if runs(*pair)]
RESUMING_PAIRS = [
    *RUNNING_PAIRS,
    *((variant, "adamw") for variant in REMEMBERING),
    *(("backprop", variant) for variant in UPDATE_VARIANTS if variant != "sparse"),
    ("direct_feedback", "sparse sparsae"),
]
