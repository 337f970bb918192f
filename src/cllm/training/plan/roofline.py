"""A roofline model of a training step: each piece of work is bound by arithmetic or by memory.

Williams, Waterman & Patterson, "Roofline: an insightful visual performance model" (2009). A matrix product
takes its operations at the rate of its shape; everything else the larger of what it reads and writes at
the bandwidth of where it lies, and of its elements at the rate of their arithmetic. A buffer lies in the
smallest cache that holds all that was touched since it was last touched itself (its reuse distance, Mattson
et al. 1970); a new one lies wherever the allocator has room, which is as far as all that is in use.
Eager code is one piece of work an operation. Of compiled code, operations between two products count as
fused: buffers that none but them see are not written, as Inductor does it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from cllm.training.plan.trace import ALONE, FUSED_ATTENTION, HEAVY, Operation, Product, Trace


@dataclass(frozen=True)
class Task:
    """A piece of work: a product, or elements to compute. ``read`` and ``made``: buffers that it needs and
    that it leaves, with their bytes. ``strided``: elements of operations whose input lies otherwise than
    their output. ``distances``: bytes to move, and how far back they lie in bytes."""

    light: int
    strided: int
    heavy: int
    product: Product | None
    read: Mapping[int, int]
    made: Mapping[int, int]
    distances: tuple[tuple[int, int], ...] = ()

    @property
    def bytes(self) -> int:
        """All that it moves."""
        return sum(self.read.values()) + sum(self.made.values())


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device can do. Seconds, bytes and floating-point operations.

    ``products``: rates by shape; ``flops``: for those without one. ``stream``: (working set in bytes, bytes
    a second), ascending. ``light``, ``strided`` and ``heavy``: seconds an element, of simple operations, of
    those over strides, and of those with an exponential. ``call``: seconds that a piece of work takes to
    begin. ``slowness``: what a whole step takes, as a multiple of what the model makes of all these.
    """

    flops: float
    stream: Sequence[tuple[float, float]]
    products: Mapping[Product, float]
    light: float = 0.0
    strided: float = 0.0
    heavy: float = 0.0
    call: float = 0.0
    slowness: float = 1.0

    def bandwidth(self, size: float) -> float:
        """Bytes a second where ``size`` bytes are in use: between two measurements in a line over the
        logarithm of the size."""
        sizes = [known for known, _ in self.stream]
        place = bisect_left(sizes, size)
        if place in (0, len(sizes)):
            return self.stream[min(place, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.stream[place - 1], self.stream[place]
        share = math.log(size / low) / math.log(high / low)
        return slow + share * (fast - slow)

    def seconds(self, task: Task) -> float:
        """The time of a piece of work."""
        moving = math.fsum(size / self.bandwidth(far) for size, far in task.distances)
        if task.product is None:
            arithmetic = task.light * self.light + task.strided * self.strided
            arithmetic += task.heavy * self.heavy
        elif task.product in self.products:
            # Measured over and over on the same numbers, which lay as near as they could.
            near = task.bytes / self.bandwidth(task.bytes)
            arithmetic = task.product.flops / self.products[task.product]
            return self.call + arithmetic + max(moving - near, 0.0)
        else:
            arithmetic = task.product.flops / self.flops
        return self.call + max(arithmetic, moving)


@lru_cache(maxsize=64)
def tasks_of(trace: Trace, compiled: bool) -> list[Task]:
    """The pieces of work of a finished trace, in their order."""
    if not compiled:
        return _placed([_eager(op) for op in trace.operations], trace.peak)
    groups: list[list[Operation]] = []
    open_group = False
    for op in trace.operations:
        if op.is_view:
            continue
        alone = op.product is not None or op.name in ALONE or FUSED_ATTENTION in op.name
        if alone or not open_group:
            groups.append([op])
        else:
            groups[-1].append(op)
        open_group = not alone
    return _placed(_fused(groups, trace.lasting), trace.peak)


def _eager(op: Operation) -> Task:
    if op.is_view:
        return Task(0, 0, 0, None, {}, {})
    count = op.elements
    light, strided, heavy = (0, 0, count) if op.name in HEAVY else (0, count, 0)
    if not heavy and not op.strided:
        light, strided = count, 0
    return Task(light, strided, heavy, op.product, op.reads, op.writes)


def _placed(tasks: Sequence[Task], room: int) -> list[Task]:
    """The tasks with their distances; what was not touched before is ``room`` bytes away."""
    touched: dict[int, int] = {}
    clock, found = 0, []
    for task in tasks:
        far = [
            (size, min(clock - touched.get(buffer, -room) + size, room))
            for buffer, size in (*task.read.items(), *task.made.items())
        ]
        clock += task.bytes
        touched |= dict.fromkeys((*task.read, *task.made), clock)
        found.append(replace(task, distances=tuple(far)))
    return found


def _fused(groups: Sequence[Sequence[Operation]], lasting: set[int]) -> list[Task]:
    last_use: dict[int, int] = {}
    for number, group in enumerate(groups):
        for op in group:
            last_use |= dict.fromkeys((*op.reads, *op.writes), number)
    tasks = []
    for number, group in enumerate(groups):
        reads: dict[int, int] = {}
        writes: dict[int, int] = {}
        light = heavy = 0
        for op in group:
            for buffer, size in op.reads.items():
                if buffer not in writes:
                    reads[buffer] = max(reads.get(buffer, 0), size)
            for buffer, size in op.writes.items():
                writes[buffer] = max(writes.get(buffer, 0), size)
            if op.name in HEAVY:
                heavy += op.elements
            else:
                light += op.elements
        kept = {
            buffer: size
            for buffer, size in writes.items()
            if buffer < 0 or buffer in lasting or last_use[buffer] > number
        }
        tasks.append(Task(light, 0, heavy, group[0].product, reads, kept))
    return tasks


def step_seconds(trace: Trace, rates: Rates, compiled: bool) -> float:
    """The time of all that a trace does."""
    return rates.slowness * math.fsum(rates.seconds(task) for task in tasks_of(trace, compiled))


def peak_bytes(trace: Trace, compiled: bool) -> tuple[int, int]:
    """The most bytes that buffers made by a trace hold at once, each until it was last used; and those
    they hold when the last of what stays is made (of a gradient: all its parts, and the whole)."""
    if not compiled:
        made = [n for n, op in enumerate(trace.operations) if set(op.writes) & trace.lasting]
        return trace.peak, trace.live[made[-1]] if made else 0
    tasks = tasks_of(trace, compiled)
    last_use: dict[int, int] = {}
    for number, task in enumerate(tasks):
        last_use |= dict.fromkeys((*task.read, *task.made), number)
    ends: dict[int, list[int]] = {}
    for buffer, number in last_use.items():
        if buffer > 0 and buffer not in trace.lasting:
            ends.setdefault(number, []).append(buffer)
    live: dict[int, int] = {}
    peak = closing = 0
    for number, task in enumerate(tasks):
        live |= {buffer: size for buffer, size in task.made.items() if buffer > 0}
        held = sum(live.values())
        peak = max(peak, held)
        closing = held if trace.lasting & set(task.made) else closing
        for buffer in ends.get(number, ()):
            live.pop(buffer, None)
    return peak, closing
