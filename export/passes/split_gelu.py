"""GEGLU of the feed-forward layers as one node: bias, split, and one half times the GELU of the other."""

from __future__ import annotations

from collections.abc import Container

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
    only_consumer,
    producer,
    substitute,
    sweep,
)

__all__ = ["KERNEL_WIDTHS", "count_split_gelus", "fuse_bias_split_gelu"]

# What ONNX Runtime 1.31's CUDA kernel is compiled for; it refuses other widths when it runs. SD1, SD2 and
# SDXL have 2560, 5120 and 10240 only.
KERNEL_WIDTHS = frozenset({2560, 5120, 6144, 10240, 12288})


def fuse_bias_split_gelu(model: ir.Model, widths: Container[int] | None = KERNEL_WIDTHS) -> int:
    """Replace GEGLUs by com.microsoft.BiasSplitGelu, and return how many.

        y = a gelu(g),   (a, g) = the halves of x + bias      (Shazeer 2020, equation 6; the exact GELU)

    The bias is looked for among the terms that are added up to x: with an adapter the layer's own bias comes
    before the adapter's term. A layer without one gets zeros.

    Args:
        widths: of x, those that are fused; None means all, for graphs that are only looked at or expanded.

    Precondition: nodes in topological order; widths are known from the shape of x or from its bias.
    Postcondition: inputs, outputs and results are as before, but for the order of the additions.
    """
    graph, found = model.graph, 0
    for gelu in list(graph):
        match = _match(gelu)
        if match is None:
            continue
        hidden, end = match
        width = _width(hidden)
        if width is None or (widths is not None and width not in widths):
            continue
        before = producer(end)
        assert before is not None
        bias = _take_bias(hidden, width)
        if bias is None:
            dtype = (hidden.dtype or ir.DataType.FLOAT).numpy()
            bias = add_initializer(graph, f"zeros_{width}", np.zeros(width, dtype))
        else:
            hidden = _source(gelu)  # without its bias now
        fused = insert(before, "BiasSplitGelu", [hidden, bias], domain=MICROSOFT, shape=end.shape)
        substitute(end, fused.outputs[0])
        found += 1
    if found:
        fused_domain(model)
        sweep(model)
    return found


def count_split_gelus(model: ir.Model, widths: Container[int] | None = KERNEL_WIDTHS) -> int:
    """Return how many GELUs act on one half of a tensor of these widths."""
    count = 0
    for node in model.graph:
        if is_op(node, "Gelu") and is_op(producer(node.inputs[0]), "Split"):
            width = _width(_source(node))
            count += widths is None or (width is not None and width in widths)
    return count


def _source(gelu: ir.Node) -> ir.Value:
    """Return what is split in front of a GELU."""
    split = producer(gelu.inputs[0])
    assert split is not None
    source = split.inputs[0]
    assert source is not None
    return source


def _match(gelu: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return what is split and the product, where the node is the GELU of a GEGLU."""
    if not is_op(gelu, "Gelu") or attribute(gelu, "approximate", "none") != "none":
        return None
    split = producer(gelu.inputs[0])
    if split is None or not is_op(split, "Split") or len(split.outputs) != 2:
        return None
    hidden, (left, right) = split.inputs[0], split.outputs
    times = only_consumer(gelu.outputs[0], "Mul")
    if hidden is None or gelu.inputs[0] is not right or times is None:
        return None
    if only_consumer(left, "Mul") is not times or only_consumer(right, "Gelu") is not gelu:
        return None
    if not _halves_the_last_of_three(split, hidden):
        return None
    return hidden, times.outputs[0]


def _halves_the_last_of_three(split: ir.Node, hidden: ir.Value) -> bool:
    axis, sizes = attribute(split, "axis", 0), array_of(split.inputs[1]) if len(split.inputs) > 1 else None
    if sizes is not None and sizes[0] != sizes[1]:
        return False
    if hidden.shape is not None and len(hidden.shape) != 3:
        return False  # the kernel takes three dimensions
    return axis == 2 or (axis == -1 and hidden.shape is not None)


def _width(hidden: ir.Value) -> int | None:
    if hidden.shape is not None and isinstance(hidden.shape[-1], int):
        return hidden.shape[-1]
    node = producer(hidden)
    if node is not None and is_op(node, "Add"):
        for value in node.inputs:
            if is_constant(value) and value is not None and value.shape is not None and len(value.shape) == 1:
                return int(str(value.shape[0]))
    return None


def _take_bias(hidden: ir.Value, width: int) -> ir.Value | None:
    """Take the constant of shape (width,) out of the sum that makes `hidden`, and return it, or None.

    Only sums that nothing else reads are changed.
    """
    waiting = [hidden]
    while waiting:
        value = waiting.pop()
        node = producer(value)
        if node is None or not is_op(node, "Add") or len(value.consumers()) != 1 or value.is_graph_output():
            continue
        for term, rest in (node.inputs, reversed(node.inputs)):
            if is_constant(term) and term is not None and tuple(term.shape or ()) == (width,):
                assert rest is not None
                value.replace_all_uses_with(rest)
                return term
        waiting.extend(term for term in node.inputs if term is not None)
    return None
