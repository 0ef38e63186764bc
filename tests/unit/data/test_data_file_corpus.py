import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pytest

from heterodox.core.errors import CorpusError
from heterodox.data.corpora import Document, File


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


RECORDS = [{"text": "one"}, {"text": "two, three"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
PLAIN = {
    "a.ndjson": LINES, "a.JSONL": LINES, "a.json": json.dumps(RECORDS),
    "a.csv": 'n,text\n1,one\n2,"two, three"\n', "a.TSV": "n\ttext\n1\tone\n2\ttwo, three\n",
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_a_list_of_records_is_read_as_one(name, tmp_path):
    (tmp_path / name).write_text(PLAIN[name])
    assert [document.text for document in read(tmp_path / name)] == ["one", "two, three"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.txt", LINES, "a JSON object in each line"),
        ("a.json", '{"text": "x"}', "expected an array of objects"),
        ("a.json", LINES, "is not JSON"),
        ("a.csv", "n,text\n1,two, three\n", "another number of columns"),
        ("a.csv", "n,words\n1,two\n", "no field 'text', only 'n', 'words'"),
        ("a.jsonl", '{"n": ' + "9" * 6000 + "}\n", "line 1, is not JSON"),
        ("a.jsonl", "[" * 5000, "line 1, is not JSON"),
        ("a.parquet", "text", "is a parquet file.*data.corpus.name=hf"),
        ("a.docx", "text", "is a Word file"),
        ("a.gz", "text", "is not compressed like that"),
    ],
)
def test_what_is_no_text_is_refused_by_its_name(name, text, reason, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError, match=reason):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("magic", "reason"), [(b"PK\x03\x04", "zip"), (b"%PDF-1.7", "PDF"), (b"PAR1", "parquet"), (b"\x89PNG", "PNG")]
)
def test_another_format_is_known_by_its_first_bytes(magic, reason, tmp_path):
    (tmp_path / "a.txt").write_bytes(magic + b"some text")
    with pytest.raises(CorpusError, match=f"is a {reason} file"):
        read(tmp_path / "a.txt")


def test_json_lines_in_a_text_file_are_read_as_what_the_user_says(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    assert [document.text for document in read(tmp_path / "a.txt", format="jsonl")] == ["one", "two, three"]
    assert [document.text for document in read(tmp_path / "a.txt", format="text")] == [LINES]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_utf_16_with_its_mark_is_text(encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes("Zwölf 日本".encode(encoding))
    assert read(tmp_path / "a.txt")[0].text == "Zwölf 日本"


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_is_read_as_what_it_holds(suffix, tmp_path):
    path = tmp_path / f"a.jsonl.{suffix}"
    if suffix == "zst":
        with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as file:
            file.write(LINES.encode())
    else:
        path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[suffix].compress(LINES.encode()))
    assert [document.text for document in read(path)] == ["one", "two, three"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorpusError, match="cannot unpack"):
        read(path)


def test_what_never_ends_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", Path("/dev/zero")):
        with pytest.raises(CorpusError, match="not a regular file"):
            read(path)


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a" * 300 + ".txt", "a\0b"])
def test_a_path_that_cannot_be_is_one_line(path):
    with pytest.raises(CorpusError, match=r"no such user|cannot read"):
        read(Path(path))
