"""`metrics.jsonl`: whole lines, nothing of a later step after a resume, one line of complaint on a full disk."""

import errno

import pytest

from heterodox.core.errors import CheckpointError
from heterodox.training.metrics import MetricsFile, last_rows, read_rows


def train_row(step: int, **more) -> dict:
    return {"kind": "train", "step": step, "loss": 1.5} | more


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (5, 10):
        metrics.row(train_row(step))
        metrics.row({"kind": "eval", "step": step, "val_loss": 1.0})
    metrics.close()
    return path


def test_rows_come_back_by_kind(path):
    assert [row["step"] for row in read_rows(path)] == [5, 5, 10, 10]
    assert [row["val_loss"] for row in read_rows(path, "eval")] == [1.0, 1.0]
    assert list(read_rows(path.with_name("none.jsonl"))) == []


@pytest.mark.parametrize("rest", [b'{"kind": "train", "st', b'{"kind": "train", "step": 15}', b"\0\0\0\n", b"\n"])
def test_what_a_crash_left_of_a_line_is_skipped(path, rest):
    with path.open("ab") as file:
        file.write(rest)
    assert len(list(read_rows(path))) == 4
    assert len(last_rows(path)) == 4
    metrics = MetricsFile(path, 10)
    metrics.row(train_row(11))
    metrics.close()
    assert [row["step"] for row in read_rows(path)] == [5, 5, 10, 10, 11]
    assert path.read_bytes().count(b"\n") == 5


@pytest.mark.parametrize("line", [b"[1]", b"7", b"{", b'{"kind": "eval"}', b'{"kind": "eval", "step": "5"}', b"\xff"])
def test_a_line_that_no_run_writes_is_named_and_nothing_is_lost(path, line):
    rest = path.read_bytes()
    path.write_bytes(rest + line + b"\n" + rest)
    with pytest.raises(CheckpointError, match=f"{path} is damaged in line 5: "):
        MetricsFile(path, 10)
    assert path.read_bytes() == rest + line + b"\n" + rest
    assert len(last_rows(path)) == 8


def test_going_on_drops_the_rows_of_later_steps(path):
    MetricsFile(path, 7).close()
    assert [row["step"] for row in read_rows(path)] == [5, 5]
    MetricsFile(path, 0).close()
    assert path.read_bytes() == b""


def test_the_last_rows_of_a_long_file(path):
    rows = last_rows(path, num_bytes=100)
    assert 1 <= len(rows) < 4
    assert rows == list(read_rows(path))[-len(rows) :]
    assert last_rows(path.with_name("none.jsonl")) == []


def test_numbers_that_json_does_not_have_are_a_bug(path):
    metrics = MetricsFile(path, 10)
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.row(train_row(11, loss=float("nan")))
    metrics.close()


class FullDisk:
    """Takes half of a line, then nothing."""

    def __init__(self) -> None:
        self.room = 20

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self.room = min(self.room, len(data)), 0
        return taken

    def close(self) -> None:
        pass


def test_a_full_disk_is_one_line(path):
    metrics = MetricsFile(path, 10)
    metrics.close()
    metrics._file = FullDisk()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics.jsonl: No space left on device"):
            metrics.row(train_row(11))
    metrics.close()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl", 0)
