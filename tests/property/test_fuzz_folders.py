"""Folders that were damaged in any way are named in one line, and nothing in them is lost.

Each input is a copy of a real folder (a run, a comparison, a sweep) with one to three damages, and one command. The
command may succeed or raise a `HeterodoxError`; after a refusal the folder is what it was.
"""

import copy
import hashlib
import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from heterodox.app.export import export_run, read_sparse
from heterodox.app.folder import open_run
from heterodox.app.train import train
from heterodox.app.use import generate_run, probe_run, score_run
from heterodox.core.errors import HeterodoxError
from heterodox.report import write_markdown, write_report
from heterodox.study.study import Study
from heterodox.study.sweep import Sweep
from heterodox.training.metrics import last_rows
from tests.tiny import tiny_recipe

SECONDS = 60
"""An input that takes longer is taken to be endless."""
RUN = {"budget": {"steps": 3}, "eval_every": 1, "checkpoint_every": 1, "probe_every": 1, "log_every": 1}
SEARCHED = {"name": "sparsae", "every": 2, "children": 2, "micro_batch": 8, "mutation": 0.1}
SPARSE = {"name": "sparse", "lr": 0.01, "sparsity": 0.5, "burn_in": {"steps": 1}, "topology": SEARCHED}
LONG = RUN | {"budget": {"steps": 6}, "eval_every": 2, "checkpoint_every": 2, "probe_every": 2}
RECIPES = [tiny_recipe(name=name, credit=name, run=RUN) for name in ("backprop", "head_only")]
SEARCH = {"update.lr": [1e-3, 1e-2]}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """A run with masks, a comparison and a sweep, made once."""
    root = tmp_path_factory.mktemp("originals")
    train(tiny_recipe(update=SPARSE, run=LONG), root / "run")
    (root / "run" / "scores.json").write_text(
        json.dumps({"edges": [0.0, 0.5, 1.0], "counts": {"clean": [3, 4], "mask": [4, 3]}, "auc": {"mask": 0.5}})
    )
    export_run(root / "run", "sparse", root / "run" / "model.sparse")
    Study(RECIPES, root / "study", num_seeds=1).run()
    Sweep(RECIPES[:1], SEARCH, root / "sweep").run()
    return {name: root / name for name in ("run", "study", "sweep")}


def resume(run: Path, out: Path) -> None:
    train(tiny_recipe(update=SPARSE, run=LONG | {"budget": {"steps": 7}}), run, resume=True)


def compare(study: Path, out: Path) -> None:
    Study(RECIPES, study, num_seeds=1).run()


def sweep(folder: Path, out: Path) -> None:
    Sweep(RECIPES[:1], SEARCH, folder).run()


def look(study: Path, out: Path) -> None:
    for path in study.glob("runs/*/seed-*/metrics.jsonl"):
        if path.exists():
            last_rows(path)


COMMANDS: dict[str, list[Callable[[Path, Path], Any]]] = {
    "run": [
        resume,
        lambda run, out: generate_run(run, "a", 3),
        lambda run, out: generate_run(run / "model.sparse", "a", 3),
        lambda run, out: read_sparse(run / "model.sparse"),
        lambda run, out: probe_run(run),
        lambda run, out: export_run(run, "safetensors", out / "weights"),
        lambda run, out: export_run(run, "gpt2", out / "gpt2"),
        lambda run, out: export_run(run, "sparse", out / "sparse"),
        lambda run, out: score_run(run, out / "scores.parquet", split="val"),
        lambda run, out: write_report([run], out / "report.html"),
        lambda run, out: write_markdown([run], out / "report.md"),
        lambda run, out: open_run(run),
    ],
    "study": [
        compare,
        look,
        lambda study, out: write_report([study], out / "report.html"),
        lambda study, out: write_markdown([study], out / "report.md"),
    ],
    "sweep": [sweep, lambda sweep, out: write_report([sweep], out / "report.html")],
}
VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 1e99, 1e308, 2**63, 2**70, 10**90, 10**400, float("nan"), float("inf"), "", "x", "\ud800",
    "../../etc", "a" * 5000, "\x1b[31m", [], {}, [[]], [None], {"a": {}}, {"": 0}, ["x"], [1], {"step": []},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a value, the whole too."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value: Any, draw: random.Random) -> Any:
    """The value with one inner value of another kind, or gone, or under another name."""
    value = copy.deepcopy(value)
    path = draw.choice(list(places(value)))
    if not path:
        return draw.choice(VALUES)
    node = value
    for key in path[:-1]:
        node = node[key]
    what = draw.random()
    if what < 0.2:
        del node[path[-1]]
    elif what < 0.3 and isinstance(node, dict):
        node[draw.choice(["", "x", "é", "a.b"])] = node.pop(path[-1])
    else:
        node[path[-1]] = draw.choice(VALUES)
    return value


def change_text(path: Path, draw: random.Random) -> None:
    """Change one value of a JSON, JSONL or YAML file; the checksums of a checkpoint fit afterwards."""
    text = path.read_text()
    if path.name == "state.json":
        body = json.dumps(changed(json.loads(text.partition("\n")[2]), draw))
        path.write_text(json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body)
    elif path.suffix in (".json", ".jsonl"):
        whole = path.suffix == ".json"
        parts = [text] if whole else text.splitlines()
        index = draw.randrange(len(parts))
        parts[index] = json.dumps(changed(json.loads(parts[index]), draw))
        path.write_text("\n".join(parts) + "\n" * (not whole))
    elif path.suffix == ".yaml":
        value = changed(yaml.safe_load(text), draw)
        path.write_text(yaml.safe_dump(json.loads(json.dumps(value).replace("\\ud800", "?"))))
    elif path.suffix == ".safetensors" and "checkpoints" in path.parts:
        change_tensors(path, draw)


def change_tensors(path: Path, draw: random.Random) -> None:
    """Another shape, kind, name or number of the tensors of a checkpoint, whose checksums fit."""
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    others = [
        {}, {name: tensor.flatten()[:1]}, {name: tensor.to(torch.float64)}, {name: tensor.bool()},
        {name: torch.full_like(tensor.float(), float("nan"))}, {name + "/x": tensor}, {"x": tensor}, {"/": tensor},
    ]  # fmt: skip
    del tensors[name]
    save_file(tensors | draw.choice(others), path)
    state = path.with_name("state.json")
    document = json.loads(state.read_text().partition("\n")[2])
    document["sha256"][path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
    body = json.dumps(document)
    state.write_text(json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n" + body)


def change_bytes(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    cut = draw.randrange(len(content) + 1)
    bombs = "\n".join(["l0: &l0 [1, 1]", *(f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}]" for n in range(1, 60))])
    texts: list[bytes] = [
        b"", b"{", b"null", b"[]", b"7", b"\0" * 64, bytes(range(256)), b"[" * 100_000, b'{"a": ' + b"9" * 9999 + b"}",
        b'\xff\xfe{\0}\0', b'{"step": 1}\n', bombs.encode(), b"&a [*a]",
    ]  # fmt: skip
    path.write_bytes(draw.choice([content[:cut], content + content, content[:cut] + b"\xff" + content[cut:], *texts]))


def change_file(path: Path, draw: random.Random) -> None:
    """Something else in the file's place."""
    path.unlink()
    what = draw.choice(["nothing", "folder", "loop", "dangling", "device", "pipe", "huge", "secret"])
    if what == "folder":
        path.mkdir()
    elif what in ("loop", "dangling", "device"):
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "device": "/dev/zero"}[what])
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "huge":
        path.touch()
        os.truncate(path, 1 << 31)
    elif what == "secret":
        path.touch()
        path.chmod(0)


def change_folder(folder: Path, draw: random.Random) -> None:
    """A folder that is gone, or a file in its place."""
    shutil.rmtree(folder)
    if draw.random() < 0.5:
        folder.write_text("x")


def damage(folder: Path, draw: random.Random) -> str:
    """Damage a file or folder in `folder`; returns what was done."""
    paths = sorted(path for path in folder.rglob("*") if path.name not in (".lock", "events", "log.txt"))
    files = [path for path in paths if path.is_file() and not path.is_symlink() and path.stat().st_size]
    small = [path for path in files if path.stat().st_size < 1 << 20]
    texts = [path for path in small if path.suffix in (".json", ".jsonl", ".yaml", ".safetensors")]
    folders = [path for path in paths if path.is_dir() and not path.is_symlink()]
    kind = draw.choices([change_text, change_bytes, change_file, change_folder], [10, 3, 3, 0.5])[0]
    among = {change_text: texts, change_bytes: small, change_file: files, change_folder: folders}[kind]
    if not among:
        return "nothing"
    path = draw.choice(among)
    try:
        kind(path, draw)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):  # damaged before
        return "nothing"
    return f"{kind.__name__} {path.relative_to(folder)}"


def contents(folder: Path) -> dict[str, Any]:
    """What lies in a folder; of a large file its size."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        small = stat.S_ISREG(about.st_mode) and about.st_size < 1 << 24
        found[str(path.relative_to(folder))] = (stat.S_IFMT(about.st_mode), path.read_bytes() if small else None)
    return {name: content for name, content in found.items() if Path(name).name not in (".lock", ".cache")}


def run_input(seed: int, originals: dict[str, Path], root: Path) -> str | None:
    """Damage a folder as `seed` says and use it. Returns the refusal, if any; fails with the input on a traceback."""
    draw = random.Random(seed)
    name = draw.choices(list(COMMANDS), [6, 3, 1])[0]
    command = draw.choice(COMMANDS[name])
    folder, out = root / f"{name}-{seed}", root / f"out-{seed}"
    shutil.copytree(originals[name], folder)
    out.mkdir()
    done = [damage(folder, draw) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
    what = f"seed {seed}: {command.__code__.co_names} after {', '.join(done)}"
    before = contents(folder) if os.getuid() == 0 else None
    signal.alarm(SECONDS)
    refusal: HeterodoxError | None = None
    try:
        command(folder, out)
    except HeterodoxError as error:
        refusal = error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        after, written = contents(folder) if os.getuid() == 0 else None, list(out.iterdir())
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    if refusal is None:
        return None
    assert "\n" not in str(refusal).strip(), f"{what}: {refusal}"
    assert len(str(refusal)) < 3000, f"{what}: {refusal}"
    assert after == before, f"{what}: something was lost at {refusal}"
    assert not written, f"{what}: something was written at {refusal}"
    return str(refusal)


@pytest.fixture
def hasty(monkeypatch) -> Iterator[None]:
    """Comparisons train nothing, and what takes too long fails."""
    monkeypatch.setattr("heterodox.study.study.run_jobs", lambda jobs, **_: None)

    def too_long(*_: Any) -> None:
        raise TimeoutError("endless")

    previous = signal.signal(signal.SIGALRM, too_long)
    yield
    signal.signal(signal.SIGALRM, previous)


def run_inputs(seeds: range, originals: dict[str, Path], root: Path) -> None:
    found: dict[str, str] = {}
    refused = 0
    for seed in seeds:
        try:
            refused += run_input(seed, originals, root) is not None
        except AssertionError as error:
            found.setdefault(str(error).partition(": ")[2][-160:], str(error))
    assert not found, f"{len(found)} faults:\n" + "\n".join(found.values())
    assert len(seeds) // 4 < refused < len(seeds)


def test_damaged_folders(originals, hasty, tmp_path):
    run_inputs(range(50), originals, tmp_path)


FOUND = (1073, 1254, 1514, 1753)
"""Seeds that once ended in a traceback, a loss or an endless message."""


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_found_stays_mended(seed, originals, hasty, tmp_path):
    assert run_input(seed, originals, tmp_path)


@pytest.mark.slow
def test_many_damaged_folders(originals, hasty, tmp_path):
    run_inputs(range(2000, 3000), originals, tmp_path)
