"""A residual sum and the layer norm behind it as one node."""

from __future__ import annotations

import onnx_ir as ir

from dbadapter.export.passes.nodes import (
    MICROSOFT,
    attribute,
    fused_domain,
    insert,
    is_constant,
    is_op,
    producer,
    substitute,
    sweep,
)

__all__ = ["count_skip_layer_norms", "fuse_skip_layer_norm"]


def fuse_skip_layer_norm(model: ir.Model) -> int:
    """Replace Add and LayerNormalization by com.microsoft.SkipLayerNormalization, and return how many.

        s = x + skip + bias,   y = gamma (s - mean) / sqrt(variance + epsilon) + beta

    The sum stays as the node's fourth output where something else reads it, as the next residual does. The
    bias of the projection in front goes in where it is the last that was added.

    Precondition: nodes in topological order; the shapes of both terms are known.
    Postcondition: inputs, outputs and results are as before, but for the order of the additions.
    """
    found = 0
    for norm in list(model.graph):
        add = _sum_before(norm)
        if add is None or not _has_parameters(norm):
            continue
        terms = _full_and_skip(add)
        if terms is None:
            continue
        full, skip = terms
        full, bias = _without_bias(full)
        if bias is None and skip.shape == full.shape:
            skip, bias = _without_bias(skip)
        total = add.outputs[0]
        shared = len(total.uses()) > 1 or total.is_graph_output()
        inputs = [full, skip, norm.inputs[1], norm.inputs[2]]
        fused = insert(
            # The sum may be read before the norm is: the node stands where the sum stood.
            add,
            "SkipLayerNormalization",
            [*inputs, bias] if bias is not None else inputs,
            {"epsilon": float(attribute(norm, "epsilon", 1e-5))},
            domain=MICROSOFT,
            outputs=4 if shared else 1,
            shape=norm.outputs[0].shape,
        )
        if shared:
            for unused in fused.outputs[1:3]:  # mean and deviation, which only training asks for
                unused.name = ""
            substitute(total, fused.outputs[3])
        substitute(norm.outputs[0], fused.outputs[0])
        found += 1
    if found:
        fused_domain(model)
        sweep(model)
    return found


def count_skip_layer_norms(model: ir.Model) -> int:
    """Return how many layer norms act on a sum of two computed values."""
    return sum(_sum_before(node) is not None for node in model.graph)


def _sum_before(norm: ir.Node) -> ir.Node | None:
    if not is_op(norm, "LayerNormalization") or norm.inputs[0] is None:
        return None
    add = producer(norm.inputs[0])
    if add is None or not is_op(add, "Add") or any(map(is_constant, add.inputs)):
        return None
    # A sum that two norms read is fused with the first of them only.
    norms = [node for node in add.outputs[0].consumers() if is_op(node, "LayerNormalization")]
    return add if norms[0] is norm else None


def _has_parameters(norm: ir.Node) -> bool:
    """Return whether the norm is over the last axis, with gamma and beta, and its statistics are not read."""
    rank = None if norm.inputs[0] is None or norm.inputs[0].shape is None else len(norm.inputs[0].shape)
    last = attribute(norm, "axis", -1) in (-1, None if rank is None else rank - 1)
    given = len(norm.inputs) == 3 and all(value is not None for value in norm.inputs)
    return last and rank == 3 and given and not any(value.uses() for value in norm.outputs[1:])


def _full_and_skip(add: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return the two terms, the one that may lack the batch second; None where their shapes differ else."""
    one, other = add.inputs
    if one is None or other is None or one.shape is None or other.shape is None:
        return None
    if one.shape == other.shape:
        return one, other
    if len(one.shape) == len(other.shape) == 3 and one.shape[1:] == other.shape[1:]:
        if other.shape[0] == 1:
            return one, other
        if one.shape[0] == 1:
            return other, one
    return None


def _without_bias(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Return x and bias where a value is x + bias for nothing else to read, else the value and None."""
    node = producer(value)
    if node is None or not is_op(node, "Add") or len(value.uses()) != 1 or value.is_graph_output():
        return value, None
    for rest, term in (node.inputs, reversed(node.inputs)):
        if rest is None or term is None or rest.shape is None or len(rest.shape) != 3:
            continue
        if is_constant(term) and term.shape is not None and len(term.shape) == 1 and not is_constant(rest):
            return rest, term
    return value, None
