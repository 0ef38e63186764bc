"""The command line: bad input is one line and exit code 2, before anything is written; answers are data if asked."""

import builtins
import json
import shutil

import pytest

from heterodox.app.folder import RunFolder
from tests.command import answer_of, heterodox, launch, recipe_file, refused


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_file(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def trained(recipe):
    """A finished run."""
    out = recipe.parent / "run"
    assert heterodox("train", recipe, "--out", out, "--quiet").code == 0
    return out


def contents(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CORPORA = [
    ("missing.txt", None, "there is no file or folder"),
    ("empty.txt", b"", "each of them empty"),
    ("blank.txt", b" \n\n ", "each of them empty"),
    ("binary.txt", bytes(range(256)), "is not text: byte 0 is NUL"),
    ("latin.txt", b"caf\xe9 " * 99, "is not UTF-8: byte 3 is 0xe9"),
    ("short.txt", b"to be or not to be " * 9, "the val split has", "context 16 needs at least 17"),
]


@pytest.mark.parametrize(("name", "content", "phrases"), [(name, content, rest) for name, content, *rest in CORPORA])
def test_a_corpus_that_cannot_be_used(name, content, phrases, recipe, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    answer = heterodox("train", recipe, "--out", tmp_path / "run", f"data.path={tmp_path / name}")
    refused(answer, *phrases)
    assert not (tmp_path / "run").exists()


REFUSED = [
    ("credit={name: direct_feedback, feedbck: 1}", "unknown key 'credit.feedbck'; did you mean 'feedback'?"),
    ("model.vocab_size=4", "model.vocab_size is 4, but the tokenizer has 8 tokens"),
    ("model.context=17000", "the train split has 17000 tokens; context 17000 needs at least 17001"),
    ("model.context=2000", "the val split has 1000 tokens; context 2000 needs at least 2001"),
    ("run.sampling.prompt=xyz", "characters of the text are not in the vocabulary of 8: 'x', 'y', 'z'"),
    ("run.sampling.prompt=''", "run.sampling.prompt is empty"),
    ("run.device=cuda", "run.device is 'cuda', but this machine has no usable CUDA device; use cpu or auto"),
    ("run.device=cuda:3", "run.device is 'cuda:3', but this machine has"),
    ("data.tokenizer={name: file, path: nowhere.json}", "cannot read the tokenizer nowhere.json"),
]


@pytest.mark.parametrize(("override", "phrase"), REFUSED)
def test_what_the_data_or_the_machine_does_not_allow(override, phrase, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(heterodox("train", recipe, "--out", tmp_path / "run", override), phrase)
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe(tmp_path):
    for command in ("train", "plan", "compare"):
        refused(heterodox(command, tmp_path / "nowhere.yaml"), "nowhere.yaml does not exist")


def test_a_folder_that_cannot_be_written(recipe):
    refused(heterodox("train", recipe, "--out", recipe / "run"), "cannot write", "Not a directory")
    refused(heterodox("train", recipe, "--out", recipe), "cannot write")
    refused(heterodox("compare", recipe, "--out", recipe / "study"), "cannot write", "Not a directory")


def test_tensorboard_without_its_package(recipe, tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    for command in ("train", "compare"):
        answer = heterodox(command, recipe, "--out", tmp_path / "out", "log.tensorboard=true")
        refused(answer, "log.tensorboard needs the tensorboard extra: pip install 'heterodox[tensorboard]'")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_already_holds_a_run(recipe, trained):
    before = contents(trained)
    refused(heterodox("train", recipe, "--out", trained), "already holds a run; pass --resume to go on")
    answer = heterodox("train", recipe, "--out", trained, "--resume", "update.lr=0.5")
    refused(answer, "holds a run of another recipe: update.lr is 0.001 there and 0.5 here")
    answer = heterodox("train", recipe, "--out", trained, "--resume", "model.width=32")
    refused(answer, "holds a run of another recipe: model.width is 16 there and 32 here")
    answer = heterodox("train", recipe, "--out", trained, "--resume", "--checkpoint", "step-00000007")
    refused(answer, "holds no 'step-00000007'; there is step-00000020, step-00000030")
    assert contents(trained) == before


def test_a_checkpoint_is_only_for_going_on(recipe, trained, tmp_path):
    for out in (trained, tmp_path / "run"):
        answer = heterodox("train", recipe, "--out", out, "--checkpoint", "step-00000020")
        refused(answer, "checkpoint 'step-00000020' is only for going on: pass --resume too")
    answer = heterodox("train", recipe, "--out", tmp_path / "run", "--resume", "--checkpoint", "step-00000020")
    refused(answer, "holds no run, so there is no checkpoint 'step-00000020'")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_which_another_process_trains(recipe, trained, tmp_path):
    before = contents(trained)
    with RunFolder(trained).lock(), RunFolder(tmp_path / "new").lock():
        answer = heterodox("train", recipe, "--out", trained, "--resume")
        refused(answer, f"another process is training in {trained}")
        refused(heterodox("train", recipe, "--out", tmp_path / "new"), "another process is training in")
    assert contents(trained) == before


@pytest.mark.parametrize("command", ["generate", "probe", "export", "report"])
def test_folders_that_are_no_run(command, recipe, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path, recipe):
        refused(heterodox(command, folder), str(folder))


def test_the_charts_of_a_run_as_files(trained, tmp_path):
    answer = heterodox("report", trained, "--figures", tmp_path / "figures", "--format", "svg", "--json")
    told = json.loads(answer.out)
    assert answer.code == 0
    assert {"final.svg", "loss_tokens.svg"} <= set(told["files"])
    assert sorted(told["files"]) == sorted(path.name for path in (tmp_path / "figures").iterdir())
    refused(
        heterodox("report", trained, "--figures", tmp_path / "none", "--format", "svg,pdf"), "svg or png, found pdf"
    )
    assert not (tmp_path / "none").exists()


def test_a_run_whose_files_are_damaged(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for text, phrase in (("a: [", "cannot read"), ("", "it holds no recipe"), ("nme: x", "unknown key 'nme'")):
        (tmp_path / "run" / "recipe.yaml").write_text(text)
        for command in ("generate", "probe", "export"):
            refused(heterodox(command, tmp_path / "run"), str(tmp_path / "run" / "recipe.yaml"), phrase)
    shutil.copy(trained / "recipe.yaml", tmp_path / "run")
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text('{"heterodox": "char", "characters": "abc"}')
    refused(heterodox("generate", tmp_path / "run", "--prompt", "a"), "weight 'tok_emb.weight' has shape (8, 16)")
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").unlink()
    refused(heterodox("generate", tmp_path / "run"), "cannot load the tokenizer")


def test_what_generate_cannot_do(trained):
    refused(heterodox("generate", trained, "--prompt", "a?b!"), "not in the vocabulary of 8: '!', '?'")
    refused(heterodox("generate", trained, "--prompt", ""), "the prompt is empty")
    refused(heterodox("generate", trained, "--prompt", "a", "--top-p", 0), "top-p is 0.0, expected above 0")
    refused(heterodox("generate", trained, "--device", "tpu"), "there is no device 'tpu'")
    refused(heterodox("generate", trained, "--checkpoint", "x"), "holds no 'x'; there is step-00000020")


def test_what_export_cannot_do(trained, recipe):
    refused(heterodox("export", trained, "--format", "onnx"), "no export format 'onnx'; known: safetensors, gpt2")
    refused(heterodox("export", trained, "--out", recipe), "already exists; give another --out")
    for form in ("safetensors", "gpt2"):
        refused(heterodox("export", trained, "--format", form, "--out", recipe / "x"), "cannot write")


def test_parts_that_do_not_exist():
    refused(heterodox("explain", "backprp"), "there is no part 'backprp'; did you mean 'backprop'?")
    refused(heterodox("explain", "nonsense"), "there is no part 'nonsense'; known: ")


def test_answers_are_data_if_asked(recipe, trained):
    parts = json.loads(heterodox("list", "--json").out)
    assert {"slot": "credit", "name": "backprop"}.items() <= next(p for p in parts if p["name"] == "backprop").items()
    explained = json.loads(heterodox("explain", "backprop", "--json").out)
    assert explained["manifest"]["head.weight"] == "exact"
    options = json.loads(heterodox("explain", "learner.data_rater", "--json").out)["options"]
    assert {"rater.width", "weighting.kind", "inner_steps"} <= {option["name"] for option in options}
    assert json.loads(heterodox("plan", recipe, "--json").out)["steps"] == 30
    text = json.loads(heterodox("generate", trained, "--prompt", "a", "--tokens", 5, "--json").out)
    assert len(text["text"]) == 5
    summary = json.loads(heterodox("train", recipe, "--out", trained, "--resume", "--json").out)
    assert summary == json.loads((trained / "summary.json").read_text())
    assert {row["parameter"] for row in json.loads(heterodox("probe", trained, "--json").out)} > {"head.weight"}


@pytest.mark.parametrize("command", [("list",), ("explain", "direct_feedback"), ("explain", "adamw")])
def test_answers_for_people(command):
    answer = heterodox(*command)
    assert answer.code == 0
    assert "direct_feedback" in answer.out or "adamw" in answer.out


def test_a_process_of_its_own_says_the_same(recipe):
    """Warnings are errors there too, and nothing but the line is said."""
    strict = ("-W", "error", "-m", "heterodox")
    bad = launch("plan", recipe, "credit={name: direct_feedback, feedbck: 1}", python=strict)
    refused(answer_of(bad), "unknown key 'credit.feedbck'; did you mean 'feedback'?")
