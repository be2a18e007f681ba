"""One part of `benchmarks.gpu`, in a process of its own: the device's limits, a smoke test, the rest."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cells import Cell, Settings, base_of, do_cells, one_line, seconds_of
from benchmarks.gpu_inference import infer
from benchmarks.gpu_training import train
from benchmarks.report import last_word

__all__ = ["PARTS"]

MB = 2**20


# --- limits


def limits(settings: Settings) -> Iterator[Cell]:
    """Yield the device's own limits: products of large square matrices, and copies in its memory."""
    yield Cell("products", 5 if settings.tiny else 15, lambda: products(settings))
    yield Cell("copies", 5 if settings.tiny else 10, lambda: copies(settings))


def products(settings: Settings) -> dict[str, Any]:
    """Return the best rate of a matrix product in each precision, in units of 1e12 operations a second."""
    device = "cuda" if settings.on_gpu else "cpu"
    side = 512 if settings.tiny else 8192 if settings.on_gpu else 2048
    kinds: dict[str, tuple[torch.dtype, str]] = {"fp32": (torch.float32, "highest")}
    if settings.on_gpu:
        kinds["tf32"] = (torch.float32, "high")
    kinds |= {"bf16": (torch.bfloat16, "highest"), "fp16": (torch.float16, "highest")}
    rates, left_out = {}, {}
    before = torch.get_float32_matmul_precision()
    for name, (dtype, precision) in kinds.items():
        try:
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            best = min(seconds_of(lambda a=a, b=b: a @ b, 3 if settings.tiny else 20))
            rates[name] = float(f"{2 * side**3 / best / 1e12:.4g}")
        except RuntimeError as error:
            left_out[name] = one_line(error)
        finally:
            torch.set_float32_matmul_precision(before)
    return {"device": device, "side": side, "tera_flops": rates, "left_out": left_out}


def copies(settings: Settings) -> dict[str, Any]:
    """Return the best rate of a copy in the device's memory, read and written, in 1e9 bytes a second."""
    device = "cuda" if settings.on_gpu else "cpu"
    size = 16 * MB if settings.tiny else 2048 * MB if settings.on_gpu else 256 * MB
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), 3 if settings.tiny else 20))
    found = {"device": device, "bytes": size, "giga_bytes": float(f"{2 * size / best / 1e9:.4g}")}
    if settings.on_gpu:
        pinned = torch.empty(size // 4, pin_memory=True)
        best = min(seconds_of(lambda: source.copy_(pinned, non_blocking=True), 5))
        found["giga_bytes_from_the_host"] = float(f"{size / best / 1e9:.4g}")
    return found


# --- smoke


def smoke(settings: Settings) -> Iterator[Cell]:
    """Yield the job by the commands themselves: on the embedded base, or on a tiny one."""
    yield Cell("train_and_generate", 10 if settings.tiny else 45, lambda: whole_job(settings))
    yield Cell("export_and_generate", 20 if settings.tiny else 60, lambda: onnx_job(settings))


def whole_job(settings: Settings) -> dict[str, Any]:
    """Train by the base's defaults, read the file, draw a picture; return each command's seconds.

    Raises:
        RuntimeError: a command failed; its last line.
    """
    from dbadapter import toybox

    example, out = toybox.example_subject(), settings.work / "smoke"
    trained = ["train", "--instance-data-dir", str(example.folder), "--class-noun", example.class_noun]
    trained += ["--output-dir", str(out / "adapter"), "--overwrite", "--identifier", "sks"]
    trained += [*on_base(settings), *(["--max-train-steps", "2"] if settings.tiny else [])]
    file = out / "adapter/adapter.safetensors"
    found = {
        "train_seconds": commanded(trained),
        "inspect_seconds": commanded(["inspect", str(file)]),
        "generate_seconds": commanded(
            [*drawn(settings, file), *on_base(settings), "--output-dir", str(out / "pictures")]
        ),
    }
    lines = (out / "adapter/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["last_instance_loss"] = json.loads(lines[-1])["instance_loss"]
    return found | {"steps": len(lines), "bytes": file.stat().st_size}


def onnx_job(settings: Settings) -> dict[str, Any]:
    """Export the base for swapping, verify it, draw by it what torch drew; return seconds and how far it is.

    Raises:
        RuntimeError: a command failed; its last line.
    """
    import numpy as np
    from PIL import Image

    out, target = settings.work / "smoke", "cuda" if settings.on_gpu else "portable"
    onnx, file = out / "onnx", out / "adapter/adapter.safetensors"
    words = ["export", "--onnx", *on_base(settings), "--swappable", "--target", target, "--dtype", "float16"]
    found: dict[str, Any] = {"target": target}
    found["export_seconds"] = commanded([*words, "--output-dir", str(onnx), "--overwrite"])
    found["verify_seconds"] = commanded(["export", "--verify", str(onnx)])
    words = [*drawn(settings, file), "--onnx", str(onnx), "--output-dir", str(out / "pictures-onnx")]
    found["generate_seconds"] = commanded(words)
    both = [np.asarray(Image.open(out / name / "0000.png"), int) for name in ("pictures", "pictures-onnx")]
    return found | {"most_difference_of_255": int(abs(both[0] - both[1]).max())}


def on_base(settings: Settings) -> list[str]:
    """Return the words for a tiny base, which is exported sooner than toybox; none for toybox."""
    return ["--base", str(base_of("sd15", settings))] if settings.tiny else []


def drawn(settings: Settings, file: Path) -> list[str]:
    """Return the words that draw the subject."""
    from dbadapter import toybox

    words = ["generate", "--adapter", str(file), "--overwrite"]
    words += ["--prompt", f"a photo of sks {toybox.example_subject().class_noun}"]
    return [*words, "--num-inference-steps", "2" if settings.tiny else "25"]


def commanded(words: list[str]) -> float:
    """Run a command in a process of its own and return its seconds.

    Raises:
        RuntimeError: it failed; its last line.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dbadapter", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"dbadapter {words[0]}: {last_word(done.stderr, 'no word')}")
    return round(time.perf_counter() - began, 2)


#: Name -> what yields its cells; in order of worth.
PARTS: dict[str, Callable[[Settings], Iterator[Cell]]] = {
    "limits": limits,
    "smoke": smoke,
    "train-sd15": lambda settings: train("sd15", settings),
    "infer-sd15": lambda settings: infer("sd15", settings),
    "train-sdxl": lambda settings: train("sdxl", settings),
    "infer-sdxl": lambda settings: infer("sdxl", settings),
}


def main() -> None:
    """Do one part and leave its record in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), required=True)
    parser.add_argument("--settings", required=True, help="JSON: work, tiny, seconds, threads, script, done")
    parser.add_argument("--record", type=Path, required=True, help="the JSON file")
    given = parser.parse_args()
    told = json.loads(given.settings)
    script = Path(told["script"]) if told["script"] else None
    settings = Settings(
        Path(told["work"]), told["tiny"], told["seconds"], told["threads"], script, frozenset(told["done"])
    )
    settings.work.mkdir(parents=True, exist_ok=True)
    do_cells(PARTS[given.part](settings), told["done"], settings.seconds, given.record)


if __name__ == "__main__":
    main()
