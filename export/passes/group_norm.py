"""GroupNorm, and the SiLU behind it, as one node of ONNX Runtime's CUDA provider."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dbadapter.export.passes.nodes import (
    MICROSOFT,
    add_initializer,
    array_of,
    attribute,
    fused_domain,
    insert,
    is_op,
    only_consumer,
    permuted,
    producer,
    substitute,
    sweep,
)

__all__ = ["count_group_norms", "fuse_group_norm"]

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def fuse_group_norm(model: ir.Model) -> int:
    """Replace group norms by com.microsoft.GroupNorm between two transposes, and return how many.

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta,   then y sigmoid(y) where a SiLU follows

    (Wu and He 2018, equation 1; ONNX Runtime's ContribOperators.md.) torch's exporter writes it as Reshape to
    (batch, groups, -1), InstanceNormalization with ones and zeros, Reshape, Mul by gamma, Add beta.

    The CUDA kernel reads NHWC only, float32 gamma and beta only, and channels in pairs: a norm with an odd
    number of channels per group, or of other than four dimensions, stays as it is.

    Precondition: nodes in topological order.
    Postcondition: inputs, outputs and results are as before.
    """
    graph, found = model.graph, 0
    parameters: dict[int, ir.Value] = {}  # layers of equal parameters share one tensor; so do the fused ones

    def parameter(value: ir.Value) -> ir.Value:
        if id(value) not in parameters:
            array = array_of(value)
            assert array is not None
            parameters[id(value)] = add_initializer(
                graph, f"{value.name}_channels", array.reshape(-1).astype(np.float32)
            )
        return parameters[id(value)]

    for norm in list(graph):
        match = _match(norm)
        if match is None:
            continue
        root, gamma, beta, end = match
        silu = _silu(end)
        last = silu or end
        before = producer(last)
        assert before is not None
        to_nhwc = insert(before, "Transpose", [root], {"perm": TO_NHWC})
        fused = insert(
            before,
            "GroupNorm",
            [to_nhwc.outputs[0], parameter(gamma), parameter(beta)],
            {
                "activation": int(silu is not None),
                "channels_last": 1,
                "epsilon": float(attribute(norm, "epsilon", 1e-5)),
                "groups": _groups(norm),
            },
            domain=MICROSOFT,
        )
        to_nhwc.outputs[0].shape = permuted(root, TO_NHWC)
        fused.outputs[0].shape = permuted(root, TO_NHWC)
        back = insert(before, "Transpose", [fused.outputs[0]], {"perm": TO_NCHW}, shape=last.shape)
        substitute(last, back.outputs[0])
        found += 1
    if found:
        fused_domain(model)
        sweep(model)
    return found


def count_group_norms(model: ir.Model) -> int:
    """Return how many group norms of four dimensions a graph has in the exporter's form."""
    return sum(
        1
        for node in model.graph
        if is_op(node, "InstanceNormalization")
        and (reshape := producer(node.inputs[0])) is not None
        and (root := reshape.inputs[0]) is not None
        and (root.shape is None or len(root.shape) == 4)
    )


def _match(norm: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value] | None:
    """Return what is normalized, gamma, beta and the result, where the node is the middle of a group norm."""
    if not is_op(norm, "InstanceNormalization"):
        return None
    scale, bias = array_of(norm.inputs[1]), array_of(norm.inputs[2])
    split = producer(norm.inputs[0])
    if scale is None or bias is None or not (scale == 1).all() or bias.any() or not is_op(split, "Reshape"):
        return None
    assert split is not None
    sizes, root = array_of(split.inputs[1]), split.inputs[0]
    if root is None or sizes is None or tuple(sizes) != (0, len(scale), -1):
        return None
    joined = only_consumer(norm.outputs[0], "Reshape")
    times = joined and only_consumer(joined.outputs[0], "Mul")
    plus = times and only_consumer(times.outputs[0], "Add")
    if joined is None or times is None or plus is None:
        return None
    gamma, beta = _other(times, joined.outputs[0]), _other(plus, times.outputs[0])
    shapes = [None if value is None else array_of(value) for value in (gamma, beta)]
    if gamma is None or beta is None or any(array is None for array in shapes):
        return None
    channels = 0 if shapes[0] is None else shapes[0].size
    if any(array is None or array.shape != (channels, 1, 1) for array in shapes):
        return None  # other than four dimensions
    if channels % (2 * len(scale)):
        return None
    return root, gamma, beta, plus.outputs[0]


def _groups(norm: ir.Node) -> int:
    scale = array_of(norm.inputs[1])
    assert scale is not None
    return len(scale)


def _other(node: ir.Node, known: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is known else node.inputs[0]


def _silu(value: ir.Value) -> ir.Value | None:
    """Return value sigmoid(value) where that is all that is made of it."""
    consumers = value.consumers()
    sigmoid = next((node for node in consumers if is_op(node, "Sigmoid")), None)
    if sigmoid is None or len(consumers) != 2 or value.is_graph_output():
        return None
    times = only_consumer(sigmoid.outputs[0], "Mul")
    if times is None or times not in consumers:
        return None
    return times.outputs[0]
