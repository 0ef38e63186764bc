"""Files are read with suspicion, and written as a whole or not at all."""

import fcntl
import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from heterodox.core.errors import CheckpointError
from heterodox.core.files import TEMPORARY, as_path, parse_json, read_json, read_yaml, replacing, write_atomically

NUMBERS = TypeAdapter(dict[str, int])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def write_half() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert (file.read_text(), names(tmp_path)) == ("old", ["file"])


def test_the_next_write_clears_what_a_killed_one_left_and_spares_what_is_being_written(tmp_path):
    left, other = tmp_path / f".file.dead{TEMPORARY}", tmp_path / f".other.dead{TEMPORARY}"
    alive = tmp_path / f".file.alive{TEMPORARY}"
    for path in (left, other, alive):
        path.write_text("half")
    held = os.open(alive, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    write_atomically(tmp_path / "file", "new")
    os.close(held)
    assert names(tmp_path) == sorted([alive.name, other.name, "file"])


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    file = tmp_path / ("n" * 255)
    write_atomically(file, "text")
    write_atomically(file, "other")
    assert (file.read_text(), len(names(tmp_path))) == ("other", 1)


def test_a_folder_appears_whole_with_the_rights_of_any_other(tmp_path):
    with replacing(tmp_path / "folder", folder=True) as temporary:
        (temporary / "file").write_text("x")
        assert not (tmp_path / "folder").exists()
    (tmp_path / "like").mkdir()
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "like").stat().st_mode
    assert names(tmp_path) == ["folder", "like"]


@pytest.mark.parametrize("path", ["", "  ", "a\0b", "~nobody-of-this-name/x"])
def test_no_path(path):
    with pytest.raises(CheckpointError):
        as_path(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 6000 + b"}", "6,000 digits"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": NaN}', "a: expected a valid integer"),
        (b"[1]", "expected a dict"),
        (b'{"a": "1"}', "a: expected"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(content, said, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as error:
        read_json(tmp_path / "file", TypeAdapter(dict[str, int], config={"strict": True}))
    assert str(tmp_path / "file") in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "loop", "device", "missing", "."):
        with pytest.raises(CheckpointError, match="cannot read"):
            read_json(tmp_path / name, NUMBERS)


def test_numbers_are_those_that_we_write():
    assert parse_json("[1, 1.5, NaN, Infinity]") == [1, 1.5, None, None]


def test_aliases_may_repeat_but_not_explode(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("a: &x [1, 2]\nb: *x\n")
    assert read_yaml(file) == {"a": [1, 2], "b": [1, 2]}
    lines = ["l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9)]
    for text, said in (("\n".join(lines), "aliases"), ("a: &a [*a]", "alias"), ("[" * 5000, "nested too deeply")):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            read_yaml(file)
