"""Weights of 8 bits for the CPU: a third of the file, computed in float32.

Measured on toybox, max |difference| / max |output| over three inputs, two pictures at a time, one thread:

    UNet, 35.3 MB      MatMul only:                     block 16 3.2e-3 (30.1 MB), 32 4.2e-3, 128 5.9e-3
                       the same, symmetric:             block 16 4.8e-3, 32 4.9e-3, 128 6.5e-3
                       and Conv, a scale per channel:   1.4e-2, symmetric 1.7e-2
                       and Conv in blocks:              block 16 8.1e-3, 32 1.2e-2
                       but not the first and last:      block 16 6.9e-3 (11.8 MB), 32 9.0e-3 (the default: 16)
    text encoder,      block 16 1.01e-2, 32 1.06e-2, 128 1.5e-2; symmetric 1.13e-2, 1.03e-2, 1.6e-2
    27.7 MB            (26.1 MB: nearly all of it is the embedding)

So the UNet holds a floor of 1e-2, and toybox's text encoder does not, for 6 percent of its size: leave it as
it is. Only size is won: a step takes 1.3 to 1.7 times as long. `accuracy_level` 4 (activations in 8 bits
too) is no faster in the UNet and doubles the error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from dbadapter.export.passes.nodes import (
    MICROSOFT,
    add_initializer,
    array_of,
    fused_domain,
    insert,
    is_constant,
    is_op,
    substitute,
    sweep,
)

__all__ = ["BLOCK_SIZE", "quantize_weights"]

BLOCK_SIZE = 16  # weights that share a scale, along the inputs
_SMALLEST = 1024  # numbers; smaller weights save nothing
_FEWEST_CHANNELS = 16  # the first and the last convolution are small, and every error in them is seen

Array = np.ndarray[Any, Any]


def quantize_weights(
    model: ir.Model, *, block_size: int = BLOCK_SIZE, symmetric: bool = False, convolutions: bool = True
) -> int:
    """Store constant weights in 8 bits, in place, and return how many nodes read such a weight now.

        w ~ scale (q - zero_point),   scale = (max w - min w) / 255 of each block

    A MatMul becomes com.microsoft.MatMulNBits. The weights of Conv and Gemm, for which there is no such
    operator, go through DequantizeLinear with a scale per output channel. Inputs of the graph, an adapter's
    factors among them, stay as they are.

    Args:
        block_size: inputs that share a scale, a power of two from 16 on.
        symmetric: zero point 128 for all, scale = max |w| / 127.
        convolutions: also Conv and Gemm.

    Precondition: float32 (the CPU provider computes in it anyway).
    Postcondition: inputs and outputs are as before; results differ by the rounding of the weights.
    """
    graph, count = model.graph, 0
    kept: dict[tuple[ir.Value, str], list[ir.Value]] = {}
    for node in list(graph):
        if is_op(node, "MatMul") and _is_weight(node.inputs[1], 2):
            weight = node.inputs[1]
            assert weight is not None
            key = (weight, "MatMul")
            if key not in kept:
                kept[key] = _blocks(graph, weight, block_size, symmetric)
            rows, columns = _sizes(weight)
            attributes = {"K": rows, "N": columns, "bits": 8, "block_size": block_size, "accuracy_level": 0}
            fused = insert(
                node,
                "MatMulNBits",
                [node.inputs[0], *kept[key]],
                attributes,
                domain=MICROSOFT,
                shape=node.outputs[0].shape,
            )
            substitute(node.outputs[0], fused.outputs[0])
            graph.remove(node, safe=True)
            fused_domain(model)
            count += 1
        elif convolutions and _weight_by_rows(node):
            weight = node.inputs[1]
            assert weight is not None
            key = (weight, "rows")
            if key not in kept:
                kept[key] = [_rows(node, weight, block_size, symmetric)]
            node.replace_input_with(1, kept[key][0])
            count += 1
    if count:
        sweep(model)
    return count


def _sizes(weight: ir.Value | None) -> tuple[int, ...]:
    return tuple(int(str(dim)) for dim in (weight and weight.shape) or ())


def _is_weight(value: ir.Value | None, rank: int) -> bool:
    if value is None or not is_constant(value) or value.dtype != ir.DataType.FLOAT:
        return False
    sizes = _sizes(value)
    return len(sizes) == rank and int(np.prod(sizes)) >= _SMALLEST


def _weight_by_rows(node: ir.Node) -> bool:
    """Return whether the second input is a constant weight whose first axis is the output's."""
    if is_op(node, "Conv"):
        return _is_weight(node.inputs[1], 4) and min(_sizes(node.inputs[1])[:2]) >= _FEWEST_CHANNELS
    transposed = "transB" in node.attributes and node.attributes["transB"].value == 1
    return is_op(node, "Gemm") and transposed and _is_weight(node.inputs[1], 2)


def _blocks(graph: ir.Graph, weight: ir.Value, block_size: int, symmetric: bool) -> list[ir.Value]:
    """Return B, scales and zero points of MatMulNBits for a weight (inputs, outputs)."""
    array = array_of(weight)
    assert array is not None
    by_output = np.ascontiguousarray(array.T)
    padded = np.pad(by_output, ((0, 0), (0, -by_output.shape[1] % block_size)))
    blocks = padded.reshape(len(by_output), -1, block_size)
    numbers, scales, zeros = _quantized(blocks, symmetric)
    values = [
        add_initializer(graph, f"{weight.name}_8bit", numbers),
        add_initializer(graph, f"{weight.name}_scales", scales),
    ]
    if not symmetric:
        values.append(add_initializer(graph, f"{weight.name}_zero_points", zeros))
    return values


def _quantized(blocks: Array, symmetric: bool) -> tuple[Array, Array, Array]:
    """Return uint8 numbers, and scales and zero points of the last axis, for w = scale (number - zero)."""
    if symmetric:
        scales = np.abs(blocks).max(-1) / 127
        zeros = np.full(scales.shape, 128, np.float32)
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scales = (high - low) / 255
        zeros = np.round(-low / np.where(scales == 0, 1, scales))
    safe = np.where(scales == 0, 1, scales)
    numbers = np.clip(np.round(blocks / safe[..., None]) + zeros[..., None], 0, 255)
    return numbers.astype(np.uint8), safe.astype(np.float32), zeros.astype(np.uint8)


def _rows(node: ir.Node, weight: ir.Value, block_size: int, symmetric: bool) -> ir.Value:
    """Return a weight (outputs, ...) that is computed from 8 bits in front of the node.

    Rows of `block_size` numbers, each with its scale, are dequantized and put into shape. DequantizeLinear
    has blocks of its own from opset 21 on only, and a scale per output channel is too coarse.
    """
    array = array_of(weight)
    graph = node.graph
    assert array is not None
    assert isinstance(graph, ir.Graph)
    inputs = array[0].size
    # A block may not cross outputs: the largest divisor of the inputs up to its size.
    size = max(divisor for divisor in range(1, block_size + 1) if inputs % divisor == 0)
    numbers, scales, zeros = _quantized(array.reshape(-1, size), symmetric)
    values = [
        add_initializer(graph, f"{weight.name}_8bit", numbers),
        add_initializer(graph, f"{weight.name}_scales", scales),
        add_initializer(graph, f"{weight.name}_zero_points", zeros),
    ]
    rows = insert(node, "DequantizeLinear", values, {"axis": 0}, dtype=ir.DataType.FLOAT).outputs[0]
    shape = add_initializer(graph, f"{weight.name}_shape", np.array(array.shape, np.int64))
    return insert(node, "Reshape", [rows, shape], shape=weight.shape).outputs[0]
