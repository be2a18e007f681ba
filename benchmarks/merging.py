"""What does merging cost, beside PEFT's add_weighted_adapter, and baking, beside diffusers' fuse_lora?

`python -m benchmarks.merging --json OUT [--quick]` merges two random adapters of the true sizes, exactly and
cut to a rank, and bakes them into a base of the true size; each side in a process of its own, by turns.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import report
from benchmarks.true_size import read_config, write_base
from dbadapter import lora, toybox
from dbadapter.adapter import Adapter, LoraWeights
from dbadapter.adapter_file import read_adapter, write_adapter
from dbadapter.cli.group import Command

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("sd1", "sdxl")
# name -> (rank, alpha, weight): two adapters as people mix them.
ADAPTERS = {"one": (16, 16.0, 0.7), "two": (32, 16.0, 0.5)}
RANK = 16
CHECKED = 8  # layers whose result is compared with float64


def unet_config(family: str) -> dict[str, Any]:
    """Return the configuration of a family's UNet."""
    if family == "toybox":
        found: dict[str, Any] = json.loads((toybox.folder() / "unet/config.json").read_text())
        return found
    return read_config(family, "unet")


def random_adapter(family: str, rank: int, alpha: float, seed: int) -> Adapter:
    """Return an adapter on the attention of a family's UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(family))
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, layer in lora.target_layers(unet, "unet", ["attention"]).items():
        out, inner = layer.get_parameter("weight").shape
        a = torch.randn(rank, inner, generator=generator) / inner**0.5
        b = torch.randn(out, rank, generator=generator) * 0.01
        modules[name] = LoraWeights(a.half(), b.half(), alpha)
    return Adapter(family, modules)


def write_adapters(family: str, folder: Path) -> dict[str, Any]:
    """Write both adapters in kohya's layout and by PEFT's keys, and return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = {}, {}
    for seed, (name, (rank, alpha, weight)) in enumerate(ADAPTERS.items()):
        adapter = random_adapter(family, rank, alpha, seed)
        file = folder / f"{name}.safetensors"
        write_adapter(file, adapter, sidecars=False, overwrite=True)
        plain = folder / f"{name}-peft.safetensors"
        parts = ("lora_A", "lora_B")
        tensors = {f"{n}.{p}.weight": getattr(w, p) for n, w in adapter.modules.items() for p in parts}
        save_file(tensors, plain)
        about = {"rank": rank, "alpha": alpha, "weight": weight}
        ours[name] = about | {"file": str(file)}
        theirs[name] = about | {"file": str(plain)}
    return {"ours": ours, "peft": theirs, "layers": len(adapter.modules), "bytes": file.stat().st_size}


def run(task: str, settings: dict[str, Any], work: Path, threads: int) -> dict[str, Any]:
    """Do one task of `benchmarks.merging_peer` in a process of its own and return its figures.

    Raises:
        ClickException: it failed; the message has its last line.
    """
    record = work / "record.json"
    record.unlink(missing_ok=True)
    words = ["--task", task, "--record", str(record), "--settings", json.dumps(settings)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.merging_peer", *words],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode or not record.exists():
        said = report.last_word(done.stderr, f"it ended with {done.returncode}")
        raise click.ClickException(f"{task} failed: {said}")
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def compare(task: str, settings: dict[str, Any], work: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Return both sides' figures of one task, medians of rounds by turns, and the ratios theirs to ours."""
    runs: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    errors = {}
    for number in range(rounds):
        for side in list(runs)[:: 1 if number % 2 == 0 else -1]:
            output = work / f"out-{side}{'' if task == 'bake' else '.safetensors'}"
            runs[side].append(run(f"{task}-{side}", settings | {"output": str(output)}, work, threads))
            if task == "merge":
                errors[side] = error_of(output, settings)
            if output.is_dir():
                shutil.rmtree(output)
            seconds = runs[side][-1]["seconds"]["all"]
            click.echo(f"{settings['family']} {task} {side}: {seconds:.4g} s", err=True)
    out: dict[str, Any] = {side: summary(each) for side, each in runs.items()}
    if errors:
        out["error_of_the_file"] = {side: float(f"{value:.3g}") for side, value in errors.items()}
    out["ratios"] = {
        "seconds": ratio(out, lambda side: side["seconds"]["all"]),
        "seconds_of_the_merge": ratio(out, lambda side: side["seconds"]["merge"]),
        "peak_memory": ratio(out, lambda side: side["peak_memory_mb"]),
    }
    return out


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the runs of one side, and all runs' whole seconds."""
    stages = runs[0]["seconds"]
    return {
        "seconds": {s: rounded(statistics.median(each["seconds"][s] for each in runs)) for s in stages},
        "seconds_all": [rounded(each["seconds"]["all"]) for each in runs],
        "peak_memory_mb": rounded(statistics.median(each["peak_memory_mb"] for each in runs)),
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def ratio(sides: dict[str, Any], figure: Any) -> float:
    """Return theirs divided by ours: above 1, ours is less."""
    return rounded(figure(sides["theirs"]) / max(figure(sides["ours"]), 1e-9))


def error_of(output: Path, settings: dict[str, Any]) -> float:
    """Return the largest relative error of the written file in some layers, against whole matrices."""
    sums: dict[str, Tensor] = {}
    for about in settings["ours"].values():
        modules = read_adapter(about["file"]).modules
        for name in list(modules)[:: max(1, len(modules) // CHECKED)]:
            change = modules[name].lora_B.double() @ modules[name].lora_A.double()
            sums[name] = sums.get(name, torch.zeros(())) + about["weight"] * modules[name].scaling * change
    ours = any(key.startswith("lora_unet_") for key in load_file(output))
    found = read_adapter(output).modules if ours else None
    plain = load_file(output)
    worst = 0.0
    for name, wanted in sums.items():
        if found is not None:
            got = found[name].lora_B.double() @ found[name].lora_A.double() * found[name].scaling
        else:  # PEFT's result has a scale of 1
            got = plain[f"{name}.lora_B.weight"].double() @ plain[f"{name}.lora_A.weight"].double()
        worst = max(worst, float((got - wanted).norm() / wanted.norm()))
    return worst


@click.command(cls=Command)
@click.option(
    "--families",
    default=",".join(FAMILIES),
    show_default=True,
    help="Whose adapters are merged; may be empty.",
)
@click.option(
    "--bake", "baked", default="sd1", show_default=True, help="Whose bases are baked; may be empty."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of the exact merge.")
@click.option("--threads", type=click.IntRange(1), help="Of each process.  [default: the machine's cores]")
@click.option("--json", "json_path", type=report.A_JSON, help="Where the figures go.")
@click.option(
    "--work-dir",
    type=report.A_FOLDER,
    default=ROOT / "benchmarks/.cache/merging",
    help="Keeps adapters and bases (2 GB for sd1, 7 GB for sdxl).  [default: benchmarks/.cache]",
)
@click.option("--quick", is_flag=True, help="toybox, one round: checks the machinery only.")
def main(
    families: str,
    baked: str,
    rounds: int,
    threads: int | None,
    json_path: Path | None,
    work_dir: Path,
    quick: bool,
) -> None:
    """Measure merging and baking beside PEFT's and diffusers' and print JSON."""
    known = (*FAMILIES, "toybox")
    chosen = ["toybox"] if quick else report.chosen(families, known, "families", none=True)
    bases = ["toybox"] if quick else report.chosen(baked, known, "bake", none=True)
    rounds = 1 if quick else rounds
    threads = report.threads_of(threads)
    work = work_dir.resolve()
    tables: dict[str, Any] = {"exact": {}, "rank": {}, "bake": {}}
    for family in chosen:
        whole = {"family": family, "config": unet_config(family), "rank": 0}
        whole |= write_adapters(family, work / family)
        about = {"layers": whole["layers"], "file_mb": rounded(whole["bytes"] / 2**20)}
        tables["exact"][family] = about | compare("merge", whole, work, threads, rounds)
        tables["rank"][family] = about | compare("merge", whole | {"rank": RANK}, work, threads, 1)
    for family in bases:
        base = toybox.folder() if family == "toybox" else work / f"{family}-random"
        if family != "toybox":
            click.echo(f"a base of the true size of {family} with random weights, once", err=True)
            write_base(base, family, torch.float16)
        settings = {"family": family, "base": str(base)} | write_adapters(family, work / family)
        tables["bake"][family] = compare("bake", settings, work, threads, min(rounds, 2))
    report.write(
        {
            "benchmark": "merging",
            "quick": quick,
            "threads": threads,
            "rank": RANK,
            "adapters": {
                name: dict(zip(("rank", "alpha", "weight"), a, strict=True)) for name, a in ADAPTERS.items()
            },
            "tables": tables,
        },
        json_path,
    )


if __name__ == "__main__":
    main()
