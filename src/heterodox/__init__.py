"""Train transformer language models by learning rules other than backpropagation, and compare them fairly with it.

    import heterodox as hx

    run = hx.train("recipes/quick/direct_feedback.yaml", overrides=["run.budget.steps=200"])
    results = hx.compare(["recipes/quick"], seeds=3, out="runs/mine")

Names are imported when they are first used, so that `import heterodox` alone stays light.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heterodox.api import compare, sweep, train
    from heterodox.app.load import load_run
    from heterodox.app.recipe import Recipe, load_recipe
    from heterodox.core.errors import CheckpointError, CorpusError, HeterodoxError, RecipeError
    from heterodox.credit.direct_feedback import direct_gradients
    from heterodox.credit.feedback import feedback_linear, feedback_path
    from heterodox.credit.tape import record_layers
    from heterodox.meta import InnerAdamW, InnerSGD, meta_gradient
    from heterodox.model import LayerNorm, softmax_value
    from heterodox.report import write_report

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "core.errors",
    "CorpusError": "core.errors",
    "HeterodoxError": "core.errors",
    "InnerAdamW": "meta",
    "InnerSGD": "meta",
    "LayerNorm": "model.norms",
    "Recipe": "app.recipe",
    "RecipeError": "core.errors",
    "compare": "api",
    "direct_gradients": "credit.direct_feedback",
    "feedback_linear": "credit.feedback",
    "feedback_path": "credit.feedback",
    "load_recipe": "app.recipe",
    "load_run": "app.load",
    "meta_gradient": "meta",
    "record_layers": "credit.tape",
    "softmax_value": "model.attention",
    "sweep": "api",
    "train": "api",
    "write_report": "report",
}

__all__ = [
    "CheckpointError",
    "CorpusError",
    "HeterodoxError",
    "InnerAdamW",
    "InnerSGD",
    "LayerNorm",
    "Recipe",
    "RecipeError",
    "compare",
    "direct_gradients",
    "feedback_linear",
    "feedback_path",
    "load_recipe",
    "load_run",
    "meta_gradient",
    "record_layers",
    "softmax_value",
    "sweep",
    "train",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'heterodox' has no attribute {name!r}")
    return getattr(importlib.import_module(f"heterodox.{_HOMES[name]}"), name)
