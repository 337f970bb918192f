"""Weights of an ONNX graph in blocks of integers: ONNX Runtime's ``MatMulNBits``, weights only.

Activations and sums stay float32. A token table is stored once: scores multiply with it, and the
look-up takes rows of the same integers.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from cllm.export.rounding import BLOCK, Rounded

Packed = dict[bytes, Rounded]
"""Rounded weights by the bytes of their values, which the exporter keeps where it renames and turns."""


def key(values: np.ndarray) -> bytes:
    """What a weight's values are found by."""
    return np.ascontiguousarray(values, dtype=np.float32).tobytes()


def pack(model: Any, onnx: ModuleType, packed: Packed) -> int:
    """Store the weights in ``packed`` as integers, in place; returns how many products take them."""
    graph = model.graph
    values = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    turned = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in values
    }
    made: dict[str, Rounded] = {}
    nodes, count = [], 0
    for node in graph.node:
        found = _weight(node, values, turned, packed)
        if node.op_type == "MatMul" and found:
            nodes.append(_product(onnx, node, *found))
            made[found[0]] = found[1]
            count += 1
        elif node.op_type == "Gather" and found:
            nodes += _look_up(onnx, node, *found)
            made[found[0]] = found[1]
        else:
            nodes.append(node)
    kept = _used(nodes, {output.name for output in graph.output})
    del graph.node[:]
    graph.node.extend(kept)
    _store(onnx, graph, made)
    if not any(item.domain == "com.microsoft" for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return count


def _weight(
    node: Any, values: dict[str, np.ndarray], turned: dict[str, str], packed: Packed
) -> tuple[str, Rounded] | None:
    """(name of its initializer, what it is rounded to) if the node takes a weight in ``packed``."""
    if node.op_type not in ("MatMul", "Gather"):
        return None
    name = node.input[1] if node.op_type == "MatMul" else node.input[0]
    by_rows = node.op_type == "Gather" or name in turned
    name = turned.get(name, name)
    if name not in values or values[name].ndim != 2:
        return None
    found = packed.get(key(values[name] if by_rows else values[name].T))
    return None if found is None else (name, found)


def _product(onnx: ModuleType, node: Any, name: str, weight: Rounded) -> Any:
    rows, columns = weight.integers.shape
    return onnx.helper.make_node(
        "MatMulNBits",
        [node.input[0], f"{name}.blocks", f"{name}.scales"],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=weight.bits,
        block_size=BLOCK,
        accuracy_level=1,  # float32
    )


def _look_up(onnx: ModuleType, node: Any, name: str, weight: Rounded) -> list[Any]:
    """Rows of the table's integers, times their scales. Integers are stored with 128 added."""
    assert weight.bits == 8, "tables are stored in bytes"
    out, make = node.output[0], onnx.helper.make_node
    return [
        make("Gather", [f"{name}.blocks", node.input[1]], [f"{out}.bytes"], axis=0),
        make("Cast", [f"{out}.bytes"], [f"{out}.floats"], to=onnx.TensorProto.FLOAT),
        make("Sub", [f"{out}.floats", "zero_point"], [f"{out}.integers"]),
        make("Gather", [f"{name}.scales", node.input[1]], [f"{out}.scales"], axis=0),
        make("Unsqueeze", [f"{out}.scales", "last_axis"], [f"{out}.factors"]),
        make("Mul", [f"{out}.integers", f"{out}.factors"], [f"{out}.blocks"]),
        make("Shape", [node.input[1]], [f"{out}.ids_shape"]),
        make("Concat", [f"{out}.ids_shape", f"{name}.width"], [f"{out}.shape"], axis=0),
        make("Reshape", [f"{out}.blocks", f"{out}.shape"], [out]),
    ]


def _used(nodes: list[Any], wanted: set[str]) -> list[Any]:
    """The nodes that something needs, in their order."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _store(onnx: ModuleType, graph: Any, made: dict[str, Rounded]) -> None:
    """Put the integers in the place of the initializers that nothing takes any more."""
    new = {
        "zero_point": np.array(128, np.float32),
        "last_axis": np.array([-1], np.int64),
    }
    for name, weight in made.items():
        new[f"{name}.blocks"] = blob(weight)
        new[f"{name}.scales"] = weight.scales
        new[f"{name}.width"] = np.array([weight.integers.shape[1]], np.int64)
    taken = {name for node in graph.node for name in node.input}
    old = [item for item in graph.initializer if item.name in taken]
    del graph.initializer[:]
    graph.initializer.extend(old)
    for name, value in new.items():
        if name in taken:
            graph.initializer.append(onnx.numpy_helper.from_array(value, name))


def blob(weight: Rounded) -> np.ndarray:
    """(rows, blocks, bytes) uint8 as ``MatMulNBits`` has them: integers moved to start at 0, of two
    4-bit ones the first in the low half of the byte."""
    rows = len(weight.integers)
    moved = (weight.integers.astype(np.int16) + 2 ** (weight.bits - 1)).astype(np.uint8)
    moved = moved.reshape(rows, -1, BLOCK)
    return moved if weight.bits == 8 else moved[:, :, ::2] | (moved[:, :, 1::2] << 4)
