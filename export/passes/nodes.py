"""What every graph pass does with nodes: read constants, follow values, put a node in another's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = [
    "MICROSOFT",
    "add_initializer",
    "array_of",
    "attribute",
    "fused_domain",
    "insert",
    "is_constant",
    "is_op",
    "only_consumer",
    "permuted",
    "producer",
    "substitute",
    "sweep",
]

MICROSOFT = "com.microsoft"

Array = np.ndarray[Any, Any]


def is_op(node: ir.Node | None, op_type: str, domain: str = "") -> bool:
    """Return whether there is a node and it is this operator."""
    return node is not None and node.op_type == op_type and node.domain == domain


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return an attribute's value; sequences as tuples."""
    found = node.attributes.get(name)
    if found is None:
        return default
    value = found.value
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is fixed in the file. An input with a default is not: it can be fed."""
    if value is None or value.is_graph_input():
        return False
    return ir.convenience.get_const_tensor(value) is not None


def array_of(value: ir.Value | None) -> Array | None:
    """Return a constant's content, or None where it is no constant."""
    if value is None or not is_constant(value):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def producer(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value; None for inputs, initializers and left-out inputs."""
    return None if value is None else value.producer()


def only_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the one node of this operator that reads a value which nothing else reads, or None."""
    consumers = value.consumers()
    if value.is_graph_output() or len(consumers) != 1 or not is_op(consumers[0], op_type):
        return None
    return consumers[0]


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    outputs: int = 1,
    shape: ir.Shape | None = None,
    dtype: ir.DataType | None = None,
) -> ir.Node:
    """Return a new node in front of another.

    Args:
        shape: of the first output, where it is known.
        dtype: the same; None means that of the first input.
    """
    node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    first = node.outputs[0]
    dtype = dtype or (inputs[0].dtype if inputs and inputs[0] is not None else None)
    if dtype is not None:
        first.dtype = dtype
    first.shape = shape
    return node


def add_initializer(graph: ir.Graph, name: str, tensor: Array | ir.TensorProtocol) -> ir.Value:
    """Return a new initializer under the name, or the name with a number where it is taken."""
    unique, number = name, 0
    while unique in graph.initializers:
        number += 1
        unique = f"{name}_{number}"
    held: Any = ir.tensor(tensor) if isinstance(tensor, np.ndarray) else tensor
    held.name = unique
    value = ir.Value(name=unique, shape=ir.Shape(held.shape), type=ir.TensorType(held.dtype))
    value.const_value = held
    graph.register_initializer(value)
    return value


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Let everything read `new` where it read `old`; a graph output keeps its name, type and shape."""
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    if old.is_graph_output():
        name, old.name = old.name, None
        new.name, new.shape, new.type = name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def permuted(value: ir.Value, order: Sequence[int]) -> ir.Shape | None:
    """Return a value's shape with its axes in another order; None where it is not known."""
    if value.shape is None or len(value.shape) != len(order):
        return None
    dims: list[Any] = [value.shape[axis] for axis in order]
    return ir.Shape(dims)


def sweep(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads; inputs and outputs stay, read or not."""
    graph = model.graph
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]


def fused_domain(model: ir.Model) -> None:
    """Declare ONNX Runtime's own operators in the model."""
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
