"""Optimizers: each learns, and goes on from its saved state as if nothing had happened."""

from __future__ import annotations

import builtins
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dbadapter import optimizers
from dbadapter.errors import TrainingError, UsageError
from dbadapter.optimizers import OPTIMIZERS, check_optimizer, load_state, make_optimizer, state_tensors

CPU = torch.device("cpu")
RATES = {"adamw": 1e-2, "adamw8bit": 1e-2, "prodigy": 1.0}


def installed(name: str) -> bool:
    try:
        check_optimizer(name)
    except UsageError:
        return False
    return True


every = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.skipif(not installed(n), reason="not installed")) for n in OPTIMIZERS],
)


class Problem:
    """Factors A (drawn) and B (zero, as LoRA's) that learn to map inputs of their own key to targets."""

    def __init__(self, name: str, lr: float | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [
            nn.Parameter(torch.randn(8, 640, generator=generator) / 25),  # large enough for 8-bit moments
            nn.Parameter(torch.zeros(16, 8)),
        ]
        rate = RATES[name] if lr is None else lr
        groups = [{"params": [parameter], "initial_lr": rate} for parameter in self.parameters]
        self.optimizer = make_optimizer(name, groups, CPU)

    def run(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(32, 640, generator=generator)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - step / 1000)
            loss = ((x @ self.parameters[0].T @ self.parameters[1].T - x[:, :16]) ** 2).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def through_file(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    save_file(tensors, path)
    return load_file(path)


@every
@pytest.mark.parametrize("half", [1, 2, 7])
def test_saved_and_loaded_is_the_same_run(name: str, half: int, tmp_path: Path) -> None:
    whole, first, second = Problem(name), Problem(name), Problem(name)
    expected = whole.run(0, 2 * half)
    begun = first.run(0, half)
    with torch.no_grad():
        for to, parameter in zip(second.parameters, first.parameters, strict=True):
            to.copy_(parameter)
    stored = through_file(state_tensors(first.optimizer, first.parameters), tmp_path / "state.safetensors")
    load_state(second.optimizer, second.parameters, stored)
    assert begun + second.run(half, 2 * half) == expected
    for one, other in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(one, other)
    ours, theirs = (state_tensors(p.optimizer, p.parameters) for p in (whole, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


@every
def test_it_learns(name: str) -> None:
    losses = Problem(name).run(0, 300)  # Prodigy's estimate grows from 1e-5: it idles for the first 100
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@every
def test_state_is_a_copy_both_ways(name: str) -> None:
    problem = Problem(name)
    problem.run(0, 2)
    tensors = state_tensors(problem.optimizer, problem.parameters)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    load_state(problem.optimizer, problem.parameters, tensors)
    problem.run(2, 4)
    assert all(torch.equal(tensors[key], before[key]) for key in tensors)


@every
def test_learning_rate_is_the_new_one(name: str) -> None:
    """The cure for a loss that is not finite is a lower rate: the old one must not come back."""
    old, new = Problem(name), Problem(name, lr=RATES[name] / 4)
    old.run(0, 2)
    load_state(new.optimizer, new.parameters, state_tensors(old.optimizer, old.parameters))
    groups = new.optimizer.param_groups
    assert {group["lr"] for group in groups} == {group["initial_lr"] for group in groups} == {RATES[name] / 4}


def test_names_of_adamw_stay_those_of_checkpoints() -> None:
    problem = Problem("adamw")
    assert state_tensors(problem.optimizer, problem.parameters) == {}
    problem.run(0, 1)
    names = {f"{name}.{index}" for name in ("exp_avg", "exp_avg_sq", "step") for index in (0, 1)}
    assert set(state_tensors(problem.optimizer, problem.parameters)) == names


def test_adamw_is_as_before() -> None:
    """Same defaults and fused steps as the optimizer that the recorded runs were made with."""
    problem, plain = Problem("adamw"), Problem("adamw")
    plain.optimizer = torch.optim.AdamW(
        [{"params": [p], "initial_lr": 1e-2} for p in plain.parameters], fused=True
    )
    assert problem.run(0, 5) == plain.run(0, 5)


def test_groups_without_parameters_are_left_out() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "initial_lr": 0.1}, {"params": [], "initial_lr": 0.2}]
    assert [group["initial_lr"] for group in make_optimizer("adamw", groups, CPU).param_groups] == [0.1]


def test_the_state_of_another_optimizer_is_refused() -> None:
    pytest.importorskip("prodigyopt")
    adamw, prodigy = Problem("adamw"), Problem("prodigy")
    for problem in (adamw, prodigy):
        problem.run(0, 1)
    for one, other in ((adamw, prodigy), (prodigy, adamw)):
        with pytest.raises(TrainingError, match="another --optimizer"):
            load_state(one.optimizer, one.parameters, state_tensors(other.optimizer, other.parameters))


def test_prodigy_runs_as_its_readme_advises(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prodigyopt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = Problem("prodigy").optimizer.param_groups[0]
    assert group["use_bias_correction"]
    assert group["safeguard_warmup"]
    assert group["decouple"]
    assert group["weight_decay"] == 0.01
    assert group["d0"] == group["d"] == 1e-5
    assert capsys.readouterr().out == ""  # its constructor prints about weight decay


def test_prodigy_warns_of_a_learning_rate_of_adamw() -> None:
    pytest.importorskip("prodigyopt")
    with pytest.warns(UserWarning, match="pass --learning-rate 1"):
        Problem("prodigy", lr=1e-4)


@pytest.mark.parametrize("rates", [(1.0, 0.5), (0.0, 0.0)])
def test_prodigy_refuses_what_it_would_refuse_in_its_first_step(rates: tuple[float, float]) -> None:
    pytest.importorskip("prodigyopt")
    groups = [{"params": [nn.Parameter(torch.ones(2))], "initial_lr": rate} for rate in rates]
    with pytest.raises(UsageError, match="one learning rate above 0"):
        make_optimizer("prodigy", groups, CPU)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="must be one of adamw, adamw8bit, prodigy, got 'lion'"):
        check_optimizer("lion")


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_missing_package_is_one_line_with_the_cure(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    with pytest.raises(UsageError) as caught:
        check_optimizer(name)
    assert f"pip install 'dbadapter[{name}]'" in str(caught.value)
    assert "\n" not in str(caught.value)


def fake_bitsandbytes(step: Any) -> types.ModuleType:
    module: Any = types.ModuleType("bitsandbytes")

    class AdamW8bit(torch.optim.SGD):
        def __init__(self, groups: Any, weight_decay: float) -> None:
            super().__init__(groups, weight_decay=weight_decay)

        def step(self, closure: Any = None) -> Any:
            return step()

    module.optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    loaded: types.ModuleType = module
    return loaded


def test_adamw8bit_is_tried_where_it_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setitem(sys.modules, "bitsandbytes", fake_bitsandbytes(fails))
    check_optimizer("adamw8bit")
    with pytest.raises(UsageError, match=r"cannot run on cpu here \(no kernel\); use --optimizer adamw$"):
        check_optimizer("adamw8bit", CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake_bitsandbytes(lambda: None))
    with pytest.raises(UsageError, match="has no effect on cpu"):
        check_optimizer("adamw8bit", CPU)


def test_adamw_needs_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(name: str, *rest: Any) -> Any:
        assert name not in ("bitsandbytes", "prodigyopt")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", guarded)
    Problem("adamw").run(0, 1)
