"""docs/add-a-rule.md, taken at its word: its files as somebody's installed package, compared and checked."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from functools import wraps
from pathlib import Path

import pytest

from heterodox.api import quick_recipes
from heterodox.conformance import CHECKS, suite
from tests.command import answer_of, heterodox, launch
from tests.plugins import distribution, installed

PAGE = Path(__file__).parents[2] / "docs" / "add-a-rule.md"
SECONDS = r"│ +\d+\.\d │"
TINY = [
    "data.corpus={name: grammar, symbols: 8, order: 1, concentration: 0.2, length: 20000}", "data.tokenizer=char",
    "model.layers=2", "model.heads=2", "model.width=16", "model.context=16", "update.lr=0.01",
    "run.budget.steps=60", "run.batch_size=16", "run.warmup_steps=0", "run.eval_every=60", "run.eval_batches=4",
    "run.probe_every=30", "run.checkpoint_every=60", "run.sampling.tokens=8", "run.device=cpu", "run.threads=1",
]  # fmt: skip


def files() -> dict[str, str]:
    """What the page calls files: a name in backquotes at the end of a paragraph, and the block that follows."""
    found = re.findall(r"`([\w.]+)`(?:, complete)?:\n\n```\w+\n(.*?)```\n", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return dict(found)


def shown(command: str) -> str:
    """What the page shows below `$ command`."""
    text = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(rf"```console\n\$ {re.escape(command)}\n(.*?)```\n", text, re.DOTALL)
    return block


def trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The tutorial's package, as an installer leaves it: its module, and its entry points where they are looked for."""
    taken = files()
    assert set(taken) == {
        "partial_transport.py", "pyproject.toml", "test_partial_transport.py", "partial_transport.yaml",
    }  # fmt: skip
    project = tomllib.loads(taken["pyproject.toml"])["project"]
    folder = tmp_path_factory.mktemp("package")
    modules = {name: taken[f"{name}.py"] for name in ("partial_transport", "test_partial_transport")}
    distribution(folder, modules, project["entry-points"], name="partial_transport", version=project["version"])
    for name in ("_base", "backprop", "head_only"):
        shutil.copy(quick_recipes() / f"{name}.yaml", folder)
    (folder / "partial_transport.yaml").write_text(taken["partial_transport.yaml"])
    with installed(folder):
        yield folder


def test_its_tests_pass_and_with_them_the_conformance_checks(package):
    command = ["-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_partial_transport.py"]
    run = subprocess.run([sys.executable, *command], cwd=package, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "12 passed" in run.stdout


def test_it_is_listed_explained_and_planned(package):
    (row,) = (row for row in json.loads(heterodox("list", "--json").out) if row["name"] == "partial_transport")
    assert row["description"].startswith("Partial weight transport: only a share of the weights has a copy")
    assert row["distribution"] == "partial-transport 0.1"
    explained = json.loads(heterodox("explain", "partial_transport", "--json").out)
    assert [option["name"] for option in explained["options"]] == ["share"]
    assert explained["manifest"]["head.weight"] == "exact"
    assert explained["manifest"]["blocks.0.attn.q.weight"] == "feedback"
    assert trimmed(heterodox("explain", "partial_transport").out) == trimmed(
        shown("heterodox explain partial_transport")
    )
    planned = json.loads(heterodox("plan", package / "partial_transport.yaml", *TINY, "--json").out)
    assert planned["memory_bytes"]["rule_state"] > 0


def test_the_command_that_checks_it_answers_as_the_page_shows(package, monkeypatch):
    """But for the seconds. The checks themselves are run by the test before: here nothing is found by any."""
    quiet = {name: wraps(check)(lambda recipe, folder: None) for name, check in CHECKS.items()}
    monkeypatch.setattr(suite, "CHECKS", quiet)
    said, page = heterodox("check", "credit=partial_transport").out, shown("heterodox check credit=partial_transport")
    assert len(re.findall(SECONDS, said)) == len(CHECKS)
    assert trimmed(re.sub(SECONDS, "", said)) == trimmed(re.sub(SECONDS, "", page))


def test_what_goes_wrong_is_said_as_the_page_shows(package, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(package)])
    monkeypatch.delitem(sys.modules, "partial_transport", raising=False)
    secretive = files()["partial_transport.py"].replace("PartialTransport", "Rule").replace("def manifest", "def hide")
    broken = [
        ("partial_transport", "partial_transport:PartialTransport", "import scipi"),
        ("backprop", "mine:Rule", "class Rule: ..."),
        ("partial_transport", "partial_transport:Rule", secretive),
    ]
    lines = []
    for number, (name, value, text) in enumerate(broken):
        module = value.partition(":")[0]
        entries = {"heterodox.credit": {name: value}}
        with installed(distribution(tmp_path / str(number), {module: text}, entries, module, "0.1")):
            lines.append(heterodox("check", f"credit={name}").err)
    assert "".join(lines) in PAGE.read_text(encoding="utf-8")


def test_it_is_compared_with_backprop_and_the_floor(package, tmp_path):
    recipes = [package / f"{name}.yaml" for name in ("backprop", "head_only", "partial_transport")]
    study = launch("compare", *recipes, *TINY, "--out", tmp_path, "--jobs", 1, "--json", python=("-m", "heterodox"))
    answer = answer_of(study, timeout=900)
    assert answer.code == 0, answer
    results = json.loads(answer.out)
    table = {row["recipe"]: row for row in results["table"]}
    loss = {name: row["val_loss"]["mean"] for name, row in table.items()}
    assert loss.keys() == {"backprop", "head_only", "partial_transport"}
    assert loss["partial_transport"] < loss["head_only"]
    assert loss["partial_transport"] != loss["backprop"]
    assert results["versions"]["partial-transport"] == "0.1"
    assert "partial_transport" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_without_the_package_its_run_is_refused_by_name(package, tmp_path):
    path = package / "partial_transport.yaml"
    assert heterodox("plan", path, *TINY).code == 0
    alone = launch("plan", path, *TINY, PYTHONPATH=str(Path(__file__).parents[2] / "src"))
    answer = answer_of(alone, timeout=300)
    assert answer.code == 2
    assert "credit.name: there is no 'partial_transport'" in answer.err
