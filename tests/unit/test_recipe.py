"""Reading recipes: shorthand, bases, overrides, and one clear line for whatever is wrong with one."""

import re
from pathlib import Path

import pytest

from heterodox.api import expand
from heterodox.app.recipe import check, load_recipe, merge, read
from heterodox.core.errors import RecipeError
from tests.tiny import tiny_recipe

# What a user may get wrong on the command line, and what the answer must hold.
MISTAKES = [
    ("credit.feedbck=1", "unknown key 'credit.feedbck'", "known: name"),
    ("credit={name: direct_feedback, feedbck: 1}", "unknown key 'credit.feedbck'", "did you mean 'feedback'?"),
    ("credit={name: direct_feedback, grape: {}}", "unknown key 'credit.grape'; known: elsewhere, feedback, "),
    ("model.residual_top_k=true", "model: residual_top_k is true, expected a number"),
    ("update.lr=false", "update: lr is false, expected a number"),
    ("rnu.eval_every=3", "unknown key 'rnu'", "did you mean 'run'?"),
    ("run.budgt.steps=3", "unknown key 'run.budgt'", "did you mean 'budget'?"),
    ("run.budget.stepz=3", "unknown key 'run.budget.stepz'", "did you mean 'steps'?"),
    ("run.sampling.temprature=1", "unknown key 'run.sampling.temprature'", "did you mean 'temperature'?"),
    ("data.corpus.symbls=3", "unknown key 'data.corpus.symbls'", "did you mean 'symbols'?"),
    ("lr=1e-3", "unknown key 'lr'", "did you mean 'update.lr'?"),
    ("batch_size=4", "unknown key 'batch_size'", "did you mean 'run.batch_size'?"),
    ("5=4", "unknown key '5'", "known: credit, data, "),
    ("update.lr=fast", "update.lr: found 'fast', expected a valid number"),
    ("update.lr=-1", "update.lr: found -1, expected greater than 0"),
    ("update.lr=.inf", "update.lr: found inf, expected a finite number"),
    ("seed=1.5", "seed: found 1.5, expected a valid integer"),
    ("run=5", "run: found 5, expected keys with values"),
    ("credit=", "credit: found None, expected keys with values"),
    ("seed.x=1", "seed: found {'x': 1}, expected a valid integer"),
    ("run.device=tpu", "run.device: found 'tpu', expected something like ^(auto|cpu|cuda"),
    ("name=a/b", "name: found 'a/b', expected something like"),
    ("run.precision=float16", "run.precision: found 'float16', expected 'float32', 'bfloat16' or 'float64'"),
    ("log.tensorboard=maybe", "log.tensorboard: found 'maybe', expected a valid boolean"),
    ("seed=" + 200 * "[x]", "the value is not YAML"),
    ("data.corpus.symbols=" + 200 * "x", "data.corpus.symbols: found 'xxx", "…, expected a valid integer"),
    ("credit=direct_feedbck", "credit.name: there is no 'direct_feedbck'; did you mean 'direct_feedback'?"),
    ("credit=qqq", "credit.name: there is no 'qqq'; known: backprop, "),
    ("update.name=adam", "update.name: there is no 'adam'; did you mean 'adamw'?"),
    ("data.corpus=gramar", "data.corpus.name: there is no 'gramar'; did you mean 'grammar'?"),
    ("data.tokenizer.name=chr", "data.tokenizer.name: there is no 'chr'; did you mean 'char'?"),
    ("model.heads=3", "model: 3 heads do not divide a width of 16"),
    ("model.mlp_top_k=65", "model: mlp_top_k is 65, above the MLP's hidden width of 64"),
    ("model.residual_top_k=17", "model: residual_top_k is 17, above the width of 16"),
    ("model.subspace_rank=17", "model: subspace_rank is 17, above the width of 16"),
    ("model.mlp_top_k=0", "model.mlp_top_k: found 0, expected greater than or equal to 1"),
    ("model.vq_codes=1", "model.vq_codes: found 1, expected greater than or equal to 2"),
    ("model.sigmoid_bias=zero", "model: sigmoid_bias is zero, but attention is softmax; make it sigmoid"),
    ("model.straight_through_sigmoid=true", "straight_through_sigmoid is on, but attention is softmax"),
    ("model={attention: sigmoid, softmax_backward: fused}", "softmax_backward is fused, but attention is sigmoid"),
    ("model={softmax_backward: centred, dropout: 0.1}", "not the gradient under dropout, which is 0.1; use fused"),
    ("model.norm_backward=none", "expected 'exact', 'straight_through', 'center_scale' or 'projected'"),
    ("run.warmup_steps=30", "run: warmup_steps 30 leave nothing of a budget of 30 steps"),
    ("run.budget={steps: 3, tokens: 5}", "run.budget: give exactly one of steps, tokens, flops, seconds; found"),
    ("run.budget={}", "run.budget: give exactly one of steps, tokens, flops, seconds; found none"),
    ("update={name: sgd, nesterov: true}", "update: nesterov needs a momentum above 0"),
    ("data.splits.train=0.5", "data.splits: the splits add up to 0.65"),
    ("lr", "override 'lr' is not of the form KEY=VALUE"),
    ("=3", "override '=3' is not of the form KEY=VALUE"),
    ("update.lr=[", "override 'update.lr=[': the value is not YAML"),
    ("description.x=2020-99-99", "override 'description.x=2020-99-99': the value is not YAML"),
]

FILES = [
    ("a: [1,\nb: {", "is not YAML: expected the node content, but found", "in line 2"),
    ("run:\n\tseed: 1", "is not YAML", "found character '\\t'"),
    ("seed: 1\nmodel: {}\nseed: 2\n", "is not YAML: 'seed' is there twice in line 3"),
    ("model: {layers: 1, layers: 2}\n", "'layers' is there twice"),
    ("description: 2020-99-99\n", "is not YAML: month must be in 1..12"),
    ("- 1\n", "holds a list, expected a mapping of sections"),
    ("", "holds nothing, expected a mapping of sections"),
    ("1: 2\n", "unknown key '1', expected a word"),
    ("model: {1: 2}\n", "unknown key 'model.1'"),
    ("base: nowhere.yaml\n", "names the base 'nowhere.yaml', and there is no such file"),
    ("base: [1]\n", "names the base '[1]'"),
    ("base: recipe.yaml\n", "is its own base"),
    (bytes(range(256)), "cannot be read: it is not UTF-8 text"),
]


@pytest.mark.parametrize(("override", "phrases"), [(mistake, phrases) for mistake, *phrases in MISTAKES])
def test_a_mistaken_override_is_one_line(override, phrases):
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_recipe(), [override])
    assert "\n" not in str(caught.value)
    for phrase in phrases:
        assert phrase in str(caught.value)


@pytest.mark.parametrize(("content", "phrases"), [(content, phrases) for content, *phrases in FILES])
def test_a_mistaken_file_is_one_line(content, phrases, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    for phrase in phrases:
        assert phrase in str(caught.value)


CONFLICTS = [
    (
        ["model.frozen_embeddings=true", "credit={name: head_only, embeddings: backprop}"],
        "model.frozen_embeddings is true",
    ),
    (["credit=direct_feedback", "model.dropout=0.1", "run.compile=true"], "model.dropout is 0.1"),
]


@pytest.mark.parametrize(("overrides", "phrase"), CONFLICTS)
def test_parts_that_do_not_fit_together_are_refused_and_alone_are_not(overrides, phrase):
    with pytest.raises(RecipeError, match=re.escape(phrase)):
        load_recipe(tiny_recipe(), overrides)
    for left_out in overrides:
        load_recipe(tiny_recipe(), [override for override in overrides if override != left_out])


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="is not a file"):
        load_recipe(tmp_path)


def test_the_first_problem_is_told_and_the_others_counted():
    with pytest.raises(RecipeError, match=r"model.layers: found 'x'.* \(and 1 more problem\)"):
        load_recipe(tiny_recipe(), ["model.layers=x", "run.batch_size=y"])


def test_names_alone_stand_for_sections_and_sections_for_default_parts():
    recipe = check({"credit": "direct_feedback", "update": {"lr": 0.5}, "data": {"tokenizer": "char"}})
    assert recipe.credit.name == "direct_feedback"
    assert recipe.update.name == "adamw"
    assert recipe.update.lr == 0.5
    assert recipe.data.tokenizer.name == "char"
    assert check({"data": {"corpus": "grammar"}}) == check({"data": {"corpus": {"name": "grammar"}}})


def test_a_resolved_recipe_resolves_to_itself(tmp_path):
    recipe = tiny_recipe(credit="feedback_alignment", run={"budget": {"tokens": 99}})
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert check(recipe.dump()) == recipe


def test_the_file_names_the_recipe_that_does_not_name_itself(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"


def test_numbers_with_an_exponent_are_numbers():
    assert load_recipe({}, ["update.lr=3e-4"]).update.lr == 3e-4
    assert load_recipe({}, ["run.budget.flops=1e12"]).run.budget.flops == 1e12


def test_naming_another_part_starts_it_afresh():
    recipe = tiny_recipe(update={"name": "adamw", "beta1": 0.5})
    assert load_recipe(recipe, ["update.name=sgd"]).update.lr == 0.1
    assert load_recipe(recipe, ["update.name=adamw"]).update.beta1 == 0.5
    assert load_recipe(recipe, ["run.budget.tokens=5"]).run.budget.unit == "tokens"


def test_the_order_of_overrides_does_not_matter_but_for_one_key():
    given = ["credit.feedback_std=0.5", "credit.name=direct_feedback", "run.budget.tokens=7", "run.budget={steps: 1}"]
    forth, back = (load_recipe(tiny_recipe(), order) for order in (given, given[::-1]))
    assert forth == back
    assert forth.credit.feedback_std == 0.5
    assert forth.run.budget.tokens == 7
    assert load_recipe(tiny_recipe(), ["seed=1", "seed=2"]).seed == 2


def test_a_base_lies_below(tmp_path):
    (tmp_path / "_base.yaml").write_text("model: {layers: 1, width: 8}\nrun: {budget: {steps: 9}}\ncredit: backprop\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "top.yaml").write_text(
        "base: ../_base.yaml\nmodel: {layers: 2}\nrun: {budget: {tokens: 5}}\ncredit: {name: direct_feedback}\n"
    )
    recipe = load_recipe(tmp_path / "sub" / "top.yaml")
    assert (recipe.model.layers, recipe.model.width) == (2, 8)
    assert recipe.run.budget.unit == "tokens"
    assert recipe.credit.name == "direct_feedback"


def test_what_is_laid_over_is_not_swallowed():
    """A section that is no section must reach the check, not vanish into the base."""
    assert merge({"run": {"batch_size": 1}}, {"run": 5}) == {"run": 5}
    assert merge({"tuning": {"trials": 1}}, {"tuning": None}) == {"tuning": None}
    assert merge({"credit": "x"}, {"credit": {"a": 1}}) == {"credit": {"name": "x", "a": 1}}
    assert merge({"credit": {"name": "x", "a": 1}}, {"credit": "x"}) == {"credit": {"name": "x", "a": 1}}
    assert merge({"credit": {"name": "x", "a": 1}}, {"credit": "y"}) == {"credit": {"name": "y"}}


def test_every_recipe_of_the_project_is_valid():
    found = [path for path in Path("recipes").rglob("*.yaml") if not path.name.startswith("_")]
    assert len(found) >= 4
    names = []
    for path in found:
        data = read(path)
        data.setdefault("name", path.stem)
        names.append(f"{path.parent}/{check(data).name}")
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "path",
    [
        "Book #1.txt",
        "1984",
        "2024-01-01",
        "yes",
        "1e3",
        "[draft] x.txt",
        "@at.txt",
        "- dash.txt",
        "Moby Dick: or.txt",
        "'",
    ],
)
def test_a_path_is_taken_as_it_stands(path):
    assert load_recipe(tiny_recipe(), [f"data.path={path}"]).data.corpus.path == Path(path)
    assert load_recipe(tiny_recipe(), [f"run.sampling.prompt={path}"]).run.sampling.prompt == path


def test_text_in_quotes_and_null_are_what_yaml_says():
    assert load_recipe(tiny_recipe(), ["run.sampling.prompt='a: b'"]).run.sampling.prompt == "a: b"
    assert load_recipe(tiny_recipe(), ["run.sampling.prompt=null"]).run.sampling.prompt is None


NAMES = {"my recipe": "my-recipe", "größe test": "grosse-test", "a+b": "a-b", "日本": "recipe"}


@pytest.mark.parametrize(("file", "name"), NAMES.items())
def test_a_recipe_file_of_any_name_gives_a_legal_name(file, name, tmp_path):
    (tmp_path / f"{file}.yaml").write_text("seed: 1\n")
    assert load_recipe(tmp_path / f"{file}.yaml").name == name


def test_a_later_corpus_wins_over_the_path_of_a_recipe(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {path: a.txt}\n")
    for overrides in (["data.corpus.name=grammar", "data.corpus.length=5000"], ["data.corpus=stdlib"]):
        assert load_recipe(tmp_path / "base.yaml", overrides).data.corpus.name in ("grammar", "stdlib")
    assert load_recipe(tmp_path / "base.yaml", ["data.corpus.path=b.txt"]).data.corpus.path == Path("b.txt")
    assert load_recipe(tmp_path / "base.yaml", ["data.corpus.field=body"]).data.corpus.field == "body"
    (tmp_path / "top.yaml").write_text("base: base.yaml\ndata: {corpus: {name: grammar}}\n")
    assert load_recipe(tmp_path / "top.yaml").data.corpus.name == "grammar"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data.path=a.txt", "data.corpus.name=grammar"], "data.corpus.name=grammar is another corpus"),
        (["data.path=a.txt", "data.corpus.path=b.txt"], "both say which file to read"),
        (["run.budget.steps=5", "run.budget.tokens=100"], "a run has one budget"),
        (["credit=backprop", "credit.name=head_only"], "name two parts"),
    ],
)
def test_overrides_that_contradict_each_other_are_refused(overrides, reason):
    for order in (overrides, overrides[::-1]):
        with pytest.raises(RecipeError, match=re.escape(reason)):
            load_recipe(tiny_recipe(), order)


HOSTILE = {
    "cycle": ("tuning: &a {trials: 1, searched: {x: [*a]}}\n", "it refers to itself"),
    "bomb": (
        "tuning:\n  trials: 1\n  note: x\n  searched:\n    a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"    a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
        "it holds more than 100000 values",
    ),
    "deep": ("seed: " + "[" * 5000, "it is nested too deeply"),
    "digits": ("run: {budget: {steps: " + "9" * 400 + "}}\n", "too large for anything"),
    "keys": ("".join(f"key{n}: 1\n" for n in range(20_000)), "unknown key 'key0'"),
    "binary": ("a: \x00", "characters that YAML does not take"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_made_to_break_a_reader_is_one_line(name, tmp_path):
    content, reason = HOSTILE[name]
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=reason) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert len(str(error.value)) < 500


def test_a_file_that_is_no_recipe_is_not_printed(tmp_path):
    (tmp_path / "key").write_text("-----BEGIN KEY-----\nc2VjcmV0: [\n-----END KEY-----\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "key")
    assert "c2VjcmV0" not in str(error.value)


def test_a_long_chain_of_bases_is_refused(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    (tmp_path / "60.yaml").write_text("seed: 1\n")
    with pytest.raises(RecipeError, match="a chain of more than 50 bases"):
        load_recipe(tmp_path / "0.yaml")
    assert load_recipe(tmp_path / "20.yaml").seed == 1


def test_a_shipped_recipe_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quick/direct_feedback").name == "direct_feedback"
    assert Path(expand(["quick"])[0]).stem == "backprop"
    with pytest.raises(RecipeError, match="did you mean the shipped recipe 'quick/direct_feedback'"):
        load_recipe("quick/direct_fedback")
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "direct_feedback").write_text("seed: 7\n")
    assert load_recipe("quick/direct_feedback").seed == 7, "a file of one's own goes before"
