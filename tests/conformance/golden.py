"""Four steps of every rule, update, rating, objective and learner in float64: what a refactoring must not change.

`python -m tests.conformance.golden` writes `golden.json` anew; with `--compare` it prints every figure that differs at
all from the file's, so that a change that claims to keep the bits can show it on the machine that wrote them.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from heterodox.app.recipe import Recipe
from heterodox.app.train import train
from tests.conformance.combinations import RULES, UPDATE_VARIANTS, UPDATES, recipe_of, runs
from tests.tiny import tiny_recipe
from tests.tiny_rater import rater_recipe

FILE = Path(__file__).with_name("golden.json")
RUN = {
    "precision": "float64", "budget": {"steps": 4}, "batch_size": 4, "eval_every": 2, "eval_batches": 1,
    "checkpoint_every": 4, "log_every": 1, "sampling": {"tokens": 0},
}  # fmt: skip


def recipes() -> dict[str, Recipe]:
    """The recipes by name."""
    found = {f"credit {rule}": recipe_of(rule, "adamw", run=RUN) for rule in RULES if runs(rule, "adamw")}
    for update in (*UPDATES, *UPDATE_VARIANTS):
        found[f"update {update}"] = recipe_of("backprop", update, run=RUN)
    found["rating random"] = tiny_recipe(rating={"name": "random", "keep": 0.5}, run=RUN)
    found["rating perplexity"] = tiny_recipe(rating={"name": "perplexity", "keep": 0.5}, run=RUN)
    found["objective self_distillation"] = tiny_recipe(
        objective={"name": "self_distillation", "warmup_steps": 1}, run=RUN
    )
    found["learner data_rater"] = rater_recipe(run={**RUN, "keep_checkpoints": 1})
    return found


def figures(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Losses and norms by step, held-out losses, costs, and two sums over the final weights, of one run."""
    run = train(recipe, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = [p.detach().double() for p in run.model.parameters()]
    return {
        "losses": [row["loss"] for row in rows if row["kind"] == "train"],
        "norms": [row.get("grad_norm") for row in rows if row["kind"] == "train"],
        "val": [row["val_loss"] for row in rows if row["kind"] == "eval"],
        "test": run.summary["test_loss"],
        "weights": float(sum(w.sum() for w in weights)),
        "squares": float(sum(w.square().sum() for w in weights)),
        "flops": run.summary["flops"],
        "activation_bytes": run.summary["activation_bytes"],
    }


def measure() -> dict[str, Any]:
    """Figures of every recipe by its name."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: figures(recipe, Path(folder) / str(number)) for number, (name, recipe) in enumerate(recipes().items())
        }


def main() -> None:
    found = measure()
    if "--compare" not in sys.argv:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        return
    kept = json.loads(FILE.read_text())
    for name in kept.keys() | found.keys():
        before, now = kept.get(name, {}), found.get(name, {})
        for key in before.keys() | now.keys():
            if before.get(key) != now.get(key):
                print(f"{name}: {key} was {before.get(key)}, is {now.get(key)}")  # noqa: T201


if __name__ == "__main__":
    main()
