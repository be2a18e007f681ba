"""Graph passes on `onnx_ir.Model`: the fused nodes of ONNX Runtime's CUDA provider, and int8 for the CPU.

ONNX Runtime's own optimizer (`onnxruntime.transformers`, its UNet class) finds the same group and layer norms
in these graphs, but no GEGLU, and it leaves 34 transposes in a UNet of two levels where ours leave 2; so the
passes are our own.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import onnx_ir as ir

from dbadapter.errors import ExportError
from dbadapter.export.passes.group_norm import count_group_norms, fuse_group_norm
from dbadapter.export.passes.nhwc import count_convs, count_transposes, expected_transposes, to_nhwc
from dbadapter.export.passes.nodes import MICROSOFT
from dbadapter.export.passes.skip_group_norm import count_skip_group_norms, fuse_skip_group_norm
from dbadapter.export.passes.skip_layer_norm import count_skip_layer_norms, fuse_skip_layer_norm
from dbadapter.export.passes.split_gelu import KERNEL_WIDTHS, count_split_gelus, fuse_bias_split_gelu

__all__ = ["count_ops", "for_cuda", "live_inputs"]


def for_cuda(
    model: ir.Model,
    expected: Mapping[str, int] | None = None,
    *,
    gelu_widths: Container[int] | None = KERNEL_WIDTHS,
) -> dict[str, dict[str, int]]:
    """Fuse a graph for ONNX Runtime's CUDA provider, in place, and return what was expected and found.

    Args:
        model: as torch's dynamo exporter gives it, with the shapes of its values: before they are dropped.
        expected: operator -> count, where the modules say it; the others are counted in the graph before.
            "GroupNorm" counts those that stand alone and those inside a SkipGroupNorm.
        gelu_widths: those for which GEGLUs are fused; None means all, which the CUDA provider cannot run.
    Returns:
        Operator -> {"expected", "found"}; "Transpose" holds those that remain.
    Raises:
        ExportError: an input that was read is read no longer, or inputs or outputs have changed.
    """
    ends = _ends(model)
    live = live_inputs(model)
    wanted = {
        "GroupNorm": count_group_norms(model),
        "BiasSplitGelu": count_split_gelus(model, gelu_widths),
        "SkipLayerNormalization": count_skip_layer_norms(model),
        "NhwcConv": count_convs(model),
        "Transpose": expected_transposes(model),
    }
    found = {
        "GroupNorm": fuse_group_norm(model),
        "BiasSplitGelu": fuse_bias_split_gelu(model, gelu_widths),
        "SkipLayerNormalization": fuse_skip_layer_norm(model),
        "NhwcConv": to_nhwc(model),
    }
    wanted["SkipGroupNorm"] = count_skip_group_norms(model)
    found["SkipGroupNorm"] = fuse_skip_group_norm(model)
    found["Transpose"] = count_transposes(model)
    wanted |= dict(expected or {})
    present = count_ops(model)
    found |= {name: present.get(name, 0) for name in wanted if name not in found}
    lost = live - live_inputs(model)
    if lost:
        raise ExportError(f"the passes lost the inputs {', '.join(sorted(lost))}; please report it")
    if _ends(model) != ends:
        raise ExportError("the passes changed the graph's inputs or outputs; please report it")
    return {name: {"expected": wanted[name], "found": found[name]} for name in wanted}


def live_inputs(model: ir.Model) -> set[str]:
    """Return the names of the inputs that some node reads."""
    return {str(value.name) for value in model.graph.inputs if value.uses()}


def count_ops(model: ir.Model) -> dict[str, int]:
    """Return how many nodes there are of each operator of ONNX Runtime's own domain."""
    names = [node.op_type for node in model.graph if node.domain == MICROSOFT]
    return {name: names.count(name) for name in sorted(set(names))}


def _ends(model: ir.Model) -> list[tuple[str, str, str]]:
    values = [*model.graph.inputs, *model.graph.outputs]
    return [(str(value.name), str(value.type), str(value.shape)) for value in values]
