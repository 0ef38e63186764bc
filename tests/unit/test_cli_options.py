"""Options and arguments: what a command does not take is one line and exit code 2, and nothing is ignored."""

import json

import pytest

from tests.command import answer_of, heterodox, launch, recipe_file, refused


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_file(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def trained(recipe):
    """A finished run with a sparse file."""
    out, options = recipe.parent / "run", ("update={name: sparse, topology: {name: static}}", "run.budget.steps=2")
    assert heterodox("train", recipe, *options, "--out", out, "--quiet").code == 0
    assert heterodox("export", out, "--format", "sparse").code == 0
    return out


USAGE = [
    ("plan x.yaml --speed 0", "--speed: found '0', expected greater than or equal to 1"),
    ("plan x.yaml --speed h100", "--speed: found 'h100', expected a valid number"),
    ("compare --jobs 0", "--jobs: found '0', expected greater than or equal to 1"),
    ("compare --seeds 1.5", "--seeds: found '1.5', expected a valid integer"),
    ("probe x --batches 0", "--batches: found '0', expected greater than or equal to 1"),
    ("generate x --temperature nan", "--temperature: found 'nan', expected greater than or equal to 0"),
    ("generate x --top-p 2", "--top-p: found '2', expected less than or equal to 1"),
    ("train", "issing argument 'RECIPE'; see heterodox train --help"),
    ("train x.yaml --nosuch", "o such option: --nosuch"),
    ("train x.yaml --out", "ption '--out' requires an argument; see heterodox"),
    ("explain a b", "unexpected extra argument"),
    ("report", "issing argument 'DIR'; see heterodox report --help"),
    ("nosuch", "o such command 'nosuch'; see heterodox --help"),
    ("--nosuch", "o such option: --nosuch; see heterodox --help"),
]


@pytest.mark.parametrize(("command", "phrase"), USAGE)
def test_what_a_command_does_not_take(command, phrase):
    refused(heterodox(*command.split()), phrase)


def test_what_a_command_does_not_take_in_a_process_of_its_own():
    refused(answer_of(launch("plan", "x.yaml", "--speed", "h100")), "--speed: found 'h100'")


def test_help_and_no_arguments_at_all():
    for arguments in ((), ("--help",)):
        answer = heterodox(*arguments)
        assert (answer.code, answer.err) == (0, "")
        assert "compare" in answer.out
    answer = heterodox("plan", "--help")
    assert (answer.code, answer.err) == (0, "")
    assert "--speed" in answer.out


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("compare seeds=3", "unknown key 'seeds'; it is an option of compare: --seeds 3"),
        ("compare jobs=2 x.yaml", "unknown key 'jobs'; it is an option of compare: --jobs 2"),
        ("compare out=runs/x", "unknown key 'out'; it is an option of compare: --out runs/x"),
        ("train x.yaml quiet=true", "unknown key 'quiet'; it is an option of train: --quiet"),
        ("plan x.yaml speed=1e9", "unknown key 'speed'; it is an option of plan: --speed 1e9"),
        ("score x split=val", "unknown key 'split'; it is an option of score: --split val"),
    ],
)
def test_an_option_written_like_a_key_of_the_recipe(command, hint):
    refused(heterodox(*command.split()), hint)


def test_an_override_longer_than_a_name_may_be_is_no_file(recipe, tmp_path):
    refused(heterodox("compare", recipe, "--out", tmp_path, f"description={'x' * 5000}", "modl=1"), "'modl'")


def test_score_changes_only_the_data(trained, tmp_path):
    for override in ("update.lr=5", "credit=direct_feedback", "name=x", "database.path=x"):
        answer = heterodox(
            "score", trained, "--split", "test", "--out", tmp_path / "s", "data.tokenizer=char", override
        )
        refused(answer, f"a run is scored as it is, but for its data: found '{override}', expected data.KEY=VALUE")
    assert not (tmp_path / "s").exists()
    answer = heterodox(
        "score", trained, "--split", "test", "--out", tmp_path / "s", "data.corpus.length=10000", "--json"
    )
    assert json.loads(answer.out)["examples"] == 31  # of a test split of 500 tokens


def test_a_sparse_file_has_no_checkpoints(trained):
    file = trained / "sparse.safetensors"
    refused(heterodox("generate", file, "--checkpoint", "x"), str(file), "holds no checkpoints: leave out --checkpoint")
    assert heterodox("generate", file, "--prompt", "a", "--tokens", 2).code == 0


def test_a_report_is_a_page_or_charts(trained, tmp_path):
    charts, page = tmp_path / "charts", tmp_path / "page.html"
    refused(
        heterodox("report", trained, "--figures", charts, "--out", page), "--figures writes charts instead of --out"
    )
    refused(heterodox("report", trained, "--format", "svg", "--out", page), "name their folder with --figures")
    refused(heterodox("report", trained, "--rules", "nobody", "--out", page), "no run of nobody; there are runs of")
    refused(heterodox("report", trained, "--rules", " ,", "--out", page), "--rules names no recipe")
    refused(heterodox("report", trained, "--rules", "tiny"), "name the page with --out")
    assert not charts.exists()
    assert not page.exists()


def test_speeds_of_no_use(recipe):
    refused(heterodox("plan", recipe, "--speed", "inf"), "--speed: found inf, expected FLOPs per second, finite")


def test_a_budget_in_seconds_has_steps_where_the_speed_is_known(recipe):
    """As many as a budget of that many FLOPs, counted from the cost of each step."""
    seconds = ("plan", recipe, "run.budget={seconds: 10}")
    planned = json.loads(heterodox(*seconds, "--speed", "1e9", "--json").out)
    same = json.loads(heterodox("plan", recipe, "run.budget={flops: 1e10}", "--speed", "1e9", "--json").out)
    assert planned == same | {"seconds": 10.0}
    assert planned["steps"] == -(-(10**10) // planned["per_step"]["flops"]) > 100
    assert planned["hours"] * 3600 == pytest.approx(10, rel=0.02)


def test_a_budget_in_seconds_says_what_its_steps_depend_on(recipe, monkeypatch):
    monkeypatch.setattr("heterodox.app.plan.HORIZON", 10)
    answer = heterodox("plan", recipe, "run.budget={seconds: 10}")
    assert answer.code == 0
    assert "as many as the machine does in 10 s; --speed would tell" in answer.out
    rows = [line.split("│")[1:3] for line in answer.out.splitlines() if line.startswith("│")]
    assert all(cell.strip() for row in rows for cell in row)
