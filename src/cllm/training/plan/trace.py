"""What a training step does, operation by operation: its own code, run on tensors without memory.

The step of ``cllm.training.step`` runs on torch's fake tensors, and a dispatch mode writes down each
operation with what it reads and writes. So counts are those of the code, for every shape and setting,
and how long each buffer lives is seen and not guessed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cllm.core.config import Config
from cllm.model.transformer import Transformer
from cllm.training.arena import Arena
from cllm.training.choose import arithmetic
from cllm.training.gradient import Gradients, Micro
from cllm.training.optimizer import OPTIMIZERS

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
FUSED_ATTENTION = "scaled_dot_product"
"""A part of the names of fused attention."""
HEAVY = {"exp", "log", "sigmoid", "silu", "tanh", "gelu", "gelu_backward", "_softmax"}
"""Operations with an exponential in each element."""
NOTHING = {"empty", "empty_like", "new_empty", "empty_strided"}
ALONE = {
    "embedding",
    "add_rows",
    "index",
    "embedding_dense_backward",
    "_fused_adamw_",
    "_fused_sgd_",
}
"""Operations that no compiler fuses with others, or that read rows here and there."""


@dataclass(frozen=True)
class Product:
    """A matrix product: ``batch`` times (rows, inner) @ (inner, columns). ``turned``: which factor lies in
    memory by columns."""

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: str
    turned: tuple[bool, bool] = (False, False)

    @classmethod
    def of(cls, fields: list[Any]) -> Product:
        """The product of a JSON list of its fields."""
        batch, rows, inner, columns, dtype, turned = fields
        return cls(batch, rows, inner, columns, dtype, tuple(turned))

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each multiplication."""
        return 2 * self.batch * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Operation:
    """One operation. ``reads`` and ``writes``: buffer to bytes; ``elements``: numbers that it computes."""

    name: str
    reads: dict[int, int]
    writes: dict[int, int]
    elements: int
    product: Product | None = None
    strided: bool = False
    """Whether something that it reads does not lie as its result does, or is repeated."""

    @property
    def is_view(self) -> bool:
        """Whether it only looks at memory in another way."""
        return not self.elements

    @property
    def bytes(self) -> int:
        """All that it reads and writes, where nothing is fused."""
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass(eq=False)
class Trace:
    """Operations in their order; buffers that are made by them, and that stay when they end.

    ``peak``: the most bytes that buffers made here held at once, as eager code frees them; ``live``: those
    held after each operation.
    """

    operations: list[Operation] = field(default_factory=list)
    lasting: set[int] = field(default_factory=set)
    peak: int = 0
    live: list[int] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(op.product.flops for op in self.operations if op.product is not None)


@dataclass(frozen=True)
class StepTrace:
    """``micro``: forward and backward of one micro-batch into the summed gradient; ``end``: check,
    clipping, optimizer. ``parameters`` learned numbers, ``arena`` those with padding."""

    micro: Trace
    end: Trace
    parameters: int
    arena: int


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._live = 0
        self._known: dict[int, tuple[Any, int]] = {}
        self._count = 0

    def number(self, tensor: Tensor, made: bool = False) -> int:
        """The buffer of a tensor: numbers from 1 for those made under the recorder, below 0 for others."""
        storage = tensor.untyped_storage()
        found = self._known.get(id(storage))
        if found is not None and found[0]() is storage:
            return found[1]
        self._count += 1
        number, size = (self._count if made else -self._count), storage.nbytes()
        if made:
            self._live += size
            self.trace.peak = max(self.trace.peak, self._live)

        def gone(reference: Any, key: int = id(storage)) -> None:
            if made:
                self._live -= size
            if (entry := self._known.get(key)) is not None and entry[0] is reference:
                del self._known[key]

        self._known[id(storage)] = (weakref.ref(storage, gone), number)
        return number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        reads = {self.number(tensor): _bytes(tensor) for tensor in given}
        out = func(*args, **(kwargs or {}))
        changed = [
            tensor
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if _is_written(argument)
            for tensor in tree_leaves(value)
            if isinstance(tensor, Tensor)
        ]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        made = [t for t in made if self.number(t, made=True) not in reads]
        writes = {self.number(tensor): _bytes(tensor) for tensor in (*made, *changed)}
        name = func.__name__.split(".")[0]
        elements = 0
        if writes and name not in NOTHING:
            elements = max(tensor.numel() for tensor in (*given, *made))
        product = _product(name, given) if elements else None
        strided = any(
            tensor.numel() > 1 and (not tensor.is_contiguous() or tensor.numel() < elements)
            for tensor in given
        )
        self.trace.operations.append(Operation(name, reads, writes, elements, product, strided))
        self.trace.live.append(self._live)
        return out


def _bytes(tensor: Tensor) -> int:
    """What is read of a tensor: what is repeated (expanded) is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _product(name: str, given: list[Tensor]) -> Product | None:
    if FUSED_ATTENTION in name:
        # Scores and their sum over values; backward makes scores anew, and then four products.
        q = given[1] if "backward" in name else given[0]
        products = 5 if "backward" in name else 2
        length, width = q.shape[-2:]
        dtype = str(q.dtype).removeprefix("torch.")
        return Product(q.shape[0] * q.shape[1], length, width, products * length, dtype)
    if name not in PRODUCTS:
        return None
    a, b = given[-2:]
    turned = (a.stride(-1) != 1 and a.shape[-1] > 1, b.stride(-1) != 1 and b.shape[-1] > 1)
    batch = a.shape[0] if a.dim() == 3 else 1
    dtype = str(a.dtype).removeprefix("torch.")
    return Product(batch, a.shape[-2], a.shape[-1], b.shape[-1], dtype, turned)


@contextmanager
def _recorded() -> Iterator[_Recorder]:
    recorder = _Recorder()
    with recorder:
        yield recorder


def trace_step(config: Config) -> StepTrace:
    """The operations of a step of ``config``, which must be resolved and on the exact loss."""
    train, model = config.train, config.model
    assert isinstance(train.loss_chunk, int)
    with FakeTensorMode():
        network = Transformer(model, attention=train.attention)
        arena = Arena.adopt(network, arithmetic(train), OPTIMIZERS[train.optimizer].moments)
        gradients = Gradients(network.train(), arena, train.loss_chunk)
        optimizer = OPTIMIZERS[train.optimizer](train)
        ids = torch.zeros(train.batch_size, model.context, dtype=torch.int64)
        one = torch.ones((), dtype=arena.weights.dtype)
        with _recorded() as first:
            found = gradients.backward(Micro(ids, ids), one, {})
            first.trace.lasting = {first.number(found.flat), first.number(found.loss)}
        with _recorded() as last:  # as ``cllm.training.update`` does it
            torch.linalg.vector_norm(found.flat)
            for part in arena.parts():
                optimizer.update(part, part.of(found.flat), 0.5, train.lr, 1)
    learned = sum(p.numel() for p in network.parameters())
    return StepTrace(first.trace, last.trace, learned, arena.layout.size)


@lru_cache(maxsize=256)
def _traced(key: str) -> StepTrace:
    return trace_step(Config.model_validate_json(key))


def traced(config: Config) -> StepTrace:
    """``trace_step``, kept by configuration."""
    return _traced(config.model_dump_json())
