"""One measured run of `benchmarks.training`, in a process of its own: their script or our command.

Both sides first import the same libraries; then a time stamp is taken where each optimizer step begins and
ends, and the process ends itself at the last one, so that neither saving nor samples are in any figure.
"""

from __future__ import annotations

import argparse
import enum
import functools
import importlib.machinery
import importlib.util
import json
import os
import runpy
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Clock", "import_libraries", "install_stand_in", "note_trained", "run_ours", "stand_in"]

MB = 2**20


def resident_mb() -> tuple[float, float]:
    """Return this process's resident memory now and at its peak, in units of 2**20 bytes.

    From /proc where it is: getrusage's peak starts at that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmRSS"].split()[0]) / 1024, int(lines["VmHWM"].split()[0]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MB if sys.platform == "darwin" else 1024)
    return peak, peak


class Clock:
    """Time stamps of a run's optimizer steps, written to a file at the last one.

    Args:
        record: the JSON file.
        spawned: `time.perf_counter()` of the process that started this one: the clock is the system's.
        steps: how many are measured; 0 stops where the first begins.
    """

    def __init__(self, record: Path, spawned: float, steps: int) -> None:
        self.record, self.spawned, self.steps = record, spawned, steps
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.about: dict[str, Any] = {"patches": []}

    def imported(self) -> None:
        """Take the memory and the time after the imports that both sides share."""
        self.about["imports_seconds"] = time.perf_counter() - self.spawned
        self.about["imports_memory_mb"] = resident_mb()[0]

    def begin(self) -> None:
        """Stamp the begin of a step."""
        self.begins.append(_now() - self.spawned)
        if len(self.begins) == 1:
            self.about["startup_peak_memory_mb"] = _peak_mb()
        if self.steps == 0:
            self.finish()

    def end(self) -> None:
        """Stamp the end of a step; after the last one write the file and end the process."""
        self.ends.append(_now() - self.spawned)
        self.cpu.append(time.process_time())
        if len(self.ends) == self.steps:
            self.finish()

    def finish(self) -> None:
        """Write what was measured and end the process at once, before anything is saved or drawn."""
        self.take()
        self.leave()

    def take(self) -> None:
        """Note what was measured up to now."""
        import torch

        on_gpu = torch.cuda.is_available()
        self.about |= {
            "begins": self.begins,
            "ends": self.ends,
            "cpu": self.cpu,
            "threads": torch.get_num_threads(),
            "peak_memory_mb": _peak_mb(),
            "memory_of": "gpu" if on_gpu else "process",
        }

    def save(self) -> None:
        """Write the file."""
        self.record.write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")

    def leave(self) -> NoReturn:
        """Write the file and end the process at once."""
        self.save()
        sys.stdout.flush()
        os._exit(0)


def _now() -> float:
    """Return the time, when all work queued so far is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_mb() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / MB if torch.cuda.is_available() else resident_mb()[1]


def import_libraries() -> None:
    """Import what either side uses, by name: diffusers and transformers load their parts on first use."""
    import accelerate
    import numpy
    import peft
    import PIL.Image
    import torch.utils.data
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DDPMScheduler,
        DiffusionPipeline,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
        optimization,
        training_utils,
    )
    from diffusers.loaders import StableDiffusionLoraLoaderMixin  # noqa: F401
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, PretrainedConfig  # noqa: F401

    assert all((accelerate, numpy, peft, PIL.Image, torch.utils.data))


# --- torchvision, where it is not installed


class InterpolationMode(enum.Enum):
    """torchvision's names of Pillow's filters."""

    NEAREST = 0
    LANCZOS = 1
    BILINEAR = 2
    BICUBIC = 3
    BOX = 4
    HAMMING = 5


class Compose:
    """Apply transforms one after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        """Return the last one's result."""
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """Scale a PIL picture so that its shorter side has `size` pixels, as it is if that is so already."""

    def __init__(
        self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR, **_: Any
    ) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Any) -> Any:
        """Return the picture with its proportions kept; the longer side is rounded down."""
        width, height = image.size
        short = min(width, height)
        if short == self.size:
            return image
        size = (int(self.size * width / short), int(self.size * height / short))
        return image.resize(size, self.interpolation.value)


class CenterCrop:
    """Cut a square of `size` pixels out of a PIL picture's middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        """Return the square."""
        width, height = _at_least(image, self.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomCrop:
    """Cut a square of `size` pixels out of a PIL picture, anywhere."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        """Return the square; places come from torch's generator."""
        import torch

        width, height = _at_least(image, self.size)
        if width == height == self.size:
            return image
        top = int(torch.randint(0, height - self.size + 1, (1,)))
        left = int(torch.randint(0, width - self.size + 1, (1,)))
        return image.crop((left, top, left + self.size, top + self.size))


class RandomHorizontalFlip:
    """Mirror a PIL picture with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Any) -> Any:
        """Return the picture or its mirror image."""
        import torch
        from PIL import Image

        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < self.p else image


class ToTensor:
    """Turn a PIL picture of bytes into floats in [0, 1], shape (channels, height, width)."""

    def __call__(self, image: Any) -> Any:
        """Return the tensor, contiguous, float32."""
        import numpy as np
        import torch

        values = torch.from_numpy(np.array(image, dtype=np.uint8))
        values = values[..., None] if values.ndim == 2 else values
        return values.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)


class Normalize:
    """Subtract the mean and divide by the standard deviation, one or one per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        import torch

        self.mean, self.std, self.inplace = torch.tensor(mean), torch.tensor(std), inplace

    def __call__(self, tensor: Any) -> Any:
        """Return (x - mean) / std, shape (channels, height, width)."""
        tensor = tensor if self.inplace else tensor.clone()
        return tensor.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])


def _at_least(image: Any, size: int) -> tuple[int, int]:
    """Return width and height; torchvision would pad a smaller picture or refuse it."""
    width, height = image.size
    if min(width, height) < size:
        raise ValueError(f"a crop of {size} pixels needs a picture at least that large, got {width}x{height}")
    return width, height


def stand_in() -> types.ModuleType:
    """Return a module `torchvision` that holds the few transforms which the script uses."""
    module, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    for made in (module, transforms):
        # Without one, importlib.util.find_spec raises on a module that is in sys.modules.
        made.__spec__ = importlib.machinery.ModuleSpec(made.__name__, None)
    for part in (
        InterpolationMode,
        Compose,
        Resize,
        CenterCrop,
        RandomCrop,
        RandomHorizontalFlip,
        ToTensor,
        Normalize,
    ):
        setattr(transforms, part.__name__, part)
    module.transforms = transforms  # type: ignore[attr-defined]
    return module


def install_stand_in() -> bool:
    """Put the stand-in into `sys.modules` unless torchvision is installed; return whether it was.

    Call it after transformers and diffusers were imported: they would take it for the real package.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return False
    module = stand_in()
    sys.modules["torchvision"] = module
    sys.modules["torchvision.transforms"] = module.transforms
    return True


# --- the two sides


def note_trained(clock: Clock) -> None:
    """Note what the optimizer holds, when it steps for the first time; the hook is called on both sides."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        if "trained" not in clock.about:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clock.about["trained"] = {
                "parameters": sum(p.numel() for p in parameters),
                "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
                "optimizer": type(optimizer).__name__,
            }

    register_optimizer_step_post_hook(note)


def run_peer(clock: Clock, script: Path, arguments: list[str]) -> None:
    """Run diffusers' script: a step begins with `accelerator.accumulate` and ends with `optimizer.step`."""
    import accelerate
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # its answer is cached: the stand-in is not what transformers looks for
    if install_stand_in():
        clock.about["patches"].append("torchvision is not installed: a stand-in for its transforms")
    accumulate = accelerate.Accelerator.accumulate

    @functools.wraps(accumulate)
    def stamped(self: Any, *models: Any) -> Any:
        clock.begin()
        return accumulate(self, *models)

    accelerate.Accelerator.accumulate = stamped
    register_optimizer_step_post_hook(lambda *_: clock.end())
    sys.argv = [script.name, *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def run_ours(clock: Clock, arguments: list[str]) -> None:
    """Run `dbadapter` with its `training.train_step` between two stamps."""
    from dbadapter import training

    train_step = training.train_step

    @functools.wraps(train_step)
    def stamped(*args: Any, **kwargs: Any) -> Any:
        clock.begin()
        result = train_step(*args, **kwargs)
        clock.end()
        return result

    training.train_step = stamped
    sys.argv = ["dbadapter", *arguments]
    runpy.run_module("dbadapter", run_name="__main__", alter_sys=True)


def main() -> None:
    """Run one side and leave its time stamps in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=("peer", "ours"), required=True)
    parser.add_argument("--script", type=Path, help="diffusers' script, for the side peer")
    parser.add_argument("--record", type=Path, required=True, help="the JSON file")
    parser.add_argument("--spawned", type=float, required=True, help="perf_counter() of the caller")
    parser.add_argument("--steps", type=int, required=True, help="0: stop where the first begins")
    parser.add_argument("arguments", nargs="*", help="of the script or the command, after --")
    given = parser.parse_args()
    clock = Clock(given.record, given.spawned, given.steps)
    import_libraries()
    clock.imported()
    note_trained(clock)
    try:
        if given.side == "peer":
            run_peer(clock, given.script, given.arguments)
        else:
            run_ours(clock, given.arguments)
    except SystemExit as end:
        if end.code:
            raise
    sys.exit(f"the run ended after {len(clock.ends)} of {given.steps} steps")


if __name__ == "__main__":
    main()
