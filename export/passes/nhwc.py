"""Channels last: convolutions as NhwcConv, and the layout carried on until something needs the other one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from dbadapter.export.passes.nodes import (
    MICROSOFT,
    add_initializer,
    array_of,
    attribute,
    fused_domain,
    insert,
    is_constant,
    is_op,
    permuted,
    producer,
    substitute,
    sweep,
)

__all__ = ["count_convs", "count_transposes", "expected_transposes", "to_nhwc"]

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
ELEMENTWISE = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Relu", "Sigmoid", "Sub", "Tanh"})


def to_nhwc(model: ir.Model) -> int:
    """Replace 2-D convolutions by com.microsoft.NhwcConv, and return how many.

    Every value of four dimensions that a convolution or a group norm makes is kept in NHWC; sums, products,
    activations, concatenations of channels, nearest resizes and shapes are computed there too. A transpose
    is left only where such a value enters or leaves: at the graph's ends in a UNet, whose transformers
    read (batch, height * width, channels) anyway.

    Weights in the file are stored as (out, height, width, in), as the kernel reads them. Weights that are
    inputs, as an adapter's are, get a transpose of their own; they are small.

    Precondition: nodes in topological order; values that come from outside the convolutions have shapes.
    Postcondition: inputs, outputs and results are as before.
    """
    layout = _Layout(model)
    for node in list(model.graph):
        layout.visit(node)
    layout.leave()
    if layout.convs:
        fused_domain(model)
        sweep(model)
    return layout.convs


def count_convs(model: ir.Model) -> int:
    """Return how many 2-D convolutions a graph has."""
    return sum(is_op(node, "Conv") and _rank(node.inputs[1]) == 4 for node in model.graph)


def count_transposes(model: ir.Model) -> int:
    """Return how many transposes between the layouts a graph has; those of matrices are not counted."""
    layouts = (TO_NHWC, TO_NCHW)
    return sum(is_op(node, "Transpose") and attribute(node, "perm") in layouts for node in model.graph)


def expected_transposes(model: ir.Model) -> int:
    """Return how many transposes a UNet keeps in NHWC: for each picture that comes or goes, and for each
    convolution whose weight is no constant. Everything between can cancel. Asked before the passes run."""
    pictures = [
        value
        for value in model.graph.inputs
        if any(is_op(node, "Conv") and node.inputs[0] is value for node in value.consumers())
    ]
    pictures += [value for value in model.graph.outputs if is_op(producer(value), "Conv")]
    weights = {
        id(node.inputs[1])
        for node in model.graph
        if is_op(node, "Conv") and _rank(node.inputs[1]) == 4 and not is_constant(node.inputs[1])
    }
    return len(pictures) + len(weights)


class _Layout:
    """One walk over a graph: which values have a twin in NHWC, and what was replaced by it."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.nhwc: dict[ir.Value, ir.Value] = {}
        self.weights: dict[ir.Value, ir.Value] = {}
        self.replaced: list[tuple[ir.Node, ir.Value, ir.Value]] = []
        self.convs = 0

    def visit(self, node: ir.Node) -> None:
        """Compute a node in NHWC where it can be, beside the old one, which `leave` removes."""
        if node.domain != "":
            return
        visitors: dict[str, Callable[[ir.Node], None]] = {
            "Concat": self._concat,
            "Conv": self._conv,
            "Resize": self._resize,
            "Shape": self._shape,
            "Transpose": self._transpose,
        }
        if node.op_type in ELEMENTWISE:
            self._elementwise(node)
        elif node.op_type in visitors:
            visitors[node.op_type](node)

    def leave(self) -> None:
        """Remove what was replaced; what is still read becomes a transpose of its twin."""
        for node, old, new in reversed(self.replaced):
            if old.uses() or old.is_graph_output():
                if is_op(node, "Transpose"):
                    continue  # it is that transpose
                back = insert(node, "Transpose", [new], {"perm": TO_NCHW}, shape=old.shape)
                substitute(old, back.outputs[0])
            self.graph.remove(node, safe=True)

    def _twin(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return a value of four dimensions in NHWC, transposed in front of the node if it must be."""
        if value not in self.nhwc:
            unsqueezed = self._unsqueezed(node, value)
            if unsqueezed is None:
                transpose = insert(
                    node, "Transpose", [value], {"perm": TO_NHWC}, shape=permuted(value, TO_NHWC)
                )
                unsqueezed = transpose.outputs[0]
            self.nhwc[value] = unsqueezed
        return self.nhwc[value]

    def _unsqueezed(self, node: ir.Node, value: ir.Value) -> ir.Value | None:
        """Return (batch, 1, 1, channels) of a value that is (batch, channels, 1, 1) by an Unsqueeze."""
        source = producer(value)
        if source is None or not is_op(source, "Unsqueeze"):
            return None
        axes = array_of(source.inputs[1])
        if axes is None or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            return None
        name = "nhwc_axes"
        held = self.graph.initializers.get(name)
        if held is None:
            held = add_initializer(self.graph, name, np.array([1, 2], np.int64))
        return insert(
            node, "Unsqueeze", [source.inputs[0], held], dtype=value.dtype, shape=permuted(value, TO_NHWC)
        ).outputs[0]

    def _operand(self, node: ir.Node, value: ir.Value) -> ir.Value | None:
        """Return what stands for an operand of an elementwise node in NHWC; None where that is unknown."""
        if value in self.nhwc:
            return self.nhwc[value]
        if value.shape is not None and all(dim == 1 for dim in value.shape):
            return value  # a number, in whatever rank
        if is_constant(value):
            array = array_of(value)
            assert array is not None
            if array.ndim == 3 or (array.ndim == 4 and array.shape[0] == 1):
                turned = np.ascontiguousarray(np.moveaxis(array, -3, -1))
                return add_initializer(self.graph, f"{value.name}_nhwc", turned)
            return None
        if _rank(value) == 4 or self._is_unsqueezed(value):
            return self._twin(node, value)
        return None

    @staticmethod
    def _is_unsqueezed(value: ir.Value) -> bool:
        source = producer(value)
        axes = array_of(source.inputs[1]) if source is not None and is_op(source, "Unsqueeze") else None
        return axes is not None and tuple(axes) in {(2, 3), (-2, -1)}

    def _replace(self, node: ir.Node, twin: ir.Value) -> None:
        self.nhwc[node.outputs[0]] = twin
        self.replaced.append((node, node.outputs[0], twin))

    def _same(self, node: ir.Node, inputs: list[ir.Value | None], attributes: dict[str, Any]) -> None:
        out = node.outputs[0]
        twin = insert(
            node,
            node.op_type,
            inputs,
            attributes,
            domain=node.domain,
            shape=permuted(out, TO_NHWC),
            dtype=out.dtype,
        )
        self._replace(node, twin.outputs[0])

    def _transpose(self, node: ir.Node) -> None:
        perm, value, out = attribute(node, "perm"), node.inputs[0], node.outputs[0]
        assert value is not None
        if perm == TO_NCHW:
            self._replace(node, value)
        elif perm == TO_NHWC and value not in self.nhwc:
            self.nhwc[value] = out
        elif perm == TO_NHWC and not out.is_graph_output():
            out.replace_all_uses_with(self.nhwc[value])
            self.graph.remove(node, safe=True)

    def _conv(self, node: ir.Node) -> None:
        value, weight = node.inputs[0], node.inputs[1]
        if value is None or weight is None or _rank(weight) != 4:
            return
        inputs = [self._twin(node, value), self._weight(node, weight), *node.inputs[2:]]
        out = node.outputs[0]
        conv = insert(
            node,
            "NhwcConv",
            inputs,
            _attributes(node),
            domain=MICROSOFT,
            shape=permuted(out, TO_NHWC),
            dtype=out.dtype,
        )
        self._replace(node, conv.outputs[0])
        self.convs += 1

    def _weight(self, node: ir.Node, weight: ir.Value) -> ir.Value:
        """Return (out, height, width, in) of a weight (out, in, height, width)."""
        if weight not in self.weights:
            tensor = ir.convenience.get_const_tensor(weight) if is_constant(weight) else None
            if tensor is None:
                turned = insert(
                    node, "Transpose", [weight], {"perm": TO_NHWC}, shape=permuted(weight, TO_NHWC)
                )
                self.weights[weight] = turned.outputs[0]
            else:
                self.weights[weight] = add_initializer(self.graph, f"{weight.name}_nhwc", _turned(tensor))
        return self.weights[weight]

    def _elementwise(self, node: ir.Node) -> None:
        values = [value for value in node.inputs if value is not None]
        if len(values) != len(node.inputs) or not any(value in self.nhwc for value in values):
            return
        operands: list[ir.Value | None] = [self._operand(node, value) for value in values]
        if all(operand is not None for operand in operands):
            self._same(node, operands, _attributes(node))

    def _concat(self, node: ir.Node) -> None:
        values = [value for value in node.inputs if value is not None]
        if any(value in self.nhwc for value in values) and attribute(node, "axis") in (1, -3):
            self._same(node, [self._twin(node, value) for value in values], {"axis": 3})

    def _resize(self, node: ir.Node) -> None:
        """Only nearest: the CUDA provider's kernel for it takes scales of any axis."""
        value = node.inputs[0]
        if value is None or value not in self.nhwc or attribute(node, "mode", "nearest") != "nearest":
            return
        if any(name in node.attributes for name in ("axes",)):
            return
        factors: list[ir.Value | None] = []
        for given in node.inputs[1:]:
            if given is None or (is_constant(given) and array_of(given).size == 0):  # type: ignore[union-attr]
                factors.append(given)
            elif given is node.inputs[1]:
                return  # a region of interest, which nearest does not have
            else:
                factors.append(self._turned_list(node, given))
        self._same(node, [self.nhwc[value], *factors], _attributes(node))

    def _turned_list(self, node: ir.Node, four: ir.Value) -> ir.Value:
        """Return four numbers, one for each axis, in NHWC's order."""
        array = array_of(four)
        if array is not None:
            return add_initializer(self.graph, f"{four.name}_nhwc", array[list(TO_NHWC)])
        return self._gathered(node, four, TO_NHWC)

    def _gathered(self, node: ir.Node, numbers: ir.Value, order: tuple[int, ...]) -> ir.Value:
        indices = add_initializer(self.graph, "layout_axes", np.array(order, np.int64))
        gather = insert(node, "Gather", [numbers, indices], {"axis": 0}, shape=ir.Shape([len(order)]))
        return gather.outputs[0]

    def _shape(self, node: ir.Node) -> None:
        """Read a shape from the twin, so that no picture is transposed only for that."""
        value = node.inputs[0]
        if value is None or value not in self.nhwc:
            return
        start, end = attribute(node, "start", 0), attribute(node, "end", 4)
        kept = tuple(TO_NCHW[start:end])
        shape = insert(node, "Shape", [self.nhwc[value]], dtype=ir.DataType.INT64, shape=ir.Shape([4]))
        substitute(node.outputs[0], self._gathered(node, shape.outputs[0], kept))
        self.graph.remove(node, safe=True)


def _turned(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """Return a weight's tensor in NHWC, computed when it is saved: all of them at once are gigabytes."""
    dims: list[Any] = [tensor.shape[axis] for axis in TO_NHWC]
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().transpose(TO_NHWC))),
        dtype=tensor.dtype,
        shape=ir.Shape(dims),
    )


def _attributes(node: ir.Node) -> dict[str, Any]:
    return dict(node.attributes)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
