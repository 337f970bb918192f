"""The smaller parts of training: evaluation, pace, signals, samples."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cllm.core.config import Config
from cllm.core.settings import build
from cllm.model.cross_entropy import IGNORE
from cllm.model.norms import BatchNorm
from cllm.text.batches import BatchSource
from cllm.text.dataset import Dataset, load_prepared
from cllm.text.packed import PackedTokens
from cllm.training.build import build as build_model
from cllm.training.evaluate import evaluate, norm_mode_gap
from cllm.training.feed import MicroBatches, micro_batches, target_count
from cllm.training.interrupt import Interrupt, InterruptedRunError
from cllm.training.pace import FEWEST_STEPS, Pace, measure_pace
from cllm.training.samples import sample_texts
from cllm.training.step import TrainStep


def stream_of(tokens: int, mask: np.ndarray | None = None) -> PackedTokens:
    """Tokens 1, 2, … of 23 between end tokens 0, each of 3 bytes."""
    ids = np.concatenate([[0], np.arange(tokens) % 22 + 1, [0]])
    return PackedTokens.from_arrays(ids, text_bytes=3 * tokens, mask=mask)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("tokens", [15, 16, 17, 50])
def test_every_token_is_scored_once(
    tokens: int, batch_size: int, step_of: Callable[..., TrainStep]
) -> None:
    step, packed = step_of(), stream_of(tokens)
    step.model.eval()
    found = evaluate(step.evaluate, packed, context=8, batch_size=batch_size)
    ids = torch.from_numpy(packed.ids.astype(np.int64))
    nats = 0.0
    for first in range(0, tokens + 1, 8):
        window = ids[first : first + 9]
        logits = step.model(window[None, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert (found.tokens, found.bytes) == (tokens + 1, 3 * tokens)
    assert found.loss == pytest.approx(nats / (tokens + 1), rel=1e-10)
    assert found.bpb == pytest.approx(nats / math.log(2) / (3 * tokens), rel=1e-10)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_a_uniform_guess_scores_log2_of_the_vocabulary() -> None:
    def uniform(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (targets != IGNORE).sum() * math.log(256)

    advanced: list[float] = []
    packed = PackedTokens.from_arrays(np.zeros(101, dtype=np.int64), text_bytes=100)
    found = evaluate(uniform, packed, context=7, batch_size=2, advance=advanced.append)
    assert found.bpb == pytest.approx(8.0)
    assert sum(advanced) == 16


def test_the_gap_between_modes_is_eval_minus_training_loss() -> None:
    norm = BatchNorm(1, 1e-5)
    model = torch.nn.Sequential(norm, torch.nn.Dropout(0.5))

    def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert not model[1].training, "dropout is no part of the gap"
        return (targets != IGNORE).sum() * (2.0 if norm.training else 2.5)

    gap = norm_mode_gap(model, loss, stream_of(100), context=8, batch_size=2, device="cpu")
    assert gap == pytest.approx(0.5)
    assert model.training
    assert norm.training


def test_a_step_takes_its_own_micro_batches(fast: dict) -> None:
    config = build(fast | {"train.batch_size": 2, "train.accumulate": 3})
    source = BatchSource(stream_of(300), 8, 2, seed=4)
    taken = [micro_batches(source, config.train, at) for at in range(2)]
    for number in range(6):
        ids, targets = taken[number // 3][number % 3]
        expected = source.batch(number)
        assert np.array_equal(ids.numpy(), expected[0])
        assert np.array_equal(targets.numpy(), expected[1])
    assert target_count(taken[0]) == 3 * 2 * 8
    masked: MicroBatches = [(torch.zeros(1, 3), torch.tensor([[1, IGNORE, 2]]))]
    assert target_count(masked) == 2


def test_the_steps_of_a_budget() -> None:
    pace = Pace(step=0.5, validation=10.0, measuring=3.0)
    # 95% of the time less three validations; a step and its share of a validation take 0.6 s.
    assert pace.steps_in(100.0, eval_every=100) == int((95 - 30) / 0.6)
    assert pace.steps_in(0.0, eval_every=100) == FEWEST_STEPS
    assert pace.steps_in(-5.0, eval_every=100) == FEWEST_STEPS


@pytest.mark.parametrize("norm", ["rmsnorm", "batchnorm"])
def test_measuring_the_pace_leaves_no_trace(
    norm: str, trained: Path, config_of: Callable[..., Config]
) -> None:
    dataset: Dataset = load_prepared(trained / "data")
    config = config_of(model__vocab_size=300, train__loss_chunk=0, model__norm=norm)
    model, step = build_model(config)
    live = [step.arena.weights, *step.arena.moments.values(), *step.counters.values()]
    live += list(model.buffers())
    before = [tensor.clone() for tensor in live]
    pace = measure_pace(config, dataset, model, step)
    assert min(pace.step, pace.validation, pace.measuring) > 0
    for now, then in zip(live, before, strict=True):
        assert torch.equal(now, then)


def test_samples_pass_over_empty_texts_and_a_diverged_model_writes_none(trained: Path) -> None:
    import cllm

    run = cllm.load(trained)
    texts = sample_texts(run.model, run.tokenizer, count=3, tokens=10)
    assert 1 <= len(texts) <= 3
    assert all(text.strip() for text in texts)
    assert texts == sample_texts(run.model, run.tokenizer, count=3, tokens=10)
    run.model.norm.weight.data.fill_(float("nan"))
    assert sample_texts(run.model, run.tokenizer, count=3, tokens=10) == []


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_held_until_it_is_asked_for(signum: signal.Signals, code: int) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt(Path("a run")) as interrupt:
        assert not interrupt.pending
        os.kill(os.getpid(), signum)
        assert interrupt.pending == signum
        # The second one is no longer held.
        assert signal.getsignal(signum) in before
        with pytest.raises(InterruptedRunError) as error:
            interrupt.raise_pending(7)
    assert error.value.exit_code == code
    text = f"stopped by {signum.name} after step 7; go on with: cllm train --resume 'a run'"
    assert str(error.value) == text
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_step_that_does_not_end_is_given_up_and_a_save_is_not() -> None:
    before = signal.getsignal(signal.SIGALRM)

    def endless() -> None:
        with Interrupt(Path("run"), patience=0.05) as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            with interrupt.saving():
                time.sleep(0.2)  # the clock stands still
            assert interrupt.pending
            interrupt._hold(signal.SIGTERM, None)
            for _ in range(10_000):
                time.sleep(0.01)

    match = r"SIGTERM in the middle .* lost; go on with"
    with pytest.raises(InterruptedRunError, match=match) as error:
        endless()
    assert error.value.exit_code == 143
    assert signal.getsignal(signal.SIGALRM) is before
    with Interrupt(patience=0.05) as interrupt:
        with interrupt.saving():  # a signal that comes while it saves
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        assert interrupt.pending == signal.SIGINT


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_under_torchrun_it_is_given_up_where_all_wait_or_the_process_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cllm.training.interrupt.launched", lambda: object())
    monkeypatch.setattr("cllm.training.interrupt.LIMIT", 0.05)
    told: list[InterruptedRunError] = []
    done: list[float] = []

    def validate() -> None:
        with Interrupt(Path("run"), patience=0.05) as interrupt:
            interrupt.leave = told.append
            batch = interrupt.giving_up(done.append)
            batch(1.0)
            for _ in range(2):  # torchrun sends on what the terminal has sent
                os.kill(os.getpid(), signal.SIGINT)
            end = time.monotonic() + 60
            while not told:  # a step that does not end
                assert time.monotonic() < end
                time.sleep(0.01)
            batch(2.0)

    with pytest.raises(InterruptedRunError, match=r"stopped by SIGINT in the middle of a step"):
        validate()
    assert done == [1.0, 2.0]
    (error,) = told
    assert str(error) == (
        "stopped by SIGINT in the middle of a step, which is lost; go on with: cllm train --resume run"
    )
    assert error.exit_code == 130


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_wraps_or_swallows_errors_is_given_up_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch's compilers do: each ``Exception`` becomes one of theirs, or is taken for a reason to go on;
    what is raised in a destructor is lost."""
    monkeypatch.setattr("cllm.training.interrupt.AGAIN", 0.05)
    lost = [0]

    class Destructed:
        def __del__(self) -> None:
            if not lost[0]:
                lost[0] = 1
                time.sleep(0.1)

    def compile_for_ever() -> None:
        with Interrupt(patience=0.05) as interrupt:
            interrupt._hold(signal.SIGTERM, None)
            for _ in range(10_000):
                try:
                    Destructed()
                    time.sleep(0.01)
                except Exception as error:
                    raise RuntimeError("InductorError") from error

    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        compile_for_ever()
    assert lost == [1]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_backward_pass_that_is_given_up_is_no_error_in_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Torch's compilers trace it so that an error in it is shown with where it comes from."""

    class Endless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            for _ in range(1000):
                time.sleep(0.01)
            return grad

    def step(patience: float) -> None:
        with Interrupt(patience=patience) as interrupt, torch.autograd.set_detect_anomaly(True):
            interrupt._hold(signal.SIGTERM, None)
            Endless.apply(torch.ones(2, requires_grad=True)).sum().backward()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InterruptedRunError, match="SIGTERM"):
            step(0.05)
    assert not [w for w in caught if "Error detected" in str(w.message)]
    assert "Traceback" not in capfd.readouterr().err


def test_outside_the_main_thread_no_signal_is_taken() -> None:
    seen: list[object] = []

    def body() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Interrupt() as interrupt:
            seen.append(interrupt.pending == 0 and signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [True]
