"""One token table of ``cllm bench embed`` in a process of its own, trained as ``cllm train`` trains it."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from cllm.bench.embed_cases import BUDGETS, QUICK, RATES, SEEDS, speed_cases
from cllm.bench.harness import answer_rounds
from cllm.core.config import Config
from cllm.core.settings import merge
from cllm.text.batches import BatchSource
from cllm.training.build import build
from cllm.training.draw_sources import draws_of
from cllm.training.feed import Feed
from cllm.training.progress import Silent
from cllm.training.resolve import read_text, resolve
from cllm.training.schedule import learning_rate, similarity_weight
from cllm.training.start_tables import start_tables

WARM_UP = 5
LONG = 100_000


def main() -> None:
    """Parse what ``cllm bench embed`` asks for, compile, warm up, then measure round by round."""
    cases = {case.name: case for case in speed_cases()}
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=list(cases))
    parser.add_argument("--text", default="", help="a file; without it, the built-in text")
    parser.add_argument("--steps", type=int, required=True, help="of a round")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    # Where the table begins decides nothing of the speed, and at random it is there at once.
    config = replace(cases[args.case], start="normal").config(
        (args.text,) if args.text else (),
        QUICK if args.quick else BUDGETS[0],
        RATES[0],
        SEEDS[0],
        dtype="fp32" if args.quick else "auto",
        dropout=0.0,
        validations=1,
        quick=args.quick,
    )
    # Long enough for compiling to pay with every table: speeds of the same way to train are compared.
    config = merge(config, {"train.steps": LONG})
    with tempfile.TemporaryDirectory() as place:
        _answer(config, Path(place) / "data", args.steps)


def _answer(config: Config, directory: Path, steps: int) -> None:
    """Train ``config`` on its text, kept in ``directory``, in rounds of so many steps."""
    silent = Silent()
    dataset = read_text(config, directory, silent)
    config = resolve(config, dataset, silent)
    train, context = config.train, config.model.context
    model, step = build(config, draws_of(config, dataset, silent))
    start_tables(config, dataset, model, silent)
    step.refresh()
    model.train()
    feed = Feed(BatchSource(dataset.train, context, train.batch_size, train.seed), train)
    number = count()

    def take(at: int) -> None:
        step(feed(next(number)), learning_rate(train, at), similarity_weight(train, at))

    # With the similarity loss and without it: it fades, so that a round has steps from all over a training.
    for at in (*[0] * WARM_UP, train.steps - 1):
        take(at)
    places = [round(share * (train.steps - 1) / steps) for share in range(steps)]

    def one_round() -> dict[str, Any]:
        begin = time.perf_counter()
        for at in places:
            take(at)
        seconds = time.perf_counter() - begin
        tokens = steps * train.accumulate * train.batch_size * context
        return {"tokens_per_second": tokens / seconds}

    answer_rounds({"dtype": train.dtype}, one_round)
    step.close()


if __name__ == "__main__":
    main()
