"""The optimizers of a run, and their whole state by name, so that a checkpoint continues each exactly."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter.config_checks import OPTIMIZERS
from dbadapter.errors import TrainingError, UsageError

__all__ = ["OPTIMIZERS", "check_optimizer", "load_state", "make_optimizer", "state_tensors"]

# Prodigy's first estimate, below which it never falls. From its own default, 1e-6, the first 75 steps of a
# run on toybox went into growing; from 1e-5 it was 50, from 1e-4 none; each came to about 1e-3. Not 1e-4,
# which is the whole rate that LoRA on SD1.5 is trained at.
PRODIGY_D0 = 1e-5
WEIGHT_DECAY = 0.01  # AdamW's default in torch and bitsandbytes, and what Prodigy's README advises

_PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
# Prodigy keeps its estimate of the learning rate in the groups. Not lr: a resumed run may lower it.
_GROUP_STATE = ("d", "d0", "d_max", "d_numerator", "d_denom", "d_hat", "k")


def check_optimizer(name: str, device: torch.device | None = None) -> None:
    """Pass if the optimizer can run.

    Args:
        name: of `OPTIMIZERS`.
        device: where the parameters will be; with it, `adamw8bit` takes a step on trial there.
    Raises:
        UsageError: an unknown name, a package that is not installed, or one that cannot run on the device.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    package = _PACKAGES.get(name)
    if package is not None and package not in sys.modules and find_spec(package) is None:
        raise UsageError(
            f"optimizer {name} needs the package {package}, which is not installed: "
            f"pip install 'dbadapter[{name}]'"
        )
    if name == "adamw8bit" and device is not None:
        # No list of devices would stay true: since 0.50 its kernels run on many CPUs too, not on all.
        trial = nn.Parameter(torch.zeros(4096, device=device))  # from this size on moments have 8 bits
        trial.grad = torch.ones_like(trial)
        try:
            _adamw8bit([{"params": [trial], "lr": 0.1}]).step()
            moved = bool(trial.detach().abs().min() > 0)
        except Exception as error:  # its back ends raise whatever they do: RuntimeError, NotImplementedError
            raise UsageError(
                f"optimizer adamw8bit cannot run on {device.type} here ({_first_line(error)}); "
                "use --optimizer adamw"
            ) from error
        if not moved:
            raise UsageError(
                f"optimizer adamw8bit has no effect on {device.type} here; use --optimizer adamw"
            )


def make_optimizer(
    name: str,
    groups: Sequence[Mapping[str, Any]],
    device: torch.device,
    *,
    prodigy_d0: float = PRODIGY_D0,
) -> torch.optim.Optimizer:
    """Return an optimizer whose groups keep their `initial_lr` for a schedule.

    `prodigy` (Mishchenko and Defazio 2023, arXiv 2306.06101) estimates the learning rate itself: `initial_lr`
    is a factor on its estimate, 1 by convention, and the same for all groups, which share one estimate. It
    runs as its README advises for diffusion models: decoupled weight decay of 0.01, bias correction,
    safeguard_warmup.

    Args:
        name: of `OPTIMIZERS`.
        groups: {"params": parameters, "initial_lr": rate}; groups without parameters are left out.
        device: of the parameters.
        prodigy_d0: the estimate that `prodigy` starts from, for factors of LoRA; 1e-6 for whole weights.
    Raises:
        UsageError: as `check_optimizer`; for `prodigy`, factors that differ or are not above 0.
    """
    check_optimizer(name, device)
    used = [
        {"params": list(group["params"]), "initial_lr": group["initial_lr"], "lr": group["initial_lr"]}
        for group in groups
        if group["params"]
    ]
    if name == "adamw":
        return torch.optim.AdamW(used, weight_decay=WEIGHT_DECAY, fused=True)
    if name == "adamw8bit":
        return _adamw8bit(used)
    return _prodigy(used, prodigy_d0)


def state_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], *, copies: bool = True
) -> dict[str, Tensor]:
    """Return all that the optimizer has learned, copied to the CPU; empty before the first step.

    Args:
        parameters: whose state; entry N is the state of `parameters[N]`.
        copies: False gives the optimizer's own tensors, which the next step changes.
    Returns:
        NAME.N of parameter N ("exp_avg.0", "exp_avg_sq.0", "step.0", ...) and group.NAME.N of group N
        ("group.d.0"). Python's own numbers are float64 or int64 of shape (), which no tensor of a state is.
    """
    tensors: dict[str, Tensor] = {}
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            ours = isinstance(value, Tensor) and not copies
            tensors[f"{name}.{index}"] = value.detach() if ours else _packed(value)
    if tensors:
        for index, group in enumerate(optimizer.param_groups):
            for name in _GROUP_STATE:
                if name in group:
                    tensors[f"group.{name}.{index}"] = _packed(group[name])
    return tensors


def load_state(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `state_tensors` returned; every step after it is as it would have been.

    Learning rates stay as they are: a lower one is the cure for a loss that is not finite.

    Args:
        parameters: as given to `state_tensors`.
        tensors: copied; other names (e.g. "parameter.0") are passed over.
    Raises:
        TrainingError: it is the state of another optimizer.
    """
    theirs = {name.split(".")[0] for name in tensors} - {"parameter"}
    if theirs and ("group" in theirs, "state1" in theirs) != _kind(optimizer):
        raise TrainingError(
            "the checkpoint is of another --optimizer; set it back, or start anew with --overwrite"
        )
    states: dict[int, dict[str, Any]] = {index: {} for index in range(len(parameters))}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition(".")[0].rpartition(".")
        index = int(key.rpartition(".")[2])
        if owner == "group" and name in _GROUP_STATE and index < len(optimizer.param_groups):
            optimizer.param_groups[index][name] = _unpacked(tensor, torch.device("cpu"))
        elif not owner and name != "parameter" and index in states:
            states[index][name] = _unpacked(tensor, parameters[index].device)
    # Not load_state_dict: it would bring back the old learning rates too.
    for index, state in states.items():
        optimizer.state[parameters[index]] = state


def _adamw8bit(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, weight_decay=WEIGHT_DECAY)
    return optimizer


def _prodigy(groups: list[dict[str, Any]], d0: float) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    factors = sorted({float(group["initial_lr"]) for group in groups})
    if len(factors) > 1 or factors[0] <= 0:
        # It would raise in the middle of the first step.
        raise UsageError(
            "optimizer prodigy takes one learning rate above 0 for the UNet and the text encoder, got "
            f"{' and '.join(f'{factor:g}' for factor in factors)}; pass 1 for both"
        )
    if not 0.1 <= factors[0] <= 10:
        warnings.warn(
            f"optimizer prodigy finds the learning rate itself and takes {factors[0]:g} as a factor on it; "
            "pass --learning-rate 1",
            UserWarning,
            stacklevel=3,
        )
    # The decay is set in the groups: as an argument it makes the constructor print a line.
    used = [{**group, "weight_decay": WEIGHT_DECAY} for group in groups]
    optimizer: torch.optim.Optimizer = Prodigy(
        used, lr=1.0, d0=d0, decouple=True, use_bias_correction=True, safeguard_warmup=True
    )
    return optimizer


def _kind(optimizer: torch.optim.Optimizer) -> tuple[bool, bool]:
    """Return whether it keeps state in its groups, and whether it names its moments state1 and state2."""
    in_groups = any(name in group for group in optimizer.param_groups for name in _GROUP_STATE)
    return in_groups, type(optimizer).__name__ == "AdamW8bit"


def _packed(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _unpacked(tensor: Tensor, device: torch.device) -> Any:
    if tensor.dim() == 0 and tensor.dtype in (torch.float64, torch.int64):
        return tensor.item()
    return tensor.to(device, copy=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
