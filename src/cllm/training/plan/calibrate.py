"""The constants of this machine, measured once by ``cllm.training.plan.probe`` and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any

from cllm.core.cpu import is_busy
from cllm.core.errors import UserError
from cllm.core.measurements import recall, remember
from cllm.core.threads import spin_briefly
from cllm.training.plan.roofline import Rates
from cllm.training.plan.trace import Product

_meanwhile: dict[tuple[str, int], dict[str, Any]] = {}
"""What this process has measured, by name and threads."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What was measured: ``rates`` of one process; ``base_memory``: bytes of a process that trains a model
    of no size; ``hand_over``: seconds of a message to another thread and back."""

    rates: Rates
    base_memory: int
    hand_over: float


def constants(
    products: Iterable[Product],
    *,
    threads: int,
    dtype: str,
    compiled: bool,
    say: Callable[[str], None] = lambda text: None,
) -> Constants:
    """The constants for a number of threads, a precision, and compiled or eager code.

    ``products``: the shapes that are needed; those not yet known are measured. What was measured on a busy
    machine is kept in this process only. Raises ``UserError`` where the measuring process fails.
    """
    name = f"plan 1 {dtype} {'compiled' if compiled else 'eager'}"
    known: dict[str, Any] = recall(name, threads=threads) or _meanwhile.get((name, threads), {})
    rates = {_key(fields): rate for fields, rate in known.get("products", [])}
    missing = [p for p in dict.fromkeys(products) if _key(astuple(p)) not in rates]
    if not known or missing:
        how = f"{threads} thread{'s' * (threads > 1)}, {dtype}, {name.split()[-1]} code"
        say(f"measuring this machine once: {how}, {len(missing)} shapes of products")
        request = {"threads": threads, "dtype": dtype, "compiled": compiled}
        request |= {"constants": not known, "products": [astuple(p) for p in missing]}
        busy = is_busy(threads)
        answer = _ask(request)
        found = zip((astuple(p) for p in missing), answer.pop("products"), strict=True)
        rates |= {_key(fields): rate for fields, rate in found}
        known = known | answer
        known["products"] = [[json.loads(key), rate] for key, rate in rates.items()]
        _meanwhile[name, threads] = known
        if not busy:
            remember(name, known, threads=threads)
    table = {Product.of(json.loads(key)): rate for key, rate in rates.items()}
    return Constants(
        rates=Rates(
            flops=max(table.values(), default=1.0),
            stream=[(size, rate) for size, rate in known["stream"]],
            products=table,
            light=known["light"],
            strided=known["strided"],
            heavy=known["heavy"],
            call=known["call"],
        ),
        base_memory=known["base_memory"],
        hand_over=known["hand_over"],
    )


def _key(fields: Any) -> str:
    return json.dumps(fields)


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    env = dict(os.environ)
    spin_briefly(env)  # as in training
    done = subprocess.run(
        [sys.executable, "-m", "cllm.training.plan.probe"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"this machine could not be measured: {last[0]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
