"""From a torch module to an ONNX file: traced, fused or quantized if asked for, its names pinned."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from dbadapter.base import Base
from dbadapter.errors import ExportError
from dbadapter.export.graphs import Graph, example_inputs, traced_sizes, usual_sizes
from dbadapter.export.passes import for_cuda, live_inputs
from dbadapter.export.passes.int8 import quantize_weights
from dbadapter.export.swappable import attach_defaults, count_rows, insert_factors

__all__ = ["OPSET", "convert"]

# At opset 23 and its Attention operator, ONNX Runtime no longer finds the GroupNorm fusions.
OPSET = 20


def convert(graph: Graph, base: Base, dtype: str, path: Path) -> dict[str, Any]:
    """Trace one graph with torch's dynamo exporter, pin its names, and save it with its weights beside it.

    Returns what the report says of it: seconds, adapter inputs.
    """
    began = time.perf_counter()
    inputs = example_inputs(base, graph.name, traced_sizes(base), dtype)
    with torch.no_grad():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=dict(graph.dynamic_shapes),
            verbose=False,
            optimize=False,
        )
    if program is None:
        raise ExportError(f"torch gave no ONNX program for {graph.name}")
    if graph.layers:
        insert_factors(program.model, graph.module, graph.layers, _rows(graph, base, dtype))
    program.optimize()
    entry: dict[str, Any] = {}
    if graph.attentions:  # before the shapes go, which the passes read
        entry["fusions"] = for_cuda(program.model, {"MultiHeadAttention": graph.attentions})
    if dtype == "int8" and graph.name == "unet":
        entry["int8_weights"] = quantize_weights(program.model)
    _pin(program.model, graph)
    if graph.layers:
        attach_defaults(program.model, graph.layers)
        names = set(graph.factors)
        live = len(live_inputs(program.model) & names)
        entry["adapter_inputs"] = {"expected": len(names), "live": live}
        if live != len(names):
            raise ExportError(
                f"the exported {graph.name} reads {live} of its {len(names)} adapter inputs; nothing was "
                "written. Please report it with the base's configs"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=True)
    return {**entry, "seconds": round(time.perf_counter() - began, 1)}


def _rows(graph: Graph, base: Base, dtype: str) -> dict[str, int]:
    """Return the rows of each linear layer; none for int8, which finds constant weights only."""
    if dtype == "int8":
        return {}
    inputs = example_inputs(base, graph.name, usual_sizes(base), dtype)
    return count_rows(graph.module, inputs, graph.layers)


def _pin(model: Any, graph: Graph) -> None:
    """Give inputs and outputs the graph's dimension names, and drop what torch notes about values between.

    Its names are symbols such as `2*s48`, which optimum cannot compute with; its notes on every node hold
    stack traces with the paths of the machine, and are half the size of a small model.
    """
    import onnx_ir as ir

    ends = {id(value) for value in [*model.graph.inputs, *model.graph.outputs]}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in ends:
                value.shape = value.type = None
    model.graph.metadata_props.clear()
    dims = dict(graph.inputs) | dict(graph.outputs) | graph.factors
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.metadata_props.clear()
        shape = dims[value.name]
        value.shape = None if shape is None else ir.Shape(shape)
