"""What devices send each other: bytes of the busiest, and the seconds that they take.

The α–β model (Hockney 1994): a message of n bytes takes latency + n / bandwidth. A sum of n bytes
everywhere is a ring's (Patarasuk & Yuan 2009), which sends 2(N−1)/N of them in 2(N−1) messages, or, where
they are few, doublings of log N messages (Thakur, Rabenseifner & Gropp 2005); to gather or to scatter them
is half a ring. Between processes of this machine each of these was measured over gloo at several sizes
(``cllm.training.plan.link_probe``), with what the library does beside the sending. Torch's gloo scatters a
sum by summing everywhere, so that it sends twice as much there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

NUMBER = 8
"""Bytes of a number that all add up, as the loss."""
ORDER = 120
"""Bytes of what the first tells the others to do."""
TOKEN = 8
"""Bytes of a token's id, and of its target."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Between ``count`` devices. ``link``: bytes a second that each sends while it receives as many;
    ``latency``: seconds of an empty message. ``measured``: by way of sending, (bytes, seconds), ascending,
    which go before the model."""

    count: int
    link: float
    latency: float
    measured: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def of_gloo(cls, count: int, measured: Mapping[str, Sequence[tuple[float, float]]]) -> Network:
        """That of ``count`` processes of this machine, as it was measured."""
        rising = {}
        for way, table in measured.items():  # more bytes take no less time, whatever came between
            sizes, seconds = zip(*table, strict=True)
            rising[way] = list(zip(sizes, accumulate(seconds, max), strict=True))
        (_, latency), *_, (size, whole) = rising["exchange"]
        link = size / max(whole - latency, 1e-9)
        return cls(count=count, link=link, latency=latency, measured=rising)

    def exchange(self, size: float) -> float:
        """Seconds in which a device sends ``size`` bytes to its neighbour, and receives as many."""
        return self._known("exchange", size, self.latency + size / self.link)

    def all_reduce(self, size: float, among: int | None = None) -> float:
        """Seconds in which ``size`` bytes are summed everywhere (``among`` some of the devices)."""
        count = self.count if among is None else among
        if count == 1:
            return 0.0
        ring = 2 * (count - 1) * (self.latency + size / count / self.link)
        doublings = math.ceil(math.log2(count)) * (self.latency + size / self.link)
        model = min(ring, doublings)
        return self._known("all_reduce", size, model) if count == self.count else model

    def all_gather(self, size: float) -> float:
        """Seconds until each has all ``size`` bytes, of which each had a share."""
        return self._known("all_gather", size, self._half_ring(size)) if self.count > 1 else 0.0

    def reduce_scatter(self, size: float) -> float:
        """Seconds until each has its share of a sum of ``size`` bytes."""
        return self.all_reduce(size) if self.measured else self._half_ring(size)

    def summed(self, size: float, among: int | None = None) -> float:
        """Bytes that a device sends for a large ``all_reduce``."""
        return 2 * self.gathered(size, among)

    def gathered(self, size: float, among: int | None = None) -> float:
        """Bytes that a device sends for an ``all_gather``."""
        count = self.count if among is None else among
        return (count - 1) / count * size

    def scattered(self, size: float) -> float:
        """Bytes that a device sends for a ``reduce_scatter``."""
        return self.summed(size) if self.measured else self.gathered(size)

    def order(self, tokens: float, numbers: int) -> tuple[float, float]:
        """What every step has: the first says what to do, gives each other one the windows of ``tokens``
        tokens, and ``numbers`` numbers are added up. (bytes that the first sends, seconds)"""
        others = self.count - 1
        if not others:
            return 0.0, 0.0
        windows = 2 * TOKEN * tokens * others
        messages = self.exchange(ORDER) + self.exchange(windows)
        sent = windows + ORDER + numbers * self.summed(NUMBER)
        return sent, messages + numbers * self.all_reduce(NUMBER)

    def _half_ring(self, size: float) -> float:
        return (self.count - 1) * (self.latency + size / self.count / self.link)

    def _known(self, way: str, size: float, model: float) -> float:
        """The measured seconds, in a line between two sizes, and the last two's further on."""
        table = self.measured.get(way)
        if not table:
            return model
        if size <= table[0][0]:
            return table[0][1]
        pairs = list(pairwise(table))
        (low, first), (high, last) = next((p for p in pairs if size <= p[1][0]), pairs[-1])
        return first + (size - low) * (last - first) / (high - low)
