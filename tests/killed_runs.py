"""A program for test_resume.py: run a training, kill it at random moments, resume it until it is done.

    python killed_runs.py CONFIG.toml KILLS SEED

Each run is a fork of this process, which has imported everything and computed nothing yet. Prints one JSON
line: the steps at which runs were killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import diffusers  # noqa: F401 (imported once, not in every fork)
import transformers  # noqa: F401
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from dbadapter import checkpoint
from dbadapter.config import TrainConfig
from dbadapter.training import train


def run(config: TrainConfig) -> int:
    """Return the process that trains, a fork of this one."""
    if (process := os.fork()) != 0:
        return process
    status = 1
    try:
        train(config)
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    path, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    config, chance = replace(TrainConfig.from_toml(path), resume=True), random.Random(seed)
    began = time.monotonic()
    whole = run(replace(config, output_dir=config.output_dir.with_name("whole"), name="out"))
    assert os.waitpid(whole, 0)[1] == 0
    duration = time.monotonic() - began
    killed_at = []
    for _ in range(kills):
        process = run(config)
        time.sleep(chance.uniform(0.05, 0.9) * duration)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        newest = checkpoint.newest(config.output_dir / "checkpoints")
        killed_at.append(0 if newest is None else int(newest.stem[5:]))
    assert os.waitpid(run(config), 0)[1] == 0
    print(json.dumps({"killed_at": killed_at, "duration": duration}))


if __name__ == "__main__":
    main()
