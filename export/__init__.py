"""ONNX: export a base with its adapters, check it against torch, run it under diffusers' pipelines."""

from __future__ import annotations

from dbadapter.export.pipeline import OnnxPipeline, load_onnx_pipeline
from dbadapter.export.to_onnx import export_onnx
from dbadapter.export.verify import verify

__all__ = ["OnnxPipeline", "export_onnx", "load_onnx_pipeline", "verify"]
