"""ONNX: export a base with its adapters, check it against torch, run it under diffusers' pipelines."""

from __future__ import annotations

from dbadapter.export.runtime import load_onnx_pipeline
from dbadapter.export.to_onnx import export_onnx

__all__ = ["export_onnx", "load_onnx_pipeline"]
