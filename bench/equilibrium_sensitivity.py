"""How the gradient of equilibrium propagation depends on its settings: a figure for docs/rules/equilibrium.md.

    python bench/equilibrium_sensitivity.py data.path=tinyshakespeare.txt --out docs/rules/equilibrium_sensitivity.svg

Trains recipes/equilibrium/implicit.yaml for --train steps, so that the weights are not those of the beginning: the
longer, the more the force bends, and the fewer examples stand a strong nudge. Then one setting at a time leaves its
default, in float32 and in float64, on --examples windows. The error is the relative distance of the gradient
of all relaxed parameters from the exact one (converged to rounding, in float64). Other arguments are recipe overrides.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair as alt
import torch
from torch import Tensor

from heterodox.app.recipe import load_recipe
from heterodox.app.session import Session, open_session
from heterodox.core.comm import Solo
from heterodox.core.types import Batch
from heterodox.credit import Equilibrium, Implicit
from heterodox.model import Equilibrium as Model
from heterodox.objective import CrossEntropy

RECIPE = Path(__file__).parents[1] / "recipes" / "equilibrium" / "implicit.yaml"
DEFAULTS = {"beta": 0.01, "step_size": 0.5, "steps": 20, "nudged_steps": 15}
TITLES = {
    "beta": "strength of the nudge β",
    "step_size": "step size ε",
    "steps": "free steps",
    "nudged_steps": "nudged steps",
}
SWEEPS: dict[str, list[float]] = {
    "beta": [10 ** (power / 2) for power in range(-12, 3)],
    "step_size": [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "steps": [2, 4, 6, 8, 10, 12, 16, 20, 30, 40],
    "nudged_steps": [2, 4, 6, 8, 10, 12, 15, 20, 30, 40],
}
RULES = {"centred": {}, "one-sided": {"centered": False}, "plain": {"corrected": False}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--train", type=int, default=100, help="steps before the measurement")
    parser.add_argument("--examples", type=int, default=24, help="windows to measure on")
    parser.add_argument("--out", type=Path, default=Path("equilibrium_sensitivity.svg"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    session = open_session(load_recipe(RECIPE, arguments.overrides), Solo(), "cpu")
    for _ in range(arguments.train):
        session.learner.step(session.loader.next_batch())
    batch = examples(session, arguments.examples)
    rows = list(measure(session.model, batch))
    for row in rows:
        if row["setting"] == "beta" or row["value"] == DEFAULTS[row["setting"]]:
            print(f"{row['setting']:13}{row['value']:<12.3g}{row['rule']:11}{row['precision']:9}{row['error']:.2e}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    chart(rows).save(arguments.out)


def examples(session: Session, number: int) -> Batch:
    """The first windows of val: a single one that does not settle shows."""
    batch = session.val_batches[0]
    assert number <= len(batch.inputs), f"--examples {number}, but a batch of val has {len(batch.inputs)}"
    return Batch(batch.inputs[:number], batch.targets[:number], batch.ids[:number])


def measure(model: Any, batch: Batch) -> Iterator[dict[str, Any]]:
    """A row for each setting, rule and precision."""
    models = {"float64": with_steps(model, 20).double(), "float32": with_steps(model, 20).float()}
    truth = gradient(Implicit(steps=300, tolerance=1e-13), with_steps(models["float64"], 300), batch)
    for setting, values in SWEEPS.items():
        for value in values:
            options = DEFAULTS | {setting: value}
            for precision, prepared in models.items():
                relaxing = with_steps(prepared, int(options["steps"]), options["step_size"])
                for rule, given in RULES.items():
                    given = given | {"beta": options["beta"], "nudged_steps": int(options["nudged_steps"])}
                    credit = Equilibrium(**given, nudged_limit=None)
                    error = float((gradient(credit, relaxing, batch) - truth).norm() / truth.norm())
                    yield {"setting": setting, "value": value, "rule": rule, "precision": precision, "error": error}


def with_steps(model: Model, steps: int, step_size: float = 0.5) -> Model:
    relaxing = copy.deepcopy(model)
    relaxing.steps, relaxing.step_size = steps, step_size
    return relaxing


def gradient(credit: Equilibrium | Implicit, model: Model, batch: Batch) -> Tensor:
    """Of all parameters that the relaxation uses, as one vector in float64."""
    weights = torch.ones(len(batch.inputs), dtype=model.head.weight.dtype)
    grads = credit.signal(model, batch, weights, CrossEntropy()).grads
    return torch.cat([g.double().flatten() for name, g in grads.items() if name not in model.readout_names])


def chart(rows: list[dict[str, Any]]) -> alt.HConcatChart:
    """A panel per setting; the error on a logarithmic axis, a rule at the default."""
    panels = [panel(setting, [row for row in rows if row["setting"] == setting]) for setting in SWEEPS]
    return alt.hconcat(*panels).configure_view(stroke=None).configure_axis(grid=True, gridOpacity=0.4)


def panel(setting: str, rows: list[dict[str, Any]]) -> alt.LayerChart:
    shown = [row | {"error": min(max(row["error"], 1e-9), 10)} for row in rows]
    lines = alt.Chart(alt.Data(values=shown)).mark_line(point=alt.OverlayMarkDef(size=16)).encode(
        x=alt.X("value:Q", title=TITLES[setting], scale=alt.Scale(type="log" if setting == "beta" else "linear")),
        y=alt.Y("error:Q", title="relative error of the gradient", scale=alt.Scale(type="log", domain=[1e-9, 10])),
        color=alt.Color("rule:N", title=None, sort=list(RULES)),
        strokeDash=alt.StrokeDash(
                "precision:N", title=None, sort=["float64", "float32"], legend=alt.Legend(symbolType="stroke")
            ),
    )  # fmt: skip
    default = alt.Chart(alt.Data(values=[{"value": DEFAULTS[setting]}])).mark_rule(color="gray").encode(x="value:Q")
    return (default + lines).properties(width=190, height=240)


if __name__ == "__main__":
    main()
