"""TensorBoard files, read back by TensorBoard's own reader."""

import builtins
import warnings

import pytest

from heterodox.core.errors import CheckpointError, RecipeError
from heterodox.training.recorder import TensorBoard, require_tensorboard

ROWS = [
    {"kind": "train", "step": 1, "tokens": 8, "loss": 2.0, "note": "text"},
    {"kind": "eval", "step": 1, "tokens": 8, "val_loss": 1.75},
    {"kind": "probe", "step": 2, "alignment": {"head.weight": {"cosine": 0.5, "norm_ratio": None}}},
    {"kind": "train", "step": 3, "tokens": 24, "loss": 1.0},
]


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its protobuf, on import
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def write(folder, step, rows) -> None:
    board = TensorBoard(folder, step)
    for row in rows:
        board.row(row)
    board.close()


def test_tensorboard_reads_what_was_written(tmp_path):
    write(tmp_path / "board", 0, ROWS)
    assert scalars(tmp_path / "board") == {
        "train/loss": [(1, 2.0), (3, 1.0)],
        "train/tokens": [(1, 8.0), (3, 24.0)],
        "eval/tokens": [(1, 8.0)],
        "eval/val_loss": [(1, 1.75)],
        "cosine/head.weight": [(2, 0.5)],
    }


def test_going_on_hides_the_later_steps(tmp_path, monkeypatch):
    write(tmp_path, 0, ROWS)
    monkeypatch.setattr("time.time", lambda: 4e9)  # a file of its own
    write(tmp_path, 2, [ROWS[3] | {"loss": 0.5}])
    assert scalars(tmp_path)["train/loss"] == [(1, 2.0), (3, 0.5)]


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(RecipeError, match=r"pip install 'heterodox\[tensorboard\]'"):
        require_tensorboard()


def test_a_full_disk_is_one_line_and_does_not_wait_for_ever(tmp_path, monkeypatch):
    board = TensorBoard(tmp_path, 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board._writer, "flush", full)
    for _ in range(30):
        with pytest.raises(CheckpointError, match=r"cannot write .*: No space left on device"):
            board.row(ROWS[0])
    with pytest.raises(CheckpointError, match="cannot write"):
        board.close()
    monkeypatch.undo()
    board.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        TensorBoard(tmp_path / "file" / "x", 0)
