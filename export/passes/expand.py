"""The portable twin of a fused graph: ONNX Runtime's CUDA operators spelled out in standard ones.

The CPU provider has no kernels for them. Expanded, the very graph that ships for CUDA runs there, and can
be compared with torch where there is no GPU. Weights stay as they are in the file (a node turns what has to
be turned), so the twin can share the file's external data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from dbadapter.export.passes.nodes import MICROSOFT, add_initializer, attribute, insert, substitute, sweep

__all__ = ["expand"]

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def expand(model: ir.Model, *, layer_norms: bool = True) -> int:
    """Replace the fused nodes by standard operators, in place, and return how many.

    GroupNorm, SkipGroupNorm, BiasSplitGelu, SkipLayerNormalization, BiasAdd and NhwcConv.
    MultiHeadAttention stays: the CPU provider has it. Norms compute in float32, as the CUDA kernels do.

    Args:
        layer_norms: also SkipLayerNormalization, for which the CPU provider has a kernel.

    Precondition: opset 20 or later (Gelu); inputs of group norms in NHWC.
    Postcondition: inputs and outputs are as before; results but for rounding.
    """
    expanders: dict[str, Callable[[ir.Node], None]] = {
        "BiasAdd": _bias_add,
        "BiasSplitGelu": _bias_split_gelu,
        "GroupNorm": _group_norm,
        "NhwcConv": _nhwc_conv,
        "SkipGroupNorm": _skip_group_norm,
    }
    if layer_norms:
        expanders["SkipLayerNormalization"] = _skip_layer_norm
    count = 0
    for node in list(model.graph):
        if node.domain == MICROSOFT and node.op_type in expanders:
            expanders[node.op_type](node)
            model.graph.remove(node, safe=True)
            count += 1
    if count:
        sweep(model)
    return count


def _numbers(node: ir.Node, name: str, numbers: list[int]) -> ir.Value:
    """Return the initializer that holds these integers; one for the whole graph."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    full = f"expanded_{name}_{'_'.join(map(str, numbers))}"
    return graph.initializers.get(full) or add_initializer(graph, full, np.array(numbers, np.int64))


def _ones_or_zeros(node: ir.Node, number: int, count: int) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    full = f"expanded_{number}_times_{count}"
    held = graph.initializers.get(full)
    return held or add_initializer(graph, full, np.full(count, number, np.float32))


def _one(
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: Mapping[str, object] | None = None,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    return insert(before, op_type, inputs, attributes, dtype=dtype).outputs[0]


def _normalized(node: ir.Node, value: ir.Value, gamma: ir.Value, beta: ir.Value) -> ir.Value:
    """Return the group norm of a value in NHWC, with its SiLU."""
    groups, given = int(attribute(node, "groups")), value
    if given.dtype != ir.DataType.FLOAT:
        value = _one(node, "Cast", [value], {"to": ir.DataType.FLOAT}, ir.DataType.FLOAT)
    value = _one(node, "Transpose", [value], {"perm": TO_NCHW})
    shape = _one(node, "Shape", [value], dtype=ir.DataType.INT64)
    split = _one(node, "Reshape", [value, _numbers(node, "shape", [0, groups, -1])])
    ones, zeros = _ones_or_zeros(node, 1, groups), _ones_or_zeros(node, 0, groups)
    epsilon = {"epsilon": float(attribute(node, "epsilon", 1e-5))}
    normal = _one(node, "InstanceNormalization", [split, ones, zeros], epsilon)
    value = _one(node, "Transpose", [_one(node, "Reshape", [normal, shape])], {"perm": TO_NHWC})
    value = _one(node, "Mul", [value, gamma])  # channels are last: gamma and beta broadcast
    value = _one(node, "Add", [value, beta])
    if int(attribute(node, "activation", 0)):
        value = _one(node, "Mul", [value, _one(node, "Sigmoid", [value])])
    if given.dtype == ir.DataType.FLOAT:
        return value
    # A shipped file does not say the types of the values between, so the twin asks the value itself.
    value = _one(node, "CastLike", [value, given])
    value.type = given.type
    return value


def _group_norm(node: ir.Node) -> None:
    value, gamma, beta = node.inputs[:3]
    assert value is not None
    assert gamma is not None
    assert beta is not None
    substitute(node.outputs[0], _normalized(node, value, gamma, beta))


def _skip_group_norm(node: ir.Node) -> None:
    value, gamma, beta, skip, *bias = node.inputs
    assert gamma is not None
    assert beta is not None
    total = _one(node, "Add", [value, skip])
    if bias and bias[0] is not None:
        total = _one(node, "Add", [total, bias[0]])
    substitute(node.outputs[0], _normalized(node, total, gamma, beta))
    if len(node.outputs) > 1:
        substitute(node.outputs[1], total)


def _bias_split_gelu(node: ir.Node) -> None:
    total = _one(node, "Add", list(node.inputs))
    halves = insert(node, "Split", [total], {"axis": -1, "num_outputs": 2}, outputs=2)
    gelu = _one(node, "Gelu", [halves.outputs[1]], {"approximate": "none"})
    substitute(node.outputs[0], _one(node, "Mul", [halves.outputs[0], gelu]))


def _bias_add(node: ir.Node) -> None:
    value, bias, skip = node.inputs
    substitute(node.outputs[0], _one(node, "Add", [_one(node, "Add", [value, bias]), skip]))


def _skip_layer_norm(node: ir.Node) -> None:
    value, skip, gamma, *rest = node.inputs
    beta, bias = (*rest, None, None)[:2]
    if bias is not None:
        value = _one(node, "Add", [value, bias])
    total = _one(node, "Add", [value, skip])
    attributes = {"axis": -1, "epsilon": float(attribute(node, "epsilon", 1e-5)), "stash_type": 1}
    inputs = [total, gamma] if beta is None else [total, gamma, beta]
    substitute(node.outputs[0], _one(node, "LayerNormalization", inputs, attributes))
    if len(node.outputs) > 3:
        substitute(node.outputs[3], total)


def _nhwc_conv(node: ir.Node) -> None:
    value, weight, *bias = node.inputs
    value = _one(node, "Transpose", [value], {"perm": TO_NCHW})
    weight = _one(node, "Transpose", [weight], {"perm": TO_NCHW})
    conv = _one(node, "Conv", [value, weight, *bias], dict(node.attributes))
    substitute(node.outputs[0], _one(node, "Transpose", [conv], {"perm": TO_NHWC}))
