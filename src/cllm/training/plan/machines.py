"""The machines that a plan is made for: this one as it was measured, or a list that the user gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from cllm.core.errors import UsageError, UserError
from cllm.core.section import PositiveInt, Section
from cllm.training.plan.network import Network
from cllm.training.plan.roofline import Rates

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class MachineEntry(Section):
    """Devices of one kind in a machine list. All figures are the user's."""

    name: str
    count: PositiveInt = 1
    """Devices of this kind."""
    per_machine: PositiveInt | None = None
    """Devices in one machine, for the command; none means all of them."""
    tflops: dict[str, Positive]
    """10¹² floating-point operations a second of matrix products, by ``train.dtype``."""
    efficiency: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of ``tflops`` that products reach in training."""
    memory_gb: Positive
    """10⁹ bytes of memory of a device."""
    memory_gb_s: Positive
    """10⁹ bytes a second between a device and its memory."""
    link_gb_s: Positive
    """10⁹ bytes a second that a device sends while it receives as many."""
    latency_us: NotNegative
    """Microseconds of a message, whatever its size."""
    launch_us: NotNegative = 0.0
    """Microseconds that a piece of work takes to begin."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """``count`` devices that work in step: each as fast, and as large, as the least of them.

    ``rates``: what one can do; ``memory``: bytes of one, ``None`` if unknown; ``network``: what they send
    each other; ``base``: bytes of the program in each; ``is_host``: whether their memory is main memory.
    """

    name: str
    rates: Rates
    memory: float | None
    network: Network
    base: float = 0.0
    is_host: bool = False

    @property
    def count(self) -> int:
        """How many."""
        return self.network.count


def read_machines(path: Path) -> list[MachineEntry]:
    """The entries of a JSON file: a list of objects. Raises ``UsageError`` naming file and field."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no machine list {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(body, list) or not body:
        raise UsageError(f'{path} must be a list of machines, [{{"name": …}}, …]')
    return [_entry(path, number, item) for number, item in enumerate(body, start=1)]


def _entry(path: Path, number: int, item: Any) -> MachineEntry:
    try:
        return MachineEntry.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the entry"
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{path}, machine {number}: {field}: {message}") from error


def devices_of(entries: Sequence[MachineEntry], dtype: str, count: int | None = None) -> Devices:
    """All devices of a list together; ``count`` of them, if that is given.

    Raises ``UsageError`` where an entry has no rate for ``dtype``.
    """
    for entry in entries:
        if dtype not in entry.tflops:
            known = ", ".join(entry.tflops)
            raise UsageError(
                f"the machine {entry.name!r} has no tflops for {dtype} (it has: {known}); add them, or set "
                "train.dtype"
            )
    return Devices(
        name=" + ".join(entry.name for entry in entries),
        rates=Rates(
            flops=min(1e12 * entry.tflops[dtype] * entry.efficiency for entry in entries),
            stream=[(1.0, min(1e9 * entry.memory_gb_s for entry in entries))],
            products={},
            call=max(1e-6 * entry.launch_us for entry in entries),
        ),
        memory=min(1e9 * entry.memory_gb for entry in entries),
        network=Network(
            count=count or sum(entry.count for entry in entries),
            link=min(1e9 * entry.link_gb_s for entry in entries),
            latency=max(1e-6 * entry.latency_us for entry in entries),
        ),
    )
