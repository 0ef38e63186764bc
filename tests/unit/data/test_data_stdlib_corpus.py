import pytest

from heterodox.core.errors import CorpusError
from heterodox.data.corpora import Stdlib


def test_the_standard_library_is_there_and_nearly_fills_its_limit():
    documents = list(Stdlib(max_bytes=300_000).documents())
    size = sum(len(document.text.encode()) for document in documents)
    assert 290_000 <= size <= 300_000
    assert len(documents) > 10
    assert documents == list(Stdlib(max_bytes=300_000).documents())
    assert [document.id for document in documents] == sorted(document.id for document in documents)


def test_a_large_limit_takes_everything_but_what_is_excluded():
    found = {document.id for document in Stdlib(max_bytes=10**9).documents()}
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= found
    folders = {part for path in found for part in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "encodings", "idlelib", "__pycache__"}


def test_line_ends_are_the_same_on_every_system(tmp_path):
    (tmp_path / "a.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    (tmp_path / "_sysconfigdata_linux.py").write_bytes(b"machine = 1\n")
    assert [document.text for document in Stdlib(root=tmp_path).documents()] == ["x = 1\ny = 2\n"]


def test_a_python_without_sources_or_a_tiny_limit_is_explained(tmp_path):
    with pytest.raises(CorpusError, match=r"no Python source of at most 5 bytes.*set data\.path"):
        list(Stdlib(max_bytes=5).documents())
    with pytest.raises(CorpusError, match="found no Python source"):
        list(Stdlib(root=tmp_path).documents())
