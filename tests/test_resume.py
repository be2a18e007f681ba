"""Runs that are killed: --resume goes on bit for bit, whenever the kill came."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config, write_photographs

from dbadapter.adapter_file import read_adapter

PROGRAM = Path(__file__).with_name("killed_runs.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_ten_kills_change_nothing(tiny_base_folder: Path, tmp_path: Path, precision: str) -> None:
    """kill -9 at ten random moments: loading, latents, steps, half-written files; weights are bit-equal."""
    config = tiny_config(
        write_photographs(tmp_path / "photographs"),
        tmp_path / "out",
        tiny_base_folder,
        prior="generated",
        num_class_images=6,
        max_train_steps=16,
        lr_scheduler="cosine",
        mixed_precision=precision,
        checkpointing_steps=3,
        random_flip=True,
    )
    toml = tmp_path / "run.toml"
    toml.write_text(replace(config, photo_tokens=True).to_toml())
    kills = 10 if precision == "no" else 3
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(toml), str(kills), "7"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    killed_at = json.loads(done.stdout.splitlines()[-1])["killed_at"]
    assert len(killed_at) == kills
    ours = read_adapter(tmp_path / "out/out.safetensors").modules
    whole = read_adapter(tmp_path / "whole/out.safetensors").modules
    assert set(ours) == set(whole)
    for name, weights in whole.items():
        assert torch.equal(ours[name].lora_A, weights.lora_A), (name, killed_at)
        assert torch.equal(ours[name].lora_B, weights.lora_B), (name, killed_at)
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))
    assert figures(tmp_path / "out") == figures(tmp_path / "whole")


def figures(folder: Path) -> list[dict[str, float]]:
    """All that metrics.jsonl says but times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
