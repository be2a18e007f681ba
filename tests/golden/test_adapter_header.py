"""The header's bytes of one fixed adapter: what other programs read must not change unnoticed.

After an intended change: `DBADAPTER_UPDATE_GOLDEN=1 pytest tests/golden/test_adapter_header.py`, and say so
in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from datetime import UTC, datetime
from pathlib import Path

import torch

from dbadapter.adapter_file import Adapter, AdapterDescription, LoraWeights, write_adapter

GOLDEN = Path(__file__).with_name("adapter_header.json")


def steps(*shape: int) -> torch.Tensor:
    """Return 1/8, 2/8, ...: exact in every dtype, and the same on every machine."""
    return (torch.arange(torch.Size(shape).numel()) + 1).reshape(shape) / 8


def test_header_bytes(tmp_path: Path) -> None:
    adapter = Adapter(
        "toybox",
        {
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": LoraWeights(
                steps(4, 6), steps(5, 4), 4.0
            ),
            "unet.down_blocks.0.resnets.0.conv1": LoraWeights(steps(4, 2, 3, 3), steps(3, 4, 1, 1), 4.0),
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": LoraWeights(
                steps(2, 6), steps(6, 2), 1.5
            ),
        },
    )
    description = AdapterDescription(
        base="toybox",
        title="Striped mug",
        trigger="sks mug",
        prediction_type="v_prediction",
        resolution=64,
        num_train_images=5,
        max_train_steps=400,
        seed=0,
        started_at=datetime(2025, 1, 1, tzinfo=UTC),
        finished_at=datetime(2025, 1, 1, 0, 1, 30, tzinfo=UTC),
        author="A. Author",
        license="CC-BY-4.0",
        description="A mug with stripes",
        usage_hint="a photo of sks mug on the beach",
    )
    path = tmp_path / "striped-mug.safetensors"
    write_adapter(path, adapter, description=description)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    raw = content[8 : 8 + length]
    found = {
        "header": json.loads(raw),
        "header_sha256": hashlib.sha256(raw).hexdigest(),
        "file_sha256": hashlib.sha256(content).hexdigest(),
        "sidecar": json.loads(path.with_suffix(".json").read_text()),
    }
    if os.environ.get("DBADAPTER_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
    assert found == json.loads(GOLDEN.read_text())
