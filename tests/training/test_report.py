import math
import random
from pathlib import Path

import pytest
from matplotlib.image import imread

from cllm.core.errors import UserError
from cllm.store.draft import Draft
from cllm.store.metrics import MetricsLog
from cllm.store.run import RunDirectory
from cllm.training import plots
from cllm.training.plots import draw_plots, smooth
from cllm.training.report import write_report

CONFIG = """\
[model]
d_model = 96
[train]
steps = 40
clip = 0.75
schedule = "wsd"
"""


def trained(path: Path, seed: int) -> RunDirectory:
    """A run with made-up but random metrics, so that nothing in a report can be a constant."""
    rng = random.Random(seed)
    with Draft(path) as draft:
        draft.run.write_config(CONFIG)
        run = draft.commit()
    with run.training() as training, MetricsLog(run.metrics) as log:
        for step in range(1, 41):
            loss = rng.uniform(2.0, 3.0) if step != 7 else math.nan
            log.write(
                step,
                "train",
                loss=loss,
                bpb=loss / 2,
                lr=rng.random(),
                grad_norm=rng.random() + 0.1,
                tokens=step * 64,
                time={"tokens_per_second": rng.uniform(900, 1100)},
            )
            if step % 10 == 0:
                log.write(
                    step, "validation", loss=3 / step, bpb=rng.random() + 1, perplexity=rng.random()
                )
        log.write(7, "skip", reason="non-finite gradient")
        log.write(40, "sample", prompt="Once", text=f"upon a ```{rng.random()}``` time")
        log.write(40, "test", loss=rng.random(), bpb=rng.random(), perplexity=rng.random() + 2)
        training.end(
            "finished",
            parameters=rng.randrange(10**6, 10**7),
            tokens_per_second=rng.uniform(900, 1100),
            train_seconds=61.0,
            corpus={"sha256": f"{rng.random()}", "documents": 1234},
            machine={"processor": f"cpu | {rng.random()}"},
            warnings=[f"busy {rng.random()}"],
            command="cllm train --data notes",
            versions={"torch": "9.9"},
        )
    return run


@pytest.mark.parametrize("seed", [1, 2])
def test_the_report_says_what_was_measured(tmp_path: Path, seed: int) -> None:
    run = trained(tmp_path / "run", seed)
    text = write_report(run.path).read_text(encoding="utf-8")
    lines = open_lines(run)
    test = next(line for line in lines if line["kind"] == "test")
    validations = [line for line in lines if line["kind"] == "validation"]
    best = min(validations, key=lambda line: line["bpb"])
    facts = run.status().facts
    assert f"**{test['bpb']:.4f} bits per byte** (test)" in text
    for line, title in ((best, "validation, best"), (test, "test")):
        row = next(row for row in text.splitlines() if row.startswith(f"| {title} |"))
        for name in ("bpb", "loss", "perplexity"):
            assert f"{line[name]:.4f}" in row
        assert f"| {line['step']} |" in row
    for expected in (
        "The run is **finished**",
        f"| parameters | {facts['parameters']:,} |",
        "d_model 96",
        "| steps | 40 of 40 |",
        "| tokens seen | 2,560 |",
        "| schedule | wsd |",
        f"| sha256 | {facts['corpus']['sha256']} |",
        "| documents | 1,234 |",
        facts["machine"]["processor"].replace("|", "\\|"),
        f"{facts['tokens_per_second']:,.0f} tokens/s",
        "| training time | 1:01 |",
        f"- {facts['warnings'][0]}",
        "- non-finite gradient: 1 step\n",
        "Step 40, prompt 'Once':\n\n````\nupon a ```",
        "cllm train --data notes",
        "Made with torch 9.9.",
        CONFIG.rstrip(),
    ):
        assert expected in text
    for name in ("loss", "bits_per_byte", "learning_rate", "gradient_norm", "speed"):
        assert f"(plots/{name}.png)" in text
        assert imread(run.plots / f"{name}.png").shape[2] == 4


def open_lines(run: RunDirectory) -> list[dict[str, object]]:
    from cllm.store.metrics import read_lines

    return list(read_lines(run.metrics))


def test_a_run_that_did_not_get_far(tmp_path: Path) -> None:
    with Draft(tmp_path / "run") as draft:
        draft.run.write_config("[train]\nsteps = 40\n")
        run = draft.commit()
    with pytest.raises(UserError), run.training():
        raise UserError("the loss was not finite 10 times in a row")
    text = write_report(run.path).read_text(encoding="utf-8")
    assert "**interrupted** (the loss was not finite 10 times in a row)" in text
    assert "| steps | 0 of 40 |" in text
    assert "## Results" not in text
    assert "png" not in text
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)


def test_plots_draw_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures' own data, before they become pixels."""
    run = trained(tmp_path / "run", 3)
    drawn = {}
    really = plots._axes

    def keep(label: str) -> tuple[object, object]:
        figure, axes = really(label)
        drawn[label] = axes
        return figure, axes

    monkeypatch.setattr(plots, "_axes", keep)
    draw_plots(run.metrics, run.plots, clip=0.75)
    train = [line for line in open_lines(run) if line["kind"] == "train"]
    validation = [line for line in open_lines(run) if line["kind"] == "validation"]
    loss = {line.get_label(): line for line in drawn["loss (nats per token)"].get_lines()}
    raw = [math.nan if line["loss"] is None else line["loss"] for line in train]
    assert list(loss["training"].get_ydata()) == pytest.approx(raw, nan_ok=True)
    assert list(loss["validation"].get_xdata()) == [10, 20, 30, 40]
    assert list(loss["validation"].get_ydata()) == [line["loss"] for line in validation]
    assert "best validation: 0.075 at step 40" in loss
    norm = drawn["gradient norm before clipping (L2)"].get_lines()
    assert list(norm[0].get_ydata()) == [line["grad_norm"] for line in train]
    assert list(norm[1].get_ydata()) == [0.75, 0.75]
    assert "speed (tokens per second)" in drawn
    assert all(axes.get_xlabel() == "optimizer step" for axes in drawn.values())


def test_stale_plots_go(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 4)
    draw_plots(run.metrics, run.plots)
    with MetricsLog(run.metrics) as log:
        log.write(1, "train", loss=2.0)
    assert [path.name for path in draw_plots(run.metrics, run.plots)] == ["loss.png"]
    assert [path.name for path in run.plots.iterdir()] == ["loss.png"]


def test_plots_leave_no_global_state(tmp_path: Path) -> None:
    import subprocess
    import sys

    run = trained(tmp_path / "run", 5)
    code = (
        "import sys; from pathlib import Path; from cllm.training.report import write_report\n"
        "write_report(Path(sys.argv[1])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, run.path], check=True)


def test_smoothing() -> None:
    assert smooth([3.0] * 5, 2) == pytest.approx([3.0] * 5)
    values = smooth([1.0, math.nan, 0.0], 1)
    assert values == pytest.approx([1.0, 1.0, 1 / 3])
    assert math.isnan(smooth([math.nan], 1)[0])
    step = smooth([0.0] * 100 + [1.0] * 10, 10)
    assert step[-1] == pytest.approx(0.5, abs=0.01)


def test_an_estimated_training_loss_is_labelled_so_in_the_plots() -> None:
    exact = {"step": [1, 2], "loss": [3.0, 2.0]}
    assert plots._label_estimates(exact) == "training"
    assert exact["loss"] == [3.0, 2.0]
    mixed = {"step": [1, 2], "loss": [3.0, math.nan], "estimated_loss": [math.nan, 1.5]}
    assert plots._label_estimates(mixed) == "training (estimate)"
    assert mixed["loss"] == [3.0, 1.5]
    alone = {"step": [1], "estimated_loss": [1.5], "estimated_bpb": [0.5]}
    assert plots._label_estimates(alone) == "training (estimate)"
    assert (alone["loss"], alone["bpb"]) == ([1.5], [0.5])
