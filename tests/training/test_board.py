from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm.training.board import Board, NoBoard, open_board


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def test_scalars_histograms_and_text(tmp_path: Path) -> None:
    with open_board(tmp_path) as board:
        board.scalars(3, {"train/loss": 2.5, "train/lr": 0.001})
        board.histograms(
            3, {"w": torch.arange(8.0).view(2, 4), "bad": torch.tensor([float("nan")])}
        )
        board.text(3, "sample", "# not a heading\nline")
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]
    assert events.Histograms("w")[0].histogram_value.num == 8
    assert "bad" not in events.Tags()["histograms"]
    (text,) = events.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val[0] == b"    # not a heading\n    line"


def test_resuming_replaces_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    killed = Board(tmp_path)
    for step in range(1, 8):
        killed.scalars(step, {"loss": 1.0})
    killed.flush()
    with Board(tmp_path, resume_from=4) as board:
        for step in range(5, 9):
            board.scalars(step, {"loss": 2.0})
    values = [(event.step, event.value) for event in read(tmp_path).Scalars("loss")]
    assert values == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 9)]


def test_turned_off_it_writes_nothing(tmp_path: Path) -> None:
    with open_board(tmp_path / "tensorboard", enabled=False) as board:
        assert isinstance(board, NoBoard)
        board.scalars(1, {"loss": 1.0})
        board.histograms(1, {"w": torch.zeros(2)})
        board.text(1, "sample", "text")
        board.flush()
    assert not (tmp_path / "tensorboard").exists()
