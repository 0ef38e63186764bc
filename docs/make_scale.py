"""Plans every full-size recipe at its full size and writes what it would cost: python docs/make_scale.py"""

import datetime
from pathlib import Path
from typing import Any

from heterodox.api import expand
from heterodox.app.plan import plan
from heterodox.app.recipe import load_recipe
from heterodox.core import units

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
SPEEDS = {"bfloat16": 4e14, "float32": 2.7e13}
"""FLOPs per second that hours are given for: 40 % of an H100's specification (989 T dense, and 67 T)."""
PARTS = {
    "weights": ("weights",),
    "signal and update": ("signal", "update_state", "inner_models", "rater"),
    "rule and teacher": ("rule_state", "objective_state"),
    "activations": ("activations",),
    "loss's gradient": ("loss_gradient",),
    "in all": ("total",),
}
BEGIN = "<!-- written by docs/make_scale.py, to the end of the tables -->\n"
END = "<!-- end of the tables -->\n"


def main() -> None:
    plans = {path.stem: planned(path) for path in map(Path, expand([ROOT / "recipes" / "scale"]))}
    costs = ["recipe", "precision", "parameters", "not masked", "steps", "tokens", "FLOPs", "hours"]
    memory = ["recipe", *PARTS]
    text = "\n".join([
        f"Planned on {datetime.date.today()}; hours at {SPEEDS['bfloat16'] / 1e12:.0f} T FLOPs per second in bfloat16 "
        f"and {SPEEDS['float32'] / 1e12:.0f} T in float32, 40 % of the peaks of an H100.\n",
        *table(costs, [[f"`{name}`", *cost_cells(found)] for name, found in plans.items()]), "",
        *table(memory, [[f"`{name}`", *memory_cells(found)] for name, found in plans.items()]), "",
    ])  # fmt: skip
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def planned(path: Path) -> dict[str, Any]:
    """The plan of a recipe with its own vocabulary and model, but on bytes of the embedded corpus."""
    size = load_recipe(path).data.tokenizer.vocab_size
    recipe = load_recipe(path, ["data.corpus.name=stdlib", "data.tokenizer.name=byte", f"model.vocab_size={size}"])
    return plan(recipe) | {"precision": recipe.run.precision}


def cost_cells(found: dict[str, Any]) -> list[str]:
    masked = found["active_parameters"] != found["parameters"]
    return [
        found["precision"],
        units.count(found["parameters"]),
        units.count(found["active_parameters"]) if masked else "",
        f"{found['steps']:,}",
        units.count(found["tokens"] + found["meta_tokens"]),
        f"{found['flops']:.2e}",
        units.number(found["flops"] / SPEEDS[found["precision"]] / 3600, 2),
    ]


def memory_cells(found: dict[str, Any]) -> list[str]:
    sizes = found["memory_bytes"]
    return [units.size(sum(sizes.get(name, 0) for name in names)) for names in PARTS.values()]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


if __name__ == "__main__":
    main()
