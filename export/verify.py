"""Run the gate of an export again, on another machine or another provider, without the base."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dbadapter.errors import BaseError
from dbadapter.export import parity
from dbadapter.export.layout import write_json
from dbadapter.export.pipeline import REPORT_NAME
from dbadapter.export.runtime import pick_providers

__all__ = ["verify"]


def verify(
    folder: str | Path,
    providers: Sequence[str] | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare an exported folder with what torch gave when it was exported, and note it in its report.

    Args:
        folder: as `export_onnx` writes it.
        providers: as for `load_onnx_pipeline`; CUDA where it is, else the CPU.
        progress: called with (stage, parts done, of how many).
    Returns:
        The gate's report; export_report.json keeps it under `verified`, by provider.
    Raises:
        BaseError: the folder is no export of ours.
        UsageError: it is for GPUs, and there is none here.
        ExportError: it differs from torch by more than the tolerance.
    """
    folder = Path(folder)
    path = folder / REPORT_NAME
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        dtype = str(report["dtype"])
        if dtype not in parity.TOLERANCE:
            raise ValueError(f"unknown dtype {dtype!r}")
        if not isinstance(report.setdefault("verified", {}), dict):
            raise TypeError("`verified` is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseError(f"{path} cannot be read ({error}); export the model again") from None
    names = pick_providers(providers)
    found = parity.check(
        folder,
        parity.Record.load(folder / parity.RECORD_NAME),
        dtype=dtype,
        providers=names,
        progress=None if progress is None else lambda done, total: progress("verifying", done, total),
    )
    report["verified"][names[0]] = found
    if names[0] == "CUDAExecutionProvider":
        report["cuda"] = "verified"
    write_json(path, report)
    return found
