"""A study: several recipes at the same seeds on the same corpus, and what came of it."""

import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import heterodox
from heterodox.app.folder import RunFolder
from heterodox.app.recipe import Recipe, check
from heterodox.app.session import choose_device, cores
from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.core.files import PathLike, as_path, exists, read_json, write_json
from heterodox.core.shapes import RESULTS
from heterodox.data import Dataset
from heterodox.report import statistics, write_report
from heterodox.report.data import Run, read_run
from heterodox.report.page import require_page
from heterodox.study.jobs import Job, run_jobs
from heterodox.training.interrupt import Interrupt
from heterodox.training.recorder import require_tensorboard

# What results.json keeps of a run's way, so that a study without its run folders still has curves.


KEPT = ("step", "tokens", "meta_tokens", "flops", "seconds", "val_loss")


def course(run: Run) -> dict[str, Any]:
    """`evals`: each evaluation's loss and costs. `alignment`, of a probed run: parameter → mean cosine and norm ratio.

    The means are over the probes of the run's second half, the parameters those that were probed in all of these.
    """
    evals = [{key: row[key] for key in KEPT if key in row} for row in run.evals]
    half = (run.summary.get("steps") or 0) / 2
    late = [row["alignment"] for row in run.probes if row.get("alignment") and row.get("step", 0) > half]
    if not late:
        return {"evals": evals}
    common = [name for name in late[0] if all(name in probe for probe in late)]
    return {"evals": evals, "alignment": {name: _mean([probe[name] for probe in late]) for name in common}}


def _mean(probes: list[dict[str, Any]]) -> dict[str, float | None]:
    found = {}
    for measure in ("cosine", "norm_ratio"):
        values = [probe[measure] for probe in probes if probe.get(measure) is not None]
        found[measure] = round(mean(values), 4) if values else None
    return found


Watch = Callable[[Sequence[Job], float], None]


class Study:
    """The jobs of a comparison in a folder. Raises `RecipeError` for recipes that cannot be compared."""

    def __init__(self, recipes: Sequence[Recipe], out: PathLike, *, num_seeds: int, jobs: int | None = None) -> None:
        if not recipes:
            raise RecipeError("nothing to compare: give at least one recipe")
        if num_seeds < 1 or (jobs is not None and jobs < 1):
            raise RecipeError(f"a comparison needs at least one seed and one job; found {num_seeds} and {jobs}")
        names = [recipe.name for recipe in recipes]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise RecipeError(f"two recipes are called {min(twice)!r}; give each a `name` of its own")
        _require_same_windows(recipes)
        self.out = out = as_path(out)
        self.recipes = list(recipes)
        self.seeds = [recipes[0].seed + offset for offset in range(num_seeds)]
        exact = [recipe.name for recipe in recipes if recipe.credit.name == "backprop"]
        self.baseline = "backprop" if "backprop" in exact else (exact or names)[0]
        self.slots = self._slots(jobs, len(recipes) * num_seeds)
        threads = max(1, cores() // len(self.slots))
        self.jobs = [
            Job(
                _at(recipe, seed, threads),
                RunFolder(out / "runs" / recipe.name / f"seed-{seed}"),
                threads_chosen=recipe.run.threads is None,
            )
            for seed in self.seeds
            for recipe in recipes
        ]

    def _slots(self, jobs: int | None, num_runs: int) -> list[str | None]:
        """A device for each run at a time: those that the recipes name, or all if one leaves it open."""
        named = [r.run.device for r in self.recipes if choose_device(r.run.device) != "cpu"]
        if not named:
            return [None] * min(jobs or cores(), num_runs)
        devices = visible_devices()
        if all(name.startswith("cuda:") for name in named):
            devices = [devices[number] for number in sorted({int(name[5:]) for name in named})]
        return [devices[index % len(devices)] for index in range(jobs or len(devices))]

    def run(self, watch: Watch | None = None) -> dict[str, Any]:
        """Train what is not finished yet, then write `results.json` and `report.html`; returns the results.

        A run that fails is noted and the others go on. After SIGINT or SIGTERM the running ones checkpoint, the
        results hold what there is, and `interrupted` in them holds the signal's number.
        """
        if any(recipe.log.tensorboard for recipe in self.recipes):
            require_tensorboard()
        dataset = self._dataset()
        self._check_folder()
        for job in self.jobs:
            job.find(dataset.corpus_sha256)
        began = time.monotonic()
        with RunFolder(self.out).lock(), Interrupt() as interrupt:
            run_jobs(
                self.jobs,
                slots=self.slots,
                watch=lambda: watch(self.jobs, time.monotonic() - began) if watch else None,
                interrupted=lambda: interrupt.received is not None,
            )
            results = self._results(dataset.describe())
            results["interrupted"] = interrupt.received
            results["elapsed_seconds"] = self._before().get("elapsed_seconds", 0.0) + time.monotonic() - began
            write_results(self.out, results)
            if any(row["status"] != "waiting" for row in results["runs"]):
                write_report([self.out], self.out / "report.html")
        return results

    def _dataset(self) -> Dataset:
        """The one on which all recipes are. Raises `RecipeError` if they are not on the same tokens."""
        built = {recipe.data.model_dump_json(): recipe.data.build() for recipe in self.recipes}
        datasets = [built[recipe.data.model_dump_json()] for recipe in self.recipes]
        for recipe, dataset in zip(self.recipes, datasets, strict=True):
            if _tokens_of(dataset) != _tokens_of(datasets[0]):
                raise RecipeError(
                    f"{self.recipes[0].name} and {recipe.name} are not on the same tokens, so their losses cannot be "
                    "compared; give them one data section"
                )
        return datasets[0]

    def _check_folder(self) -> None:
        """Refuse to drop the results of finished runs that are not in this study, or a page that no study wrote."""
        require_page(self.out / "report.html")
        if exists(self.out / "recipe.yaml"):
            raise CheckpointError(f"{self.out} holds a run; pass another --out")
        mine = {(job.recipe.name, job.recipe.seed) for job in self.jobs}
        done = [row for row in self._before().get("runs", []) if row.get("status") in ("finished", "diverged")]
        missing = sorted((row["recipe"], row["seed"]) for row in done if (row["recipe"], row["seed"]) not in mine)
        if missing:
            name, seed = missing[0]
            raise CheckpointError(
                f"{self.out} holds a comparison with {name} at seed {seed}, which has finished and this one would "
                "leave out; add it, or pass another --out"
            )

    def _before(self) -> dict[str, Any]:
        """The results that an earlier call left, if any. Raises `CheckpointError` if they cannot be read."""
        path = self.out / "results.json"
        if not exists(path):
            return {}
        results = read_json(path, RESULTS)
        if "runs" not in results or not all({"recipe", "seed"} <= row.keys() for row in results["runs"]):
            raise CheckpointError(f"{path} holds no results of a comparison; pass another --out")
        return results

    def _results(self, corpus: dict[str, Any]) -> dict[str, Any]:
        rows = [_row(job, self.out) for job in self.jobs]
        recipes = [{"name": r.name, "description": r.description, "resolved": _portable(r)} for r in self.recipes]
        return {
            "format": 1,
            "baseline": self.baseline,
            "recipes": recipes,
            "seeds": self.seeds,
            "corpus": corpus,
            "versions": {
                "heterodox": heterodox.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                **{name: number for r in self.recipes for name, number in r.distributions().items()},
            },
            "device": choose_device(self.recipes[0].run.device),
            "jobs": len(self.slots),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["heterodox", *sys.argv[1:]]),
            "runs": rows,
            "table": statistics.table(rows, self.baseline, statistics.architectures(recipes)),
        }


def _tokens_of(dataset: Dataset) -> tuple[Any, ...]:
    """What two datasets must have in common for losses on them to be comparable."""
    described = dataset.describe()
    return (*(described[key] for key in ("sha256", "tokenizer_sha256", "tokens")), dataset.cut)


def _require_same_windows(recipes: Sequence[Recipe]) -> None:
    """Raise `RecipeError` where losses would be means over different windows of the same tokens."""
    first = _windows_of(recipes[0])
    for recipe in recipes[1:]:
        other = _windows_of(recipe)
        differing = [f"{key} {first[key]} and {other[key]}" for key in first if first[key] != other[key]]
        if differing:
            raise RecipeError(
                f"{recipes[0].name} and {recipe.name} would be evaluated on different windows, so their losses cannot "
                f"be compared: {', '.join(differing)}; give them the same"
            )


def _windows_of(recipe: Recipe) -> dict[str, int | str]:
    """What decides which windows of val and test a recipe is evaluated on, by key."""
    run = recipe.run
    windows = "all" if run.eval_batches is None else run.eval_batches * run.eval_batch_size
    return {"model.context": recipe.model.context, "run.eval_batches × run.eval_batch_size": windows}


def _at(recipe: Recipe, seed: int, threads: int) -> Recipe:
    data = recipe.dump()
    data["seed"] = seed
    if data["run"]["threads"] is None:
        data["run"]["threads"] = threads
    if data["run"]["device"].startswith("cuda:") and data["run"]["device"] != "cuda:0":
        data["run"]["device"] = "cuda"  # its process sees one device, the first
    return check(data)


def visible_devices() -> list[str]:
    """The CUDA devices of this process by the names that CUDA_VISIBLE_DEVICES has for them, a child's too."""
    listed, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    if listed is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in listed.split(",")][:count]


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without this machine's folders."""
    data = recipe.dump()
    if "path" in data["data"]["corpus"]:
        data["data"]["corpus"]["path"] = Path(data["data"]["corpus"]["path"]).name
    return data


def _row(job: Job, out: Path) -> dict[str, Any]:
    """The run's summary, or as much of one as a run without a summary has, and its evaluations."""
    summary = job.summary() if job.status in ("finished", "diverged", "interrupted") else None
    empty = dict.fromkeys(_SUMMARY_KEYS)
    row = empty | {"recipe": job.recipe.name, "credit": job.recipe.credit.name, "seed": job.recipe.seed}
    row |= summary or {"status": job.status, "message": job.message}
    row.pop("corpus", None)
    if job.folder.path.is_dir():
        row |= course(read_run(job.folder.path, [], row))
    return row | {"run": str(job.folder.path.relative_to(out))}


_SUMMARY_KEYS = (
    "steps", "tokens", "meta_tokens", "flops", "seconds", "wall_seconds", "val_loss", "val_bits_per_byte",
    "test_loss", "activation_bytes", "peak_memory_bytes", "parameters", "active_parameters", "corpus_sha256",
    "unigram_loss", "floor_loss",
)  # fmt: skip


def write_results(out: Path, results: dict[str, Any]) -> None:
    write_json(out / "results.json", results)
