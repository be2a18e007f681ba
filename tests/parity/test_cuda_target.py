"""Exports with fused nodes, gated here through their portable twins, and 8-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from tiny_bases import write_tiny_base

from dbadapter.base import load_base
from dbadapter.errors import ExportError, UsageError
from dbadapter.export import export_onnx, load_onnx_pipeline, verify
from dbadapter.export.parity import TOLERANCE


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("sd2")
    write_tiny_base(place / "base", "sd2", clip_vocabulary=False)
    base = load_base(str(place / "base"), device="cpu")
    report = export_onnx(base, {}, place / "onnx", swappable=True, dtype="float16", target="cuda")
    return place / "onnx", report


def test_every_fusion_is_found_and_the_twin_equals_torch(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, report = exported
    assert report["cuda"] == "unverified"
    unet = report["components"]["unet"]
    assert unet["fusions"].keys() >= {"MultiHeadAttention", "GroupNorm", "SkipLayerNormalization", "NhwcConv"}
    assert all(entry["found"] == entry["expected"] for entry in unet["fusions"].values())
    assert unet["relative_error"] < TOLERANCE["float16"] < unet["adapter_effect"] / 20
    assert unet["adapter_inputs"]["live"] == unet["adapter_inputs"]["expected"] > 0
    assert not (folder / "unet" / "twin.onnx").exists()
    model = onnx.load(folder / "unet" / "model.onnx", load_external_data=False)
    counts = [node.op_type for node in model.graph.node]
    assert counts.count("MultiHeadAttention") == unet["fusions"]["MultiHeadAttention"]["found"]


def test_a_machine_without_a_gpu_says_so(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = exported
    with pytest.raises(UsageError, match="exported with --target cuda, which needs a GPU and none"):
        verify(folder, ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="or export with --target portable"):
        load_onnx_pipeline(folder, ["CPUExecutionProvider"])


@pytest.mark.slow
def test_toybox_in_8_bits_merged_and_swappable(tmp_path: Path) -> None:
    """Merged it holds the floor; swappable, with every adapter on, it does not, and is refused."""
    base = load_base("toybox", device="cpu")
    unet = export_onnx(base, {}, tmp_path / "merged", dtype="int8")["components"]["unet"]
    assert unet["int8_weights"] > 50
    assert 1e-3 < unet["relative_error"] < TOLERANCE["int8"]
    assert unet["bytes"] < 15e6
    with pytest.raises(ExportError, match=r"the exported unet differs from torch: relative error 0\.01"):
        export_onnx(base, {}, tmp_path / "swappable", swappable=True, dtype="int8")
    assert not (tmp_path / "swappable").exists()
