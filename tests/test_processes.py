"""Several processes: different noise for each, the same result as one process at the summed batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import tiny_config, write_photographs

from dbadapter.adapter_file import read_adapter
from dbadapter.processes import Processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("prior", ["generated", "distill"])
def test_two_processes_equal_one_at_the_summed_batch(
    tiny_base_folder: Path, tmp_path: Path, prior: str
) -> None:
    photographs = write_photographs(tmp_path / "photographs")
    rates = {"learning_rate": 1e-3, "text_encoder_learning_rate": 1e-3}
    settings = {"prior": prior, "train_batch_size": 1, "name": "dog", **rates}
    config = tiny_config(photographs, tmp_path / "two", tiny_base_folder, **settings)
    toml = tmp_path / "run.toml"
    toml.write_text(config.to_toml())
    # Not --cpu: accelerate then starts one process and only names the address (accelerate 1.15).
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    two = subprocess.run(
        [sys.executable, "-m", *launch.split(), "--main_process_port", str(free_port()),
         "-m", "dbadapter", "train", "--config", str(toml)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("Adapter: ") == 1  # only the first one speaks
    toml.write_text(replace(config, output_dir=tmp_path / "one", train_batch_size=2).to_toml())
    one = subprocess.run(
        [sys.executable, "-m", "dbadapter", "train", "--config", str(toml)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr[-3000:]
    ours, theirs = (read_adapter(tmp_path / name / "dog.safetensors").modules for name in ("two", "one"))
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name].lora_B.float(), weights.lora_B.float(), rtol=0.05, atol=2e-5)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("two", "one")]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes()
    parameter = torch.nn.Parameter(torch.ones(2))
    alone.average_gradients([parameter])
    assert parameter.grad is None
    assert (alone.is_main, alone.mean(2.5)) == (True, 2.5)
    alone.wait()
