"""The constants of this machine, measured once by ``cllm.training.plan.probe`` and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from cllm.core.config import Config
from cllm.core.cpu import is_busy
from cllm.core.measurements import recall, remember
from cllm.training.plan.ask import ask
from cllm.training.plan.probe import reference
from cllm.training.plan.roofline import Rates
from cllm.training.plan.trace import Product
from cllm.training.plan.work import products_of, work_of


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What was measured: ``rates`` of one process, while as many others are at work as it has beside it;
    ``base_memory``: bytes of a process that trains a model of no size; ``hand_over``: seconds of a message
    to another thread, on any core, and back."""

    rates: Rates
    base_memory: int
    hand_over: float


def constants(
    products: Iterable[Product],
    *,
    threads: int,
    dtype: str,
    compiled: bool,
    together: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Constants:
    """The constants for a number of threads, a precision, and compiled or eager code.

    ``products``: the shapes that are needed; those not yet known are measured. ``together``: processes that
    are at work at once, which share caches and the way to memory; the slowest counts, as they work in step.
    What was measured on a busy machine is kept in this process only. Raises ``UserError`` where the
    measuring process fails.
    """
    how = _How(threads, dtype, compiled)
    known = _known(how, products, together, say)
    # Probes of several have one core each, and a message between two threads of one core is no message
    # between workers.
    alone = known if together == 1 else _known(how, [], 1, say)
    return Constants(
        rates=_rates(how, known),
        base_memory=known["base_memory"],
        hand_over=alone["hand_over"],
    )


@dataclass(frozen=True)
class _How:
    """What constants are of."""

    threads: int
    dtype: str
    compiled: bool

    @property
    def reference(self) -> Config:
        """What is measured whole."""
        return reference(self.threads, self.dtype, self.compiled)

    @property
    def code(self) -> str:
        return "compiled" if self.compiled else "eager"


def _known(
    how: _How, products: Iterable[Product], together: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """What was measured of ``together`` processes, these products among it; measured now if need be."""
    threads = how.threads
    products = (*products, *products_of(how.reference))
    name = f"plan 3 {how.dtype} {how.code}" + (f" by {together}" if together > 1 else "")
    known: dict[str, Any] = recall(name, threads=threads) or {}
    rates = {_key(fields): rate for fields, rate in known.get("products", [])}
    missing = [p for p in dict.fromkeys(products) if _key(astuple(p)) not in rates]
    if known and not missing:
        return known
    busy = is_busy(threads * together)
    if known.get("spoiled") and not busy:  # that was for want of better
        known, rates, missing = {}, {}, list(dict.fromkeys(products))
    what = f"{threads} thread{'s' * (threads > 1)}, {how.dtype}, {how.code} code"
    what += f", {together} processes at once" if together > 1 else ""
    say(f"measuring this machine once: {what}, {len(missing)} shapes of products")
    request = {"threads": threads, "dtype": how.dtype, "compiled": how.compiled}
    request |= {"constants": not known, "products": [astuple(p) for p in missing]}
    answer = slowest(ask(request, together))
    found = zip((astuple(p) for p in missing), answer.pop("products"), strict=True)
    rates |= {_key(fields): rate for fields, rate in found}
    known = known | answer | {"spoiled": busy is not None}
    known["products"] = [[json.loads(key), rate] for key, rate in rates.items()]
    remember(name, known, threads=threads, for_good=not busy)
    return known


def slowest(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One answer of processes that measured at once: of each rate the least, of seconds and bytes the
    most."""
    found: dict[str, Any] = {}
    for name, first in answers[0].items():
        every = [answer[name] for answer in answers]
        if name == "products":
            found[name] = [min(rates) for rates in zip(*every, strict=True)]
        elif name == "stream":
            found[name] = [
                [size, min(stream[place][1] for stream in every)]
                for place, (size, _) in enumerate(first)
            ]
        else:
            found[name] = max(every)
    return found


def _rates(how: _How, known: dict[str, Any]) -> Rates:
    """The rates, and how much slower than by them the reference's step was."""
    table = {Product.of(fields): rate for fields, rate in known["products"]}
    rates = Rates(
        flops=max(table.values(), default=1.0),
        stream=[(size, rate) for size, rate in known["stream"]],
        products=table,
        light=known["light"],
        strided=known["strided"],
        heavy=known["heavy"],
        call=known["call"],
    )
    config = how.reference
    work = work_of(config, rates)
    layers = config.model.n_layers
    foretold = work.micro.of(layers) + work.end.of(layers)
    return replace(rates, slowness=known["reference"] / foretold)


def _key(fields: Any) -> str:
    return json.dumps(fields)
