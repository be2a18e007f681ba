"""A sum and the group norm behind it as one node: the residuals, and the time embedding's term."""

from __future__ import annotations

import onnx_ir as ir

from dbadapter.export.passes.nodes import (
    MICROSOFT,
    array_of,
    insert,
    is_constant,
    is_op,
    producer,
    substitute,
    sweep,
)

__all__ = ["count_skip_group_norms", "fuse_skip_group_norm"]


def fuse_skip_group_norm(model: ir.Model) -> int:
    """Replace Add and com.microsoft.GroupNorm by com.microsoft.SkipGroupNorm, and return how many.

        s = x + skip,   y = group norm of s      (and its SiLU)

    `skip` is shaped like x, or (batch, 1, 1, channels). The sum stays as the second output where something
    else reads it.

    Precondition: `to_nhwc` has run, so that no transpose stands between sum and norm; shapes are known.
    Postcondition: inputs, outputs and results are as before.
    """
    found = 0
    for norm in list(model.graph):
        add = _sum_before(norm)
        terms = None if add is None else _full_and_skip(add)
        if add is None or terms is None:
            continue
        total = add.outputs[0]
        shared = len(total.uses()) > 1 or total.is_graph_output()
        full, skip = terms
        fused = insert(
            add,  # the sum may be read before the norm is
            "SkipGroupNorm",
            [full, norm.inputs[1], norm.inputs[2], skip],
            dict(norm.attributes),
            domain=MICROSOFT,
            outputs=2 if shared else 1,
            shape=norm.outputs[0].shape,
        )
        if shared:
            substitute(total, fused.outputs[1])
        substitute(norm.outputs[0], fused.outputs[0])
        found += 1
    if found:
        sweep(model)
    return found


def count_skip_group_norms(model: ir.Model) -> int:
    """Return how many com.microsoft.GroupNorm act on a sum of two computed values."""
    return sum(_sum_before(node) is not None for node in model.graph)


def _sum_before(norm: ir.Node) -> ir.Node | None:
    if not is_op(norm, "GroupNorm", MICROSOFT):
        return None
    add = producer(norm.inputs[0])
    if add is None or not is_op(add, "Add") or any(map(is_constant, add.inputs)):
        return None
    norms = [node for node in add.outputs[0].consumers() if is_op(node, "GroupNorm", MICROSOFT)]
    return add if norms[0] is norm else None


def _full_and_skip(add: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    one, other = add.inputs
    if one is None or other is None:
        return None
    if _is_per_channel(other):
        return one, other
    if _is_per_channel(one):
        return other, one
    if one.shape is not None and other.shape is not None and one.shape == other.shape:
        return one, other
    return None


def _is_per_channel(value: ir.Value) -> bool:
    """Return whether a value is (batch, channels) with two axes of 1 put between."""
    node = producer(value)
    axes = array_of(node.inputs[1]) if node is not None and is_op(node, "Unsqueeze") else None
    return axes is not None and tuple(axes) == (1, 2)
