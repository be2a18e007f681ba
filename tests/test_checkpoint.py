"""Checkpoints: everything comes back, nothing of another run does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dbadapter import checkpoint
from dbadapter.base import Base
from dbadapter.config import TrainConfig
from dbadapter.errors import ConfigError, OutputError, TrainingError
from dbadapter.photographs import Photograph

IDENTITY: dict[str, Any] = {"rank": 8, "targets": ("attention",), "snr_gamma": None}


def optimised(steps: int = 3) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.zeros(4))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    for _ in range(steps):
        update(parameters, optimizer)
    return parameters, optimizer


def update(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    sum(((p - 1) ** 2).sum() for p in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


def scaler(enabled: bool = False) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=enabled)


def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    parameters, optimizer = optimised()
    path = checkpoint.write(tmp_path, checkpoint.capture(3, parameters, optimizer, scaler(), IDENTITY))
    fresh, fresh_optimizer = optimised(steps=0)
    snapshot = checkpoint.read(path)
    checkpoint.restore(snapshot, fresh, fresh_optimizer, scaler())
    for _ in range(3):
        update(parameters, optimizer)
        update(fresh, fresh_optimizer)
    assert snapshot.step == 3
    assert all(torch.equal(one, other) for one, other in zip(parameters, fresh, strict=True))


def test_a_snapshot_is_a_copy() -> None:
    parameters, optimizer = optimised()
    snapshot = checkpoint.capture(3, parameters, optimizer, scaler(), IDENTITY)
    before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    update(parameters, optimizer)
    assert all(torch.equal(snapshot.tensors[name], tensor) for name, tensor in before.items())


def test_learning_rate_is_the_new_one(tmp_path: Path) -> None:
    """The cure for a loss that is not finite is a lower rate: the old one must not come back."""
    parameters, optimizer = optimised()
    snapshot = checkpoint.capture(3, parameters, optimizer, scaler(), IDENTITY)
    fresh = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    fresh_optimizer = torch.optim.AdamW(fresh, lr=0.001)
    checkpoint.restore(snapshot, fresh, fresh_optimizer, scaler())
    assert fresh_optimizer.param_groups[0]["lr"] == 0.001


def test_gradient_scaler_comes_back(tmp_path: Path) -> None:
    parameters, optimizer = optimised()
    ours = torch.amp.GradScaler("cpu", init_scale=128.0)
    path = checkpoint.write(tmp_path, checkpoint.capture(3, parameters, optimizer, ours, IDENTITY))
    theirs = scaler(enabled=True)
    checkpoint.restore(checkpoint.read(path), parameters, optimizer, theirs)
    assert theirs.get_scale() == 128.0


def test_newest_wins_and_old_ones_go(tmp_path: Path) -> None:
    parameters, optimizer = optimised()
    assert checkpoint.newest(tmp_path / "none") is None
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "notes.txt").write_text("mine")
    for step in (200, 1000, 400, 1_200_000):
        checkpoint.write(tmp_path, checkpoint.capture(step, parameters, optimizer, scaler(), IDENTITY))
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.read(newest).step == 1_200_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "step-001000.safetensors",
        "step-1200000.safetensors",
    ]


def test_the_best_stays(tmp_path: Path) -> None:
    parameters, optimizer = optimised()
    for step, loss in ((100, 0.5), (200, 0.25), (300, 0.75), (400, 1.0), (500, 1.0)):
        best = checkpoint.Best(step, loss) if loss > 0.25 and step < 200 else checkpoint.Best(200, 0.25)
        snapshot = checkpoint.capture(step, parameters, optimizer, scaler(), IDENTITY, best)
        checkpoint.write(tmp_path, snapshot)
    assert sorted(int(path.stem[5:]) for path in tmp_path.iterdir()) == [200, 400, 500]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.read(newest).best == (200, 0.25)


def test_random_states_come_back(tmp_path: Path) -> None:
    """Nothing of ours draws from them, an optimizer or layer of somebody else's may."""
    parameters, optimizer = optimised()
    path = checkpoint.write(tmp_path, checkpoint.capture(3, parameters, optimizer, scaler(), IDENTITY))

    def numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    expected = numbers()
    checkpoint.restore(checkpoint.read(path), parameters, optimizer, scaler())
    assert numbers() == expected


def test_full_disk_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, optimizer = optimised()
    first = checkpoint.write(tmp_path, checkpoint.capture(3, parameters, optimizer, scaler(), IDENTITY))
    before = first.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=r"step 6 cannot be written .* No space left on device.*--resume"):
        checkpoint.write(tmp_path, checkpoint.capture(6, parameters, optimizer, scaler(), IDENTITY))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_another_run_is_refused_with_every_difference(tmp_path: Path) -> None:
    parameters, optimizer = optimised()
    path = checkpoint.write(tmp_path, checkpoint.capture(3, parameters, optimizer, scaler(), IDENTITY))
    snapshot = checkpoint.read(path)
    checkpoint.check_same_run(snapshot.identity, IDENTITY)
    with pytest.raises(ConfigError, match="rank was 8, is 4; snr_gamma was not set, is 5"):
        checkpoint.check_same_run(snapshot.identity, IDENTITY | {"rank": 4, "snr_gamma": 5.0})


def test_identity_holds_what_decides_the_weights(tmp_path: Path, tiny_base: Base) -> None:
    config = TrainConfig(tmp_path, "dog", tmp_path).resolved("sd1", 512, "sks")
    photographs = [Photograph(tmp_path / name, (8, 8), None, None) for name in ("a.png", "b.png")]
    for photograph in photographs:
        photograph.path.write_bytes(photograph.path.name.encode())
    identity = checkpoint.run_identity(config, tiny_base, photographs)
    assert identity["photographs"].startswith("2 files ")
    assert identity["prediction_type"] == "epsilon"
    assert {"rank", "targets", "seed", "instance_prompt", "prior"} <= set(identity)
    assert not {"learning_rate", "max_train_steps", "mixed_precision", "output_dir"} & set(identity)
    with torch.no_grad():
        tiny_base.unet.conv_out.weight.add_(1e-3)
    photographs[1].path.write_bytes(b"another picture")
    other = checkpoint.run_identity(config, tiny_base, photographs)
    changed = {name for name in identity if identity[name] != other[name]}
    assert changed == {"base_fingerprint", "photographs"}


def test_broken_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "step-000010.safetensors"
    path.write_bytes(b"cut")
    with pytest.raises(TrainingError, match="remove it to resume from the one before it"):
        checkpoint.read(path)


def test_other_factors_are_refused() -> None:
    parameters, optimizer = optimised()
    snapshot = checkpoint.capture(3, parameters, optimizer, scaler(), IDENTITY)
    with pytest.raises(TrainingError, match="2 factors, the model 1: the base has changed"):
        checkpoint.restore(snapshot, parameters[:1], optimizer, scaler())
    with pytest.raises(TrainingError, match=r"is \(3, 2\) in the checkpoint, \(4,\) here"):
        checkpoint.restore(snapshot, parameters[::-1], optimizer, scaler())
