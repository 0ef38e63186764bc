import json
from pathlib import Path

import pytest

from heterodox.core.errors import CorpusError
from heterodox.data.corpus import Document, File


def read(path: Path, **options: str) -> list[Document]:
    return list(File(path, **options).documents())


def test_a_file_is_one_document_taken_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Zwölf\r\nBoxkämpfer\n".encode())
    assert read(path) == [Document("a.txt", "Zwölf\r\nBoxkämpfer\n")]


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read(path)[0].text == "hello"


def test_a_folder_gives_its_matching_files_in_sorted_order_at_any_depth(tmp_path):
    for name in ("b.txt", "sub/a.txt", "a.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.id for document in read(tmp_path)] == ["a.txt", "b.txt", "sub/a.txt"]
    assert [document.id for document in read(tmp_path, pattern="*.md")] == ["c.md"]


def test_a_folder_without_matches_lists_the_suffixes_that_it_holds(tmp_path):
    for name in ("a.md", "b.md", "c.rst", "LICENSE"):
        (tmp_path / name).write_text("text")
    with pytest.raises(CorpusError, match=r"'\*\.txt'.*2 × \.md, .*set data\.corpus\.pattern") as error:
        read(tmp_path)
    assert "1 × .rst" in str(error.value)
    assert "1 × (no suffix)" in str(error.value)


def test_an_empty_folder_and_a_bad_pattern_are_named(tmp_path):
    with pytest.raises(CorpusError, match="holds no files"):
        read(tmp_path)
    with pytest.raises(CorpusError, match="'/x' is not a file pattern"):
        read(tmp_path, pattern="/x")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"no file or folder .*nowhere\.txt"):
        read(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"good\n\xff\xfe", r"a\.txt is not UTF-8: byte 5 is 0xff"),
        (b"abc\x00def", r"a\.txt is not text: byte 3 is NUL"),
        ("text".encode("utf-16-le"), "byte 1 is NUL"),
        ("é".encode("latin-1"), "byte 0 is 0xe9"),
        ("né".encode()[:-1], "byte 1 is 0xc3"),
    ],
)
def test_what_is_not_utf8_text_is_refused_with_its_offset(tmp_path, data, message):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        read(path)


def test_jsonl_gives_one_document_per_line(tmp_path):
    path = tmp_path / "a.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSON.
    rows = [{"text": "one\ntwo", "n": 1}, {"text": "three\u2028four"}, {"text": None}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read(path) == [
        Document("a.jsonl:1", "one\ntwo"),
        Document("a.jsonl:3", "three\u2028four"),
        Document("a.jsonl:5", ""),
    ]
    assert len(read(tmp_path, pattern="*.jsonl")) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"line 2, is not JSON"),
        ('["text"]', r"line 2, holds list"),
        (
            '{"body": "x", "id": 3}',
            r"line 2, has no field 'text', only 'body', 'id'; set data\.corpus\.field",
        ),
        ('{"text": 3}', r"line 2,: field 'text' holds int, expected text"),
        ("[" * 100_000, r"line 2, is not JSON"),
    ],
)
def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=message):
        read(path)


def test_jsonl_reads_the_field_that_is_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n')
    assert read(path, field="body")[0].text == "x"
