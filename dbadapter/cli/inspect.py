"""`dbadapter inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dbadapter.cli.options import BASE_HELP, FilePath, prediction_option
from dbadapter.errors import AdapterError, UsageError

if TYPE_CHECKING:
    from dbadapter.diffusers_check import Comparison

__all__ = ["inspect"]


@click.command()
@click.argument("adapter", type=FilePath(), metavar="FILE")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object; docs/inspect.md has its fields."
)
@click.option("--verify", is_flag=True,
              help="Load it with diffusers' own loader too, and compare every layer.")  # fmt: skip
@click.option("--base", metavar="BASE", help=f"For --verify.  {BASE_HELP}")
@prediction_option
def inspect(
    adapter: Path, as_json: bool, verify: bool, base: str | None, prediction_type: str | None
) -> None:
    """Describe an adapter file and what each tool does with it.

    FILE is a .safetensors adapter of any kind, or a PEFT folder. Loaded, partly, ignored or refused, and why,
    in diffusers, ComfyUI, AUTOMATIC1111, Forge, InvokeAI, sd-scripts and stable-diffusion.cpp.

    \b
    Example:
      dbadapter inspect my-dog/my-dog.safetensors
      dbadapter inspect my-dog/my-dog.safetensors --verify --base stable-diffusion-v1-5
    """
    if verify and adapter.is_dir():
        raise UsageError(
            f"--verify reads a file through diffusers' own loader, and {adapter} is a folder: convert it "
            "first (dbadapter convert FOLDER --to diffusers --output FILE.safetensors)"
        )
    if verify and base is None:
        raise UsageError("--verify needs --base BASE: the base that the adapter was trained on")
    if not verify and (base is not None or prediction_type is not None):
        raise UsageError("--base and --prediction-type are for --verify: add it, or leave them out")
    from dbadapter.inspection import inspect_file

    found = inspect_file(adapter)
    comparison = _verified(adapter, str(base), prediction_type) if verify else None
    if as_json:
        if comparison is not None:
            found["verify"] = _as_json(comparison)
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(found)))
        if comparison is not None:
            click.echo(_sentence(comparison))
    if comparison is not None and not comparison.equal:
        if not as_json:
            for layer in comparison.left_out:
                click.echo(f"  left out: {layer}")
        sys.stdout.flush()
        raise AdapterError(f"{adapter}: {comparison.fault()}")


def _verified(adapter: Path, base: str, prediction_type: str | None) -> Comparison:
    from dbadapter.base import load_base
    from dbadapter.diffusers_check import compare_in_pipeline

    loaded = load_base(base, device="cpu", prediction_type=prediction_type)
    return compare_in_pipeline(adapter, loaded.pipeline)


def _as_json(found: Comparison) -> dict[str, Any]:
    return {
        "equal": found.equal,
        "diffusers": found.diffusers,
        "layers": found.layers,
        "left_out": list(found.left_out),
        "added": list(found.added),
        # Infinity is no JSON.
        "difference": found.difference if found.difference < float("inf") else None,
        "layer": found.layer,
        "tolerance": found.tolerance,
        "effect": found.effect,
    }


def _sentence(found: Comparison) -> str:
    both = found.layers - len(found.left_out)
    return (
        f"diffusers {found.diffusers}: {both} of {found.layers} layers loaded, largest difference "
        f"{found.difference:.2g} (allowed {found.tolerance:.2g}); "
        f"the adapter changes the weights by {found.effect or 0:.2g} of their size"
    )


def _lines(found: dict[str, Any]) -> list[str]:
    """Return the description as text, one fact a line, and the table of tools."""
    algorithms = ", ".join(found["algorithms"])
    lines = [
        f"{found['file']}: {found['format']}" + (f", {algorithms}" if algorithms else ""),
        f"base:      {found['base']['family']} ({found['base']['evidence']})",
        *(f"           but {conflict}" for conflict in found["base"]["conflicts"]),
        f"size:      {found['size'] / 2**20:.2f} MB, {found['tensors']} tensors, "
        + ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items()),
    ]
    for name in ("rank", "alpha"):
        if found[name]["counts"]:
            lines.append(f"{name + ':':<11}{_spread(found[name])}")
    for component, kinds in found["layers"].items():
        lines.append(f"layers:    {component}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    if found["trigger"]:
        lines.append(f"trigger:   {', '.join(found['trigger'])}")
    hashes = found["hashes"]
    lines.append(f"sha256:    {hashes['file_sha256']}")
    words = {True: "agrees", False: "DIFFERS", None: "not stored"}
    stored = ", ".join(f"{key} {words[agrees]}" for key, agrees in hashes["stored_agree"].items())
    lines += [f"hashes:    {stored}", f"thumbnail: {'yes' if found['thumbnail'] else 'no'}"]
    if found["training"]:
        lines.append("training:")
        lines += [f"  {key} = {' '.join(value.split())}" for key, value in found["training"].items()]
    lines.append("tools:")
    for row in found["tools"]:
        count = f"{row['loaded']} of {row['present']}"
        lines.append(
            f"  {row['tool']:<21}{row['result']:<9}{count:<14}{_why(row)}".rstrip(),
        )
    return lines


def _spread(values: dict[str, Any]) -> str:
    counts = values["counts"]
    if len(counts) == 1:
        return str(next(iter(counts)))
    varied = ", ".join(
        f"{count} layers {value}" + (f" (e.g. {example})" if example else "")
        for value, count in counts.items()
        for example in [values["examples_of_others"].get(value)]
    )
    return f"{values['common']:g} mostly: {varied}"


def _why(row: dict[str, Any]) -> str:
    basis = row["basis"] if row["basis"] == "not run" else f"{row['basis']}, {row['source']}"
    return f"{row['reason']} [{row['version']}; {basis}]".lstrip()
