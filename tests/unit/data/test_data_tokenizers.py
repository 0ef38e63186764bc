import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from heterodox.core.errors import CheckpointError, CorpusError
from heterodox.data import load_tokenizer
from heterodox.data import tokenizers as subword
from heterodox.data.tokenizers import (
    BPE,
    Byte,
    Char,
    Subword,
    Tokenizer,
    TokenizerFile,
    continuation,
    text_bytes,
    train,
)
from heterodox.data.tokenizers import _words as pieces

PROSE = "The quick brown fox\njumps over the lazy dog — zwölf Boxkämpfer, 日本語, 🦊!\n\n  Indented.\n" * 40
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe() -> Subword:
    return Subword(train(PROSE, 320))


def save_words(path: Path, **model: str) -> Path:
    """A tokenizer.json that knows the words `a` and `b`."""
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, **model))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(path))
    return path


@given(any_text)
def test_byte_round_trip(text):
    ids = Byte().encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(text.encode())
    assert Byte().decode(ids) == text


def test_broken_utf8_decodes_to_the_replacement_character():
    assert Byte().decode([0x61, 0xC3, 0x62]) == "a\ufffdb"


@given(any_text.filter(bool))
def test_char_round_trip(text):
    tokenizer = Char.Config().build({"train": text, "val": ""})
    ids = tokenizer.encode(text)
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.decode(ids) == text
    assert set(ids.tolist()) == set(range(tokenizer.vocab_size))


def test_char_knows_the_characters_of_every_split_and_names_those_it_does_not_know():
    tokenizer = Char.Config().build({"train": "ab", "val": "z"})
    assert tokenizer.characters == "abz"
    with pytest.raises(CorpusError, match="2 characters of the text are not in the vocabulary of 3: 'y', '🦊'"):
        tokenizer.encode("a🦊byy")
    with pytest.raises(CorpusError, match=r"'A', 'B', .*, …;"):
        tokenizer.encode("ABCDEFGHIJKLMN")


@given(any_text)
def test_bpe_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_compresses_and_is_trained_on_train_alone_and_always_alike(bpe):
    assert bpe.vocab_size == 320
    assert len(bpe.encode(PROSE)) < len(PROSE.encode()) / 3
    config = BPE.Config(vocab_size=320)
    assert config.build({"train": PROSE, "val": "other text " * 99}).fingerprint == bpe.fingerprint


def test_bpe_of_a_small_corpus_is_as_small_as_it_has_to_be():
    tokenizer = BPE.Config(vocab_size=5000).build({"train": "ab ab"})
    assert 256 < tokenizer.vocab_size < 262
    assert tokenizer.decode(tokenizer.encode("anything else")) == "anything else"


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \n\r\t\u0085\u2028'sé.1_")))
def test_text_is_cut_only_where_that_changes_nothing(bpe, text):
    whole = bpe.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subword, "CHUNK_CHARACTERS", 2)
        patch.setattr(subword, "CHUNKS_AT_ONCE", 2)
        assert "".join(subword.chunks(text)) == text
        assert bpe.encode(text).tolist() == whole.tolist()


def test_long_text_is_cut(bpe, monkeypatch):
    monkeypatch.setattr(subword, "CHUNK_CHARACTERS", 100)
    assert len(list(subword.chunks(PROSE))) > 10
    assert bpe._cuttable


@pytest.mark.parametrize("ids", [[104, 105], np.array([104, 105], np.uint16), torch.tensor([104, 105])])
def test_ids_may_be_a_list_an_array_or_a_tensor(ids):
    assert Byte().decode(ids) == "hi"


@pytest.mark.parametrize("tokenizer", [Byte(), Char("abc"), Subword(train(PROSE, 300))])
def test_lone_surrogates_and_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer):
    with pytest.raises(CorpusError, match=r"character 1 is a lone surrogate \('\\ud800'\)"):
        tokenizer.encode("a\ud800")
    with pytest.raises(AssertionError):
        tokenizer.decode([tokenizer.vocab_size])


@pytest.mark.parametrize("tokenizer", [Byte(), Char("abc 🦊"), Subword(train(PROSE, 300))])
def test_saved_tokenizers_come_back_the_same(tmp_path, tokenizer: Tokenizer):
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode("a b c").tolist() == tokenizer.encode("a b c").tolist()


@pytest.mark.parametrize("contents", [None, "", "[]", "{}", '{"heterodox": "char"}', '{"model": {"type": "no"}}'])
def test_a_missing_or_damaged_saved_tokenizer_is_named(tmp_path, contents):
    if contents is not None:
        (tmp_path / "tokenizer.json").write_text(contents)
    with pytest.raises(CheckpointError, match=r"cannot load the tokenizer .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_file_is_taken_as_it_is(tmp_path, bpe):
    bpe.save(tmp_path)
    config = TokenizerFile.Config(path=tmp_path / "tokenizer.json")
    assert config.build({}).encode(PROSE).tolist() == bpe.encode(PROSE).tolist()
    before = config.identity()
    Char("ab").save(tmp_path)
    assert config.identity() != before
    assert config.build({}).encode("ba").tolist() == [1, 0]


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    tokenizer = TokenizerFile.Config(path=save_words(tmp_path / "t.json", unk_token="[UNK]")).build({})
    assert tokenizer.encode("a b a").tolist() == [0, 1, 0]
    with pytest.raises(CorpusError, match=r"turns 2 pieces of the text into its unknown token '\[UNK\]'"):
        tokenizer.encode("a c d")


def test_a_bad_tokenizer_file_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"cannot read the tokenizer .*no\.json"):
        TokenizerFile.Config(path=tmp_path / "no.json").identity()
    (tmp_path / "bad.json").write_text(json.dumps({"hello": 1}))
    with pytest.raises(CorpusError, match=r"bad\.json is not a tokenizer\.json"):
        TokenizerFile.Config(path=tmp_path / "bad.json").build({})


def save_bpe(path: Path, characters: str, **model: object) -> Path:
    """A tokenizer.json of single characters, without an unknown token."""
    inner = tokenizers.Tokenizer(models.BPE({c: n for n, c in enumerate(characters)}, [], **model))
    inner.save(str(path))
    return path


def built(path: Path) -> Tokenizer:
    return TokenizerFile.Config(path=path).build({})


def test_a_tokenizer_that_drops_characters_is_refused_with_the_first_of_them(tmp_path):
    tokenizer = built(save_bpe(tmp_path / "t.json", "abc "))
    assert tokenizer.decode(tokenizer.encode("aλb")) == "a b"
    with pytest.raises(CorpusError, match=r"loses characters of the text: 'λ' \(U\+03BB\)"):
        text_bytes(tokenizer, "abλc", tokenizer.encode("abλc"))


def test_a_tokenizer_that_normalizes_counts_the_bytes_of_the_text_that_it_gives_back(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]
    )
    inner.save(str(tmp_path / "t.json"))
    tokenizer = built(tmp_path / "t.json")
    assert text_bytes(tokenizer, "ä", tokenizer.encode("ä")) == 1
    assert text_bytes(Byte(), "ä", Byte().encode("ä")) == 2


def test_dropout_is_switched_off(tmp_path):
    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5))
    inner.save(str(tmp_path / "t.json"))
    assert json.loads((tmp_path / "t.json").read_text())["model"]["dropout"] == 0.5
    tokenizer = built(tmp_path / "t.json")
    assert tokenizer.encode("ab" * 50).tolist() == [2] * 50
    assert json.loads(tokenizer.dumps())["model"]["dropout"] is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["model"]["vocab"].update(b=0), "'a' and 'b' have the same id 0"),
        (lambda d: d["model"]["vocab"].update(b=2_000_000_000), "'b' has the id 2000000000, and there are 2 tokens"),
        (lambda d: d["model"]["vocab"].update(b="x"), "does not give each token a number"),
        (lambda d: d.update(model={"type": "BPE"}), "is not a tokenizer.json"),
    ],
)
def test_a_damaged_vocabulary_is_refused(change, reason, tmp_path):
    path = save_bpe(tmp_path / "t.json", "ab")
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    with pytest.raises(CorpusError, match=reason):
        built(path)


def test_a_character_twice_is_refused():
    with pytest.raises(ValueError, match="'a' is there twice"):
        Char("aba")


def test_the_space_between_prompt_and_continuation_stays(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"▁the": 0, "▁king": 1, "▁up": 2}, unk_token="▁the"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.save(str(tmp_path / "t.json"))
    tokenizer = built(tmp_path / "t.json")
    assert tokenizer.decode([2]) == "up"
    assert continuation(tokenizer, [0, 1], [2]) == " up"
    assert continuation(Byte(), list("é".encode()[:1]), list("é".encode()[1:])) == "é"


def test_long_words_are_cut_to_train_a_vocabulary_and_ordinary_text_is_not(caplog):
    assert "".join(pieces(PROSE)) == PROSE
    assert list(pieces(PROSE)) == list(subword.chunks(PROSE))
    assert not caplog.records
    dna = "ACGT" * 2000
    cut = list(pieces("so: " + dna))
    assert "".join(cut) == "so: " + dna
    assert max(map(len, cut)) <= 1024
    assert "more than 1024 characters are cut" in caplog.text


def test_a_long_line_is_cut_between_words_with_the_same_tokens(bpe, monkeypatch):
    line = "The quick brown fox jumps, it's 12 lazy dogs!  Two spaces. " * 50
    whole = bpe.encode(line).tolist()
    monkeypatch.setattr(subword, "CHUNK_CHARACTERS", 40)
    assert len(list(subword.chunks(line))) > 50
    assert bpe.encode(line).tolist() == whole


@pytest.mark.parametrize("tokenizer", [Byte(), Char("".join(sorted(set(PROSE)))), Subword(train(PROSE, 320))])
def test_hugging_face_reads_the_same_tokens(tokenizer):
    text = tokenizer.huggingface()
    assert text is not None
    theirs = tokenizers.Tokenizer.from_str(text)
    assert theirs.encode(PROSE).ids == tokenizer.encode(PROSE).tolist()
    assert theirs.decode(theirs.encode(PROSE).ids) == PROSE
