import sys
import time
from pathlib import Path

import pytest

from heterodox.core.errors import CorpusError, RecipeError
from heterodox.data.huggingface import HuggingFace

TEXTS = ["one", "two", "three"]


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", exc_type=ImportError)


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
    parquet = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path)


def texts(dataset: Path | str, **options) -> list[str]:
    return [document.text for document in HuggingFace(str(dataset), **options).documents()]


def test_a_parquet_file_gives_a_document_per_row(tmp_path):
    write_parquet(tmp_path / "rows.parquet", [*TEXTS, None])
    assert texts(tmp_path / "rows.parquet") == [*TEXTS, ""]
    assert texts(tmp_path / "rows.parquet", max_documents=2) == TEXTS[:2]


def test_a_parquet_folder_is_read_by_split(tmp_path):
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ["b"])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ["a"])
    write_parquet(tmp_path / "validation/0000.parquet", ["c"])
    assert texts(tmp_path) == ["a", "b"]
    assert texts(tmp_path, split="validation") == ["c"]
    with pytest.raises(CorpusError, match=r"no parquet file of split 'test' .*train-00000-of-00002\.parquet"):
        texts(tmp_path, split="test")


def test_parquet_errors_are_named(tmp_path):
    write_parquet(tmp_path / "rows.parquet", TEXTS, column="body")
    with pytest.raises(CorpusError, match=r"row 0 of .* has no field 'text', only 'body', 'id'"):
        texts(tmp_path / "rows.parquet")
    with pytest.raises(CorpusError, match=r"row 0 .* field 'id' holds int, expected text"):
        texts(tmp_path / "rows.parquet", field="id")
    with pytest.raises(CorpusError, match=r"drop data\.corpus\.config_name='x'"):
        texts(tmp_path / "rows.parquet", config_name="x")
    with pytest.raises(CorpusError, match=r"there is no file .*nowhere\.parquet"):
        texts(tmp_path / "nowhere.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(CorpusError, match=r"cannot read .*bad\.parquet as parquet"):
        texts(tmp_path / "bad.parquet")


def test_a_saved_dataset_is_read_and_its_columns_are_checked(tmp_path, datasets, capfd):
    datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]}).save_to_disk(tmp_path / "saved")
    capfd.readouterr()
    assert texts(tmp_path / "saved", max_documents=2) == TEXTS[:2]
    with pytest.raises(CorpusError, match="has no field 'body', only 'text', 'n'"):
        texts(tmp_path / "saved", field="body")
    with pytest.raises(CorpusError, match="has no split 'test', only 'train'"):
        texts(tmp_path / "saved", split="test")
    assert capfd.readouterr() == ("", "")


def test_a_saved_dataset_may_have_several_splits(tmp_path, datasets):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved", split="test") == ["test"]
    with pytest.raises(CorpusError, match="has no split 'val', only 'train', 'test'"):
        texts(tmp_path / "saved", split="val")


def test_a_folder_that_is_no_dataset_is_named(tmp_path, datasets):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(CorpusError, match="neither parquet files nor a dataset written by save_to_disk"):
        texts(tmp_path)


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError("slow")])
def test_without_a_network_a_hub_name_fails_at_once_in_one_line(datasets, monkeypatch, capfd, error):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    start = time.perf_counter()
    with pytest.raises(CorpusError, match="cannot reach the Hugging Face hub, and 'nobody/nothing'") as caught:
        texts("nobody/nothing")
    assert time.perf_counter() - start < 5
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not datasets.config.HF_HUB_OFFLINE, "the switch must be put back"


def test_a_name_that_the_hub_cannot_have_is_explained(datasets):
    with pytest.raises(CorpusError, match=r"neither a folder or \.parquet file here nor a dataset"):
        texts("./no/such/folder")


def test_an_error_of_the_library_becomes_one_line(datasets, monkeypatch):
    def broken(*_, **__):
        raise ValueError("Unknown split 'x'.\nmore\nlines")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(CorpusError, match=r"^cannot load the dataset 'a/b': Unknown split 'x'\.$"):
        texts("a/b")


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"needs the package `datasets`.*pip install 'heterodox\[hf\]'"):
        texts("nobody/nothing")
