"""Factors put into a traced graph: each kind of layer, each place, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dbadapter.errors import ExportError
from dbadapter.export.passes import live_inputs
from dbadapter.export.swappable import attach_defaults, count_rows, factor_dims, insert_factors

BATCH, TOKENS, WIDTH = 2, 6, 8


class Layers(nn.Module):
    """One of each that the exporter writes in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(WIDTH, 4, bias=False)  # what reads it reshapes it
        self.many = nn.Linear(WIDTH, WIDTH)
        self.flat = nn.Linear(WIDTH, 5)  # of two dimensions: Gemm
        self.last = nn.Linear(WIDTH, 3, bias=False)  # the graph's output
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = self.heads(x).unflatten(-1, (2, 2)).transpose(1, 2)
        moved = self.conv(x.unflatten(-1, (2, 4)).transpose(1, 2))
        return heads, self.many(x).relu(), self.flat(x[:, 0]), self.last(x), moved


@pytest.fixture(scope="module")
def module() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


@pytest.fixture(scope="module")
def traced(module: Layers) -> Any:
    free = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2)}}
    x = torch.zeros(BATCH, TOKENS, WIDTH)
    program = torch.onnx.export(
        module, (x,), dynamo=True, dynamic_shapes=free, input_names=["x"], optimize=False, verbose=False
    )
    assert program is not None
    return ir.to_proto(program.model)


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])


def factors(layers: Mapping[str, nn.Module], rank: int) -> dict[str, Tensor]:
    return {
        name: torch.randn([rank if isinstance(dim, str) else dim for dim in dims])
        for name, dims in factor_dims(layers).items()
    }


def adapted(module: Layers, layers: Mapping[str, nn.Module], given: Mapping[str, Tensor], x: Tensor) -> Any:
    """Return what torch gives with W + B A."""
    changed = {}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        product = given[f"{name}.lora_B"].flatten(1) @ given[f"{name}.lora_A"].flatten(1)
        changed[f"{name}.weight"] = weight.detach() + product.view_as(weight)
    with torch.no_grad():
        return torch.func.functional_call(module, changed, (x,))


@pytest.mark.parametrize("rows", [1, 1000], ids=["on the output", "on the weight"])
def test_every_kind_of_layer_equals_torch_off_and_on(module: Layers, traced: Any, rows: int) -> None:
    layers = dict(module.named_children())
    model = ir.from_proto(traced)
    insert_factors(model, module, layers, dict.fromkeys(layers, rows))
    attach_defaults(model, layers)
    assert live_inputs(model) == {"x", *factor_dims(layers)}
    # Two linear layers on the weight add nothing behind it; those of two dimensions and convolutions do.
    assert sum(node.op_type == "Gemm" for node in model.graph) == (6 if rows > 1 else 5)
    run = session(model)
    for size, rank in ((TOKENS, 3), (9, 2)):
        x, given = torch.randn(BATCH, size, WIDTH), factors(layers, rank)
        feed = {"x": x.numpy(), **{name: value.numpy() for name, value in given.items()}}
        for found, expected in zip(run.run(None, feed), adapted(module, layers, given, x), strict=True):
            np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)
        for found, expected in zip(run.run(None, {"x": x.numpy()}), module(x), strict=True):
            np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)


def test_rows_are_counted_without_computing(module: Layers) -> None:
    layers = dict(module.named_children())
    weights = [weight.clone() for weight in module.parameters()]
    rows = count_rows(module, {"x": torch.zeros(BATCH, TOKENS, WIDTH)}, layers)
    assert rows == {"heads": 12, "many": 12, "flat": 2, "last": 12}
    assert all(map(torch.equal, weights, module.parameters()))
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_a_layer_that_is_written_otherwise_is_refused(module: Layers, traced: Any) -> None:
    model = ir.from_proto(traced)
    (product,) = (node for node in model.graph if node.op_type == "Conv")
    product.op_type = "ConvTranspose"
    with pytest.raises(ExportError, match=r"conv is not in the exported graph.*without --swappable"):
        insert_factors(model, module, {"conv": module.conv}, {})
    model.graph.initializers.pop("many.weight")
    with pytest.raises(ExportError, match="many is not in the exported graph"):
        insert_factors(model, module, {"many": module.many}, {})
