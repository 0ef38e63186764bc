"""Is there anything for a search over masks to select by? Children of one parent, their scores, and their fates.

A sparse model is trained for a while with a fixed mask. Then, for each kind of children, parent and children take the
same further steps on the same batches, the learning rate falling to 0 in a line. After 0, 1, 5, 20, 50 and 200 of these
steps the loss of each is taken, window by window, on one set of windows of `meta` and one of `val`. That gives

- the score: a child's loss on `meta` less the parent's, at once and after a look-ahead that all of them take; beside it
  the score that Sparsae itself would give on one micro-batch, after one long step (`reach`);
- its reliability: the correlation, over children, between scores on disjoint halves of those windows;
- the fate: a child's loss on `val` less the parent's in the end, its spread over children, and the noise of that;
- whether the score foretells the fate: their correlation, over children of one kind and over the kinds' means.

    python bench/sparse_signal.py recipes/sparse/sparsae.yaml data.path=tinyshakespeare.txt
"""

import argparse
import copy
import itertools
import json
from typing import Any

import torch
from torch import Tensor

from heterodox.app.recipe import load_recipe
from heterodox.app.session import Session, open_session
from heterodox.core.comm import Solo
from heterodox.core.state import join, split
from heterodox.core.types import Batch
from heterodox.objective import CrossEntropy
from heterodox.update.sparse.sparsae import Generation, SparsaeOptions
from heterodox.update.sparse.topology import Change, Sight

LOOKS = (0, 1, 5, 20, 50, 200)
TOKENS = (256, 1024, 4096)
REACHES = (0.1, 1, 4)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "literal": ("he", {"drop": "uniform", "grow": "uniform", "scope": "global", "mutation": 0.005}),
    "uniform-drops-2": ("zero", {"drop": "uniform", "grow": "uniform", "mutation": 0.02}),
}
KINDS |= {
    f"{grow}-{share}": ("zero", {"grow": grow, "mutation": share / 100})
    for share in (2, 30)
    for grow in ("uniform", "relative", "activity")
}


class Study:
    """A trained state to which every candidate goes back."""

    def __init__(self, session: Session, windows: int) -> None:
        self.session = session
        self.update = session.learner.update
        size = session.recipe.run.eval_batch_size
        micro = self.update.topology._micro
        assert micro is not None
        self.micro = micro
        self.meta = [micro.next_batch() for _ in range(-(-windows // session.recipe.update.topology.micro_batch))]
        self.val = list(itertools.islice(iter(session.val_batches), max(1, 3 * windows // size)))
        self.place = micro.state()
        self.sight = sight_of(session)
        self.before = kept(session)

    def follow(self, steps: int) -> dict[str, Tensor]:
        """Losses by window after some further steps; then everything is as it was."""
        losses = {}
        for done in range(steps + 1):
            if done in LOOKS or done == steps:
                losses[f"meta {done}"], losses[f"val {done}"] = self.losses(self.meta), self.losses(self.val)
            if done < steps:
                self.session.learner.step(self.session.loader.next_batch(), lr_scale=1 - done / steps)
        put_back(self.session, self.before)
        return losses

    @torch.no_grad()
    def losses(self, batches: list[Batch]) -> Tensor:
        model, objective = self.session.model, CrossEntropy()
        model.eval()
        losses = torch.cat([objective.losses(model(batch.inputs), batch) for batch in batches])
        model.train()
        return losses.double()

    def generation(self, kind: str, count: int, **changes: Any) -> Generation:
        """A parent and so many children of a kind; the same children whatever is changed in how they are judged."""
        self.update.new_weights, section = KINDS[kind]
        base = self.session.recipe.update.topology.model_dump()
        fixed = {"children": count, "signal": "micro_batch", "decay": "constant"}
        fixed["reset"] = base["reset"] | {"probability": 0.0}
        choice = SparsaeOptions.model_validate(base | fixed | section | changes)
        topology = self.update.topology
        self.micro.load_state(self.place)
        return Generation(choice, self.sight, self.update.window, self.micro, topology.bounds, 0.0)

    def measure(self, kind: str, parent: dict[str, Tensor], steps: int, count: int) -> dict[str, Any]:
        """What is known of one kind of children."""
        rows = []
        judged = {reach: self.generation(kind, count, judge="look_ahead", reach=reach) for reach in REACHES}
        children = self.generation(kind, count, judge="at_once")
        for change in map(Change, children.masks[1:], children.values[1:]):
            self.update._rewire(change, self.sight, dict(self.session.model.named_parameters()))
            losses = self.follow(steps)
            rows.append({name: losses[name] - parent[name] for name in losses})
        told: dict[str, Any] = {"kind": kind}
        ways = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        fate = ways[f"val {steps}"].mean(dim=1)
        around = ways[f"val {steps}"] - ways[f"val {steps}"].mean(dim=0)
        told["fate"] = [float(fate.mean()), float(fate.std())]
        told["noise_of_fate"] = float(around.std(dim=1).mean() / around.shape[1] ** 0.5)
        for reach, generation in judged.items():
            own = torch.tensor([row["ce"] - generation.rows[0]["ce"] for row in generation.rows[1:]]).double()
            told[f"reach_{reach}"] = [float(own.mean()), float(own.std())]
            told[f"reach_{reach}_foretells"] = correlation(own, fate)
        for look in [look for look in LOOKS if look <= steps]:
            scores = ways[f"meta {look}"]
            told[f"score_{look}"] = [float(scores.mean()), float(scores.mean(dim=1).std())]
            told[f"foretells_{look}"] = correlation(scores.mean(dim=1), fate)
            told[f"reliability_{look}"] = {
                tokens: reliability(scores, tokens // self.session.model.context) for tokens in TOKENS
            }
        return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    for name, default in {"steps": 500, "children": 16, "further": 200, "windows": 132}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    fixed = ["run.device=cpu", "objective=cross_entropy", "update.topology.every=1000000", "update.topology.until=1"]
    length = ["run.budget.steps=1000000", "run.schedule=constant", "run.warmup_steps=50"]
    session = open_session(load_recipe(options.recipe, [*options.overrides, *length, *fixed]), Solo(), "cpu")
    for step in range(options.steps):
        session.learner.step(session.loader.next_batch(), lr_scale=min(1.0, (step + 1) / 50))
    study = Study(session, options.windows)
    parent = study.follow(options.further)
    print(json.dumps({"parent": {name: float(losses.mean()) for name, losses in parent.items()}}), flush=True)
    found = []
    for kind in options.kinds:
        found.append(study.measure(kind, parent, options.further, options.children))
        print(json.dumps(found[-1]), flush=True)
    fates = torch.tensor([told["fate"][0] for told in found])
    looks = [f"score_{look}" for look in LOOKS if look <= options.further] + [f"reach_{reach}" for reach in REACHES]
    over_kinds = {look: correlation(torch.tensor([told[look][0] for told in found]), fates) for look in looks}
    print(json.dumps({"foretells_over_kinds": over_kinds}))


def reliability(scores: Tensor, windows: int) -> float | None:
    """Correlation over children between scores on disjoint sets of so many windows, averaged over the pairs of sets."""
    half = scores.shape[1] // 2
    pairs = zip(scores[:, :half].split(windows, dim=1), scores[:, half:].split(windows, dim=1), strict=True)
    found = [correlation(a.mean(dim=1), b.mean(dim=1)) for a, b in pairs if a.shape[1] == b.shape[1] == windows]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's; none where one of them does not vary."""
    value = float(torch.corrcoef(torch.stack([a, b]))[0, 1]) if len(a) > 2 else float("nan")
    return value if value == value else None


def sight_of(session: Session) -> Sight:
    """What the topology would see now."""
    update, found = session.learner.update, []
    inner = update.topology.change
    update.topology.change = lambda sight: found.append(sight)
    update._event(dict(session.model.named_parameters()), 1.0)
    update.topology.change = inner
    return found[0]


def kept(session: Session) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, Any]:
    tensors, values = split(session.learner.state())
    copies = {path: tensor.clone() for path, tensor in tensors.items()}
    weights = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    return weights, copies, copy.deepcopy(values), session.loader.state()


def put_back(session: Session, before: tuple[dict[str, Tensor], dict[str, Tensor], Any, Any]) -> None:
    weights, tensors, values, place = before
    session.model.load_state_dict(weights)
    session.learner.load_state(join({path: tensor.clone() for path, tensor in tensors.items()}, copy.deepcopy(values)))
    session.loader.load_state(place)


if __name__ == "__main__":
    main()
