"""SD1.5 at its true size, random weights, exported whole: minutes and 10 GB, so it is marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import true_size
from dbadapter.base import load_base
from dbadapter.export import OnnxPipeline, export_onnx
from dbadapter.export.adapters import write_onnx_adapter
from dbadapter.export.parity import TOLERANCE, synthetic_adapter
from dbadapter.export.pipeline import REPORT_NAME

# diffusers' UNet has 16 transformer blocks: 8 linear layers of attention each, and 2 of feed-forward.
FACTORS = {"unet": 2 * 16 * 10, "text_encoder": 2 * 12 * 4}


@pytest.mark.slow
def test_sd15_exports_whole_and_swaps(tmp_path: Path) -> None:
    base = load_base(str(true_size.write_base(tmp_path / "base", "sd1")), device="cpu")
    write_onnx_adapter(synthetic_adapter(base, targets=("attention", "feed-forward")), tmp_path / "dog")
    export_onnx(base, {}, tmp_path / "onnx", swappable=True)
    del base
    report = json.loads((tmp_path / "onnx" / REPORT_NAME).read_text())
    for name, expected in FACTORS.items():
        entry = report["components"][name]
        assert entry["adapter_inputs"] == {"expected": expected, "live": expected}
        assert entry["relative_error"] < TOLERANCE["float32"] < entry["adapter_effect"] / 20
    assert (tmp_path / "onnx/unet/model.onnx.data").stat().st_size > 2**31
    assert report["peak_memory_mb"] < 10_000, report["seconds"]
    pipe = OnnxPipeline(tmp_path / "onnx")
    pipe.load_adapter("dog", tmp_path / "dog")
    words = {"num_inference_steps": 2, "height": 128, "width": 128, "output_type": "np"}
    first, none, again = (
        pipe("a dog", adapters=on, generator=torch.Generator().manual_seed(0), **words).images[0]
        for on in ({"dog": 1.0}, {}, {"dog": 1.0})
    )
    assert np.array_equal(first, again)
    assert np.abs(first - none).max() > 0.02
