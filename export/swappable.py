"""Layers whose adapter is an input of the graph, so that one graph serves many subjects.

Every adapted layer computes W x + b + B A x (Hu et al. 2021, section 4.1, with the scale folded into B). A
and B come from outside, with a rank that is free; where none are given the graph's own default has rank 0,
which adds nothing.

The factors are put into the graph after it was traced. Traced with it, they double the time of an export and
more: each of torch's symbols goes through every layer behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dbadapter.errors import ExportError
from dbadapter.export.passes.nodes import add_initializer, attribute, insert, is_op, sweep

__all__ = ["FACTORS", "attach_defaults", "count_rows", "factor_dims", "insert_factors"]

FACTORS = ("lora_A", "lora_B")

Layers = Mapping[str, nn.Module]


def factor_dims(layers: Layers) -> dict[str, tuple[str | int, ...]]:
    """Return the graph's input names and dimensions: lora_A (rank, in, ...), lora_B (out, rank, ...).

    Each layer has a rank of its own: adapters that are mixed need not cover the same layers.

    Args:
        layers: canonical name -> Linear or Conv2d.
    """
    dims: dict[str, tuple[str | int, ...]] = {}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        ones = (1,) * (weight.ndim - 2)
        rank = f"rank of {name}"
        dims[f"{name}.lora_A"] = (rank, *weight.shape[1:])
        dims[f"{name}.lora_B"] = (weight.shape[0], rank, *ones)
    return dims


def count_rows(module: nn.Module, inputs: Mapping[str, Tensor], layers: Layers) -> dict[str, int]:
    """Return how many rows each linear layer multiplies when the module is called; nothing is computed.

    Args:
        inputs: by position; their values do not matter.
        layers: as above; convolutions are left out.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows[name] = int(arguments[0].numel() // arguments[0].shape[-1])

        return hook

    linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in linear.items()]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            module(*(fake.from_tensor(value) for value in inputs.values()))
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def insert_factors(model: ir.Model, module: nn.Module, layers: Layers, rows: Mapping[str, int]) -> None:
    """Give the graph the inputs lora_A and lora_B of every layer, and the nodes that read them, in place.

    A linear layer adds its factors where that takes less time: to the weight, x (W + B A)^T, where it has
    many rows, else to the output, x W^T + (x A^T) B^T. A convolution adds to its output.

    Args:
        model: as torch's exporter gives it before its optimizer ran, so that weights are under their names.
        module: what was traced.
        layers: canonical name -> layer of the module.
        rows: canonical name -> rows of a usual call; a layer that is not named adds to its output.
    Raises:
        ExportError: the graph does not have a layer where it is looked for.
    """
    names = {id(tensor): name for name, tensor in module.named_parameters()}
    dims = factor_dims(layers)
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        held = model.graph.initializers.get(names[id(weight)])
        lora_A, lora_B = (
            ir.Value(name=key, type=None if held is None else held.type, shape=ir.Shape(dims[key]))
            for key in (f"{name}.{half}" for half in FACTORS)
        )
        if held is None or not _adapt(held, lora_A, lora_B, _on_weight(weight, rows.get(name, 0))):
            raise ExportError(
                f"{name} is not in the exported graph as torch's exporter usually writes it; nothing was "
                "written. Please report it with the version of torch, or export without --swappable"
            )
        model.graph.inputs.extend([lora_A, lora_B])
    sweep(model)


def attach_defaults(model: Any, layers: Layers) -> None:
    """Give every factor input of an exported model its default of rank 0; call it after all graph passes.

    Earlier, a pass may take the default for a constant and fold the input away (seen with NhwcConv).

    Args:
        model: an `onnx_ir.Model`.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for name, dims in factor_dims(layers).items():
        value = inputs[name]
        shape = [0 if isinstance(dim, str) else dim for dim in dims]
        value.const_value = ir.tensor(np.zeros(shape, value.dtype.numpy()), name=name)
        model.graph.register_initializer(value)


def _on_weight(weight: Tensor, rows: int) -> bool:
    """Return whether B A takes less than half the operations of (x A^T) B^T; both grow with the rank alike.

    Half, because the sum with W is made anew in every call and is not packed beforehand as a constant is.
    """
    return weight.ndim == 2 and rows * sum(weight.shape) > 2 * weight.numel()


def _adapt(weight: ir.Value, lora_A: ir.Value, lora_B: ir.Value, on_weight: bool) -> bool:
    """Let every node that reads a weight read the factors too; return whether all were understood."""
    uses = list(weight.uses())
    for node, position in uses:
        if is_op(node, "Conv") and position == 1 and attribute(node, "group", 1) == 1:
            _adapt_conv(node, lora_A, lora_B)
        elif is_op(node, "Gemm") and position == 1 and attribute(node, "transB"):
            _adapt_gemm(node, lora_A, lora_B)
        elif is_op(node, "Transpose") and all(is_op(user, "MatMul") for user in node.outputs[0].consumers()):
            _adapt_product(node, lora_A, lora_B, on_weight)
        else:
            return False
    return bool(uses)


def _adapt_product(transposed: ir.Node, lora_A: ir.Value, lora_B: ir.Value, on_weight: bool) -> None:
    """Adapt MatMul(x, Transpose(W)); a bias is added behind it."""
    weight = transposed.outputs[0]
    for product, _ in list(weight.uses()):
        if on_weight:  # A^T B^T + W^T, and W^T is a constant that the optimizer folds
            flipped = {"transA": 1, "transB": 1}
            inputs = [lora_A, lora_B, weight]
            product.replace_input_with(
                1, insert(product, "Gemm", inputs, flipped, shape=weight.shape).outputs[0]
            )
            continue
        x, out = product.inputs[0], product.outputs[0]
        assert x is not None
        readers = out.consumers()
        if readers and not out.is_graph_output() and all(is_op(node, "Reshape") for node in readers):
            # Whatever reads the rows gives them a shape of its own, so they may as well be flat.
            product.replace_input_with(0, _flat(x))
            down = insert(product, "Gemm", [product.inputs[0], lora_A], {"transB": 1}).outputs[0]
            total = _follow(product, "Gemm", [down, lora_B, out], {"transB": 1})
            out.shape = total.shape = None
            continue
        for factor in (lora_A, lora_B):
            flipped_factor = insert(product, "Transpose", [factor], {"perm": [1, 0]}).outputs[0]
            x = insert(product, "MatMul", [x, flipped_factor]).outputs[0]
        x.shape = out.shape
        _follow(product, "Add", [out, x])


def _flat(x: ir.Value) -> ir.Value:
    """Return x as rows, (..., width) -> (rows, width): made once, behind what computes x."""
    name = f"{x.name}_rows"
    for node in x.consumers():
        if node.outputs[0].name == name:
            return node.outputs[0]
    graph, before = x.graph, x.producer()
    assert graph is not None
    assert x.shape is not None
    shape = add_initializer(graph, f"{name}_shape", np.array([-1, int(str(x.shape[-1]))], np.int64))
    node = ir.node("Reshape", [x, shape])
    node.outputs[0].name, node.outputs[0].type = name, x.type
    if before is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(before, node)
    return node.outputs[0]


def _adapt_gemm(gemm: ir.Node, lora_A: ir.Value, lora_B: ir.Value) -> None:
    """Adapt Gemm(x, W, b), which torch makes of a layer whose input has two dimensions."""
    down = insert(gemm, "Gemm", [gemm.inputs[0], lora_A], {"transB": 1})
    _follow(gemm, "Gemm", [down.outputs[0], lora_B, gemm.outputs[0]], {"transB": 1})


def _adapt_conv(conv: ir.Node, lora_A: ir.Value, lora_B: ir.Value) -> None:
    """Adapt Conv(x, W, b): A moves over x as W does, B has a kernel of 1."""
    moves = {
        name: conv.attributes[name].value
        for name in ("strides", "pads", "dilations", "auto_pad")
        if name in conv.attributes
    }
    down = insert(conv, "Conv", [conv.inputs[0], lora_A], moves)
    up = insert(conv, "Conv", [down.outputs[0], lora_B], shape=conv.outputs[0].shape)
    _follow(conv, "Add", [conv.outputs[0], up.outputs[0]])


def _follow(
    node: ir.Node, op_type: str, inputs: list[ir.Value], attributes: Mapping[str, Any] | None = None
) -> ir.Value:
    """Put a node behind another, let everything that read the one's output read the new one's; return it.

    Args:
        inputs: of the new node; the output of the one is among them.
    """
    out = node.outputs[0]
    new = ir.node(op_type, inputs, attributes)
    new.outputs[0].type, new.outputs[0].shape = out.type, out.shape
    position = inputs.index(out)
    if out.is_graph_output():
        out.name, new.outputs[0].name = f"{out.name}_without_adapter", out.name
    out.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    new.replace_input_with(position, out)
    assert node.graph is not None
    node.graph.insert_after(node, new)
    return new.outputs[0]
