"""Whatever lies in a corpus or a tokenizer: it is read as what it is, or refused in one line."""

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from heterodox.core.errors import HeterodoxError
from heterodox.data import DataConfig

SUFFIXES = [
    ".txt", ".txt", ".md", "", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".gz", ".txt.gz", ".xz", ".bz2", ".zst",
    ".parquet", ".pdf",
]  # fmt: skip
ALPHABETS = ["ab c\n", "αβγ δ\n", "日本語 \n", "🦊é \u200b\n", "\x01\x02 a\n", 'a,"\t\n', '{"text": "a"}\n']


def text_of(dice: random.Random) -> str:
    alphabet = dice.choice(ALPHABETS)
    return "".join(dice.choices(alphabet, k=dice.choice([0, 50, 4000, 4000, 4000])))


def content_of(dice: random.Random) -> bytes:
    text = text_of(dice)
    match dice.choice([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8]):
        case 0:
            return text.encode()
        case 1:
            return "".join(json.dumps({"text": line}) + "\n" for line in text.split("\n")).encode()
        case 2:
            return json.dumps([{"text": text}, {"text": text[::-1]}]).encode()
        case 3:
            return text.encode(dice.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"]))
        case 4:
            return dice.choice([gzip, bz2, lzma]).compress(text.encode())
        case 5:
            return dice.randbytes(dice.choice([1, 30, 3000]))
        case 6:
            return b'{"text": ' + b"9" * 6000 + b"}\n" + b"[" * dice.choice([1, 4000])
        case 7:
            return b"text,n\n" + text.encode()
        case _:
            data = text.encode() * 2
            cut = dice.randrange(len(data) + 1)
            return data[:cut] + bytes([dice.randrange(256)]) + data[cut:]


def tokenizer_of(dice: random.Random, path: Path) -> str:
    """A tokenizer.json, sound or damaged; returns its text."""
    characters = dice.choice(ALPHABETS) + dice.choice(["", "abc \n", "xyz"])
    vocab = {c: n for n, c in enumerate(dict.fromkeys(characters))}
    model = dice.choice([
        lambda: models.BPE(vocab, []), lambda: models.BPE(vocab, [], dropout=0.5),
        lambda: models.WordLevel(vocab | {"[U]": len(vocab)}, unk_token="[U]"),
        lambda: models.Unigram([("<u>", 0.0), *((c, -1.0) for c in vocab)], 0),
    ])()  # fmt: skip
    inner = tokenizers.Tokenizer(model)
    if dice.random() < 0.3:
        inner.normalizer = dice.choice([normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents()])
    if dice.random() < 0.5:
        inner.pre_tokenizer = dice.choice(
            [pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace(), pre_tokenizers.Whitespace()]
        )
    if dice.random() < 0.5:
        inner.decoder = dice.choice([decoders.ByteLevel(), decoders.Metaspace(), decoders.Fuse()])
    description = json.loads(inner.to_str())
    match dice.randrange(8):
        case 0:
            damaged = [[], {}, None, {"a": -1}, {"a": 2**31}, {"a": "b"}, {"a": 0, "b": 0}]
            description["model"]["vocab"] = dice.choice(damaged)
        case 1:
            description["added_tokens"] = dice.choice([None, [{}], [{"content": "a", "id": 0}], "x"])
        case 2:
            ours = [{"heterodox": "char", "characters": "aa"}, {"heterodox": "byte"}, {"heterodox": "no"}]
            description = dice.choice([*ours, [], {"model": {}}])
        case 3:
            text = json.dumps(description)
            return text[: dice.randrange(len(text))]
        case _:
            pass
    return json.dumps(description)


def attempt(dice: random.Random, folder: Path) -> str:
    corpus = folder / f"corpus{dice.choice(SUFFIXES)}"
    corpus.write_bytes(content_of(dice))
    section: dict = {"path": str(corpus), "cache": str(folder / "cache")}
    section["tokenizer"] = {"name": dice.choice(["byte", "char"])}
    if dice.random() < 0.6:
        file = folder / "tokenizer.json"
        file.write_text(tokenizer_of(dice, file), encoding="utf-8", errors="surrogatepass")
        section["tokenizer"] = {"name": "file", "path": str(file)}
    try:
        dataset = DataConfig.model_validate(section).build()
    except HeterodoxError as error:
        dataset, reason = None, str(error)
    finally:
        corpus.unlink()
    if dataset is None:
        assert 0 < len(reason) < 3000
        return "refused"
    for split in dataset.splits.values():  # what bits per byte count is the text that the tokens stand for
        given = dataset.tokenizer.decode([int(token) for token in split.tokens])
        assert len(given.encode(errors="replace")) == split.num_bytes
    return "taken"


def fuzz(seeds: range, folder: Path) -> dict[str, int]:
    counts = {"taken": 0, "refused": 0}
    for seed in seeds:
        try:
            counts[attempt(random.Random(seed), folder)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    return counts


def test_corpora_and_tokenizers(tmp_path):
    counts = fuzz(range(200), tmp_path)
    assert min(counts.values()) > 10, "inputs of one kind alone try nothing"


@pytest.mark.slow
def test_a_thousand_corpora_and_tokenizers(tmp_path):
    counts = fuzz(range(1000, 2000), tmp_path)
    assert min(counts.values()) > 50
