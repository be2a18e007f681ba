"""Graph passes: all places are found, the graphs equal torch before and after, inputs stay live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny_bases import Family, tiny_unet
from torch import Tensor, nn

from dbadapter.errors import ExportError
from dbadapter.export.attention import use_fused_attention
from dbadapter.export.passes import count_ops, for_cuda, live_inputs
from dbadapter.export.passes.expand import expand
from dbadapter.export.passes.group_norm import fuse_group_norm
from dbadapter.export.passes.int8 import quantize_weights
from dbadapter.export.passes.nhwc import count_transposes, to_nhwc
from dbadapter.export.passes.skip_group_norm import fuse_skip_group_norm
from dbadapter.export.passes.skip_layer_norm import fuse_skip_layer_norm
from dbadapter.export.passes.split_gelu import fuse_bias_split_gelu
from dbadapter.export.swappable import count_rows, factor_dims, insert_factors

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
FLOAT, HALF = torch.float32, torch.float16
# An export takes ten seconds or more: by default each family once, and each type.
QUICK: list[tuple[Family, torch.dtype]] = [("sd1", HALF), ("sd2", FLOAT), ("sdxl", HALF)]
SLOW: list[tuple[Family, torch.dtype]] = [("sd1", FLOAT), ("sd2", HALF), ("sdxl", FLOAT)]
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
# Linear layers and convolutions of each kind that a pass looks at.
ADAPTED = (
    *(f"down_blocks.0.attentions.0.transformer_blocks.0.{name}" for name in ("attn1.to_q", "attn2.to_v")),
    *(
        f"down_blocks.0.attentions.0.transformer_blocks.0.{name}"
        for name in ("attn1.to_out.0", "attn2.to_out.0")
    ),
    *(f"down_blocks.0.attentions.0.transformer_blocks.0.ff.net.{name}" for name in ("0.proj", "2")),
    *(f"down_blocks.0.{name}" for name in ("attentions.0.proj_in", "downsamplers.0.conv")),
    *(f"mid_block.resnets.0.{name}" for name in ("conv1", "conv2", "time_emb_proj")),
    *(f"up_blocks.1.resnets.0.{name}" for name in ("conv1", "conv_shortcut")),
)
INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")


class Called(nn.Module):
    """A UNet with SDXL's conditions as plain arguments."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        words: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Any:
        conditions: dict[str, Any] = {}
        if text_embeds is not None:
            # In float32: the exporter does not promote what torch.cat does, and the time ids come as float32.
            conditions["added_cond_kwargs"] = {"text_embeds": text_embeds.float(), "time_ids": time_ids}
        return self.unet(sample, timestep.reshape(-1), words, return_dict=False, **conditions)[0]


@dataclass(frozen=True)
class Exported:
    """A UNet's graph as bytes, what feeds it, what torch gives, and its modules' counts."""

    proto: Any
    feed: dict[str, Any]
    expected: Any
    counts: dict[str, int]
    dtype: torch.dtype

    def model(self) -> ir.Model:
        return ir.from_proto(self.proto)

    def error(self, model: ir.Model) -> float:
        """Return max |actual - expected| / max |expected| on the CPU provider."""
        actual = run(model, self.feed)
        difference = np.abs(actual.astype(np.float64) - self.expected)
        return float(difference.max() / np.abs(self.expected).max())


def run(model: ir.Model, feed: Mapping[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))[0]


def tiny_inputs(unet: Any, family: Family, batch: int = 2, height: int = 4, width: int = 6) -> list[Tensor]:
    torch.manual_seed(1)
    words = torch.randn(batch, 7, unet.config.cross_attention_dim)
    inputs = [torch.randn(batch, 4, height, width), torch.tensor(500.0), words]
    if family == "sdxl":
        inputs += [torch.randn(batch, 48), torch.randn(batch, 6)]
    return [value if index == 1 else value.to(unet.dtype) for index, value in enumerate(inputs)]


def free_dimensions(family: Family) -> list[Any]:
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    batch = torch.export.Dim("batch", max=63)
    shapes: list[Any] = [{0: batch, 2: 2 * height, 3: 2 * width}, {}]
    shapes.append({0: batch, 1: torch.export.Dim("tokens", max=32)})
    return shapes + ([{0: batch}, {0: batch}] if family == "sdxl" else [])


def export(
    module: nn.Module,
    inputs: list[Any],
    shapes: list[Any],
    names: list[str] | None,
    layers: Mapping[str, nn.Module] | None = None,
    rows: Mapping[str, int] | None = None,
) -> ir.Model:
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs),
            dynamo=True,
            opset_version=20,
            input_names=names,
            dynamic_shapes=shapes,
            verbose=False,
            optimize=False,
        )
    assert program is not None
    if layers is not None:
        insert_factors(program.model, module, layers, rows or {})
    program.optimize()
    return program.model


def with_random_norms(unet: nn.Module) -> nn.Module:
    """Give norms parameters that are not ones and zeros, so that a mix-up of layers is seen."""
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return unet.eval()


def module_counts(unet: Any) -> dict[str, int]:
    """Return what the modules say; of a transformer's layer norms all but the first follow a sum."""
    names = [type(module).__name__ for module in unet.modules()]
    return {
        "MultiHeadAttention": names.count("Attention"),
        "GroupNorm": names.count("GroupNorm"),
        "BiasSplitGelu": names.count("GEGLU"),
        "SkipLayerNormalization": names.count("LayerNorm") - names.count("Transformer2DModel"),
        "NhwcConv": names.count("Conv2d"),
    }


@cache
def exported_unet(family: Family, dtype: torch.dtype) -> Exported:
    torch.manual_seed(0)
    unet = with_random_norms(tiny_unet(family, shallow=dtype == HALF)).to(dtype)
    module = Called(unet)
    inputs = tiny_inputs(unet, family)
    with torch.no_grad():
        expected = module(*inputs).double().numpy()
    attentions = use_fused_attention(unet)
    counts = module_counts(unet)
    assert attentions == counts["MultiHeadAttention"]
    names = list(INPUTS[: len(inputs)])
    model = export(module, inputs, free_dimensions(family), names)
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return Exported(ir.to_proto(model), feed, expected, counts, dtype)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1].itemsize * 8}")
def exported(request: pytest.FixtureRequest) -> Exported:
    return exported_unet(*request.param)


@pytest.fixture(scope="module")
def small() -> Exported:
    return exported_unet("sd2", torch.float32)


@pytest.fixture(scope="module")
def swappable() -> Exported:
    """A UNet with adapters on linear layers and convolutions of each kind, ranks 3, factors as inputs."""
    torch.manual_seed(0)
    unet: Any = with_random_norms(tiny_unet("sd1"))
    layers = {name: layer for name, layer in unet.named_modules() if name.endswith(ADAPTED)}
    use_fused_attention(unet)
    module, inputs = Called(unet), tiny_inputs(unet, "sd1")
    rows = count_rows(module, dict(zip(INPUTS, inputs, strict=False)), layers)
    model = export(module, inputs, free_dimensions("sd1"), list(INPUTS[:3]), layers, rows)
    proto = ir.to_proto(model)  # with the weights as they are: they are the module's own
    factors = {
        name: torch.randn([3 if isinstance(dim, str) else dim for dim in dims]) * 0.1
        for name, dims in factor_dims(layers).items()
    }
    with torch.no_grad():
        for name, layer in layers.items():
            lora_A, lora_B = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
            layer.weight += (lora_B.flatten(1) @ lora_A.flatten(1)).view_as(layer.weight)
        expected = module(*inputs).double().numpy()
    feed = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=False)}
    feed |= {name: value.numpy() for name, value in factors.items()}
    counts = module_counts(unet)
    counts["NhwcConv"] += 2 * sum(isinstance(layer, nn.Conv2d) for layer in layers.values())
    return Exported(proto, feed, expected, counts, torch.float32)


def test_for_cuda_finds_every_place_and_equals_torch(exported: Exported) -> None:
    model = exported.model()
    report = for_cuda(model, exported.counts, gelu_widths=None)
    assert all(entry["expected"] == entry["found"] for entry in report.values()), report
    assert report["Transpose"]["found"] == 2
    assert report["SkipGroupNorm"]["found"] > 0
    assert expand(model) == sum(entry["found"] for name, entry in report.items() if name in EXPANDED)
    assert set(count_ops(model)) == {"MultiHeadAttention"}
    assert exported.error(model) < TOLERANCE[exported.dtype]


# A SkipGroupNorm is one of the group norms.
EXPANDED = ("GroupNorm", "BiasSplitGelu", "SkipLayerNormalization", "NhwcConv")


def test_a_file_without_types_and_shapes_of_its_values_expands_too(exported: Exported) -> None:
    """As export writes it: value_info is dropped."""
    model = exported.model()
    for_cuda(model, gelu_widths=None)
    ends = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        for value in set(node.outputs) - ends:
            value.shape = value.type = None
    again = ir.from_proto(ir.to_proto(model))
    expand(again)
    assert exported.error(again) < TOLERANCE[exported.dtype]


def test_another_size_goes_through_the_fused_graph(small: Exported) -> None:
    torch.manual_seed(0)
    unet = with_random_norms(tiny_unet("sd2"))
    inputs = tiny_inputs(unet, "sd2", batch=3, height=8, width=2)
    with torch.no_grad():
        expected = Called(unet)(*inputs).numpy()
    model = small.model()
    for_cuda(model, gelu_widths=None)
    expand(model)
    actual = run(model, dict(zip(INPUTS, (value.numpy() for value in inputs), strict=False)))
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_adapters_stay_live_through_the_passes(swappable: Exported) -> None:
    model = swappable.model()
    names = [value.name for value in model.graph.inputs]
    assert live_inputs(model) == set(names)
    report = for_cuda(model, swappable.counts, gelu_widths=None)
    assert [value.name for value in model.graph.inputs] == names
    assert live_inputs(model) == set(names)
    assert all(entry["expected"] == entry["found"] for entry in report.values()), report
    expand(model)
    assert live_inputs(model) == set(names)
    assert swappable.error(model) < 1e-4
    off = {name: value * 0 if name.endswith("lora_B") else value for name, value in swappable.feed.items()}
    without = run(model, off)
    assert np.abs(without - swappable.expected).max() > 1e-2 * np.abs(swappable.expected).max()


def test_a_lost_input_is_an_error(small: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(model: ir.Model) -> int:
        value = next(value for value in model.graph.inputs if value.name == "timestep")
        zero = ir.Value(name="zero")
        zero.const_value = ir.tensor(np.float32(0), name="zero")
        model.graph.register_initializer(zero)
        value.replace_all_uses_with(zero)
        return 0

    monkeypatch.setattr("dbadapter.export.passes.fuse_skip_layer_norm", lose)
    with pytest.raises(ExportError, match="lost the inputs timestep"):
        for_cuda(small.model())


def test_group_norms_alone(small: Exported) -> None:
    model = small.model()
    assert fuse_group_norm(model) == small.counts["GroupNorm"]
    fused = [node for node in model.graph if node.op_type == "GroupNorm"]
    assert {node.attributes["activation"].value for node in fused} == {0, 1}
    assert {node.inputs[1].dtype for node in fused if node.inputs[1]} == {ir.DataType.FLOAT}
    assert expand(model) == len(fused)
    assert small.error(model) < 1e-4


def test_split_gelus_alone(small: Exported) -> None:
    model = small.model()
    assert fuse_bias_split_gelu(model) == 0  # no kernel for the tiny widths
    assert fuse_bias_split_gelu(model, widths=None) == small.counts["BiasSplitGelu"]
    expand(model)
    assert small.error(model) < 1e-4


def test_skip_layer_norms_alone(small: Exported) -> None:
    model = small.model()
    assert fuse_skip_layer_norm(model) == small.counts["SkipLayerNormalization"]
    assert small.error(model) < 1e-4  # the CPU provider has this one
    assert expand(model, layer_norms=False) == 0
    assert expand(model) == small.counts["SkipLayerNormalization"]
    assert small.error(model) < 1e-4


def test_convolutions_alone_leave_few_transposes(small: Exported) -> None:
    model = small.model()
    assert to_nhwc(model) == small.counts["NhwcConv"]
    # Two a group norm, whose reshapes want channels first here, and one before and after the network.
    assert count_transposes(model) <= 2 * small.counts["GroupNorm"] + 2
    expand(model)
    assert small.error(model) < 1e-4


def test_skip_group_norms_keep_the_sum_that_is_used_again(small: Exported) -> None:
    model = small.model()
    fuse_group_norm(model)
    to_nhwc(model)
    found = fuse_skip_group_norm(model)
    fused = [node for node in model.graph if node.op_type == "SkipGroupNorm"]
    assert found == len(fused)
    assert {len(node.outputs) for node in fused} == {1, 2}
    expand(model)
    assert small.error(model) < 1e-4


def test_eight_bits_are_close_and_smaller(small: Exported) -> None:
    model = small.model()
    before = len(ir.to_proto(model).SerializeToString())
    assert quantize_weights(model) > 0
    assert len(ir.to_proto(model).SerializeToString()) < 0.6 * before  # tiny layers: scales and nodes weigh
    assert 0 < small.error(model) < 1e-2


def test_eight_bits_leave_adapters_alone(swappable: Exported) -> None:
    model = swappable.model()
    quantize_weights(model)
    assert live_inputs(model) == set(swappable.feed)
    assert {value.dtype for value in model.graph.inputs} == {ir.DataType.FLOAT}
    assert swappable.error(model) < 1e-2
