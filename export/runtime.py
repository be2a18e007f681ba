"""ONNX Runtime: providers, sessions, and one session's calls with torch's own memory bound to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from dbadapter.errors import BaseError, ExportError, UsageError

__all__ = ["Runner", "open_session", "pick_providers"]

_TORCH_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}
_NUMPY_TYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int32: np.int32,
    torch.int64: np.int64,
}


def pick_providers(wish: Sequence[str] | None = None) -> list[str]:
    """Return the execution providers to use: the wish, or CUDA where it is, and always the CPU last.

    Raises:
        UsageError: a provider that this installation of ONNX Runtime has not.
    """
    available = onnxruntime.get_available_providers()
    if wish is None:
        # The GPU package names CUDA on machines without a GPU too.
        usable = "CUDAExecutionProvider" in available and torch.cuda.is_available()
        wish = ["CUDAExecutionProvider"] if usable else []
    unknown = [name for name in wish if name not in available]
    if unknown:
        raise UsageError(
            f"ONNX Runtime has no provider {', '.join(unknown)} here; it has {', '.join(available)}"
        )
    return [*(name for name in wish if name != "CPUExecutionProvider"), "CPUExecutionProvider"]


def open_session(path: str | Path, providers: Sequence[str] | None = None) -> Any:
    """Return an ONNX Runtime session of one model file.

    Raises:
        BaseError: the file is missing or broken.
    """
    names = pick_providers(providers)
    if "CUDAExecutionProvider" in names and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN lie in torch's folders, where the loader does not look
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: the warnings are about its own graph passes
    options.intra_op_num_threads = torch.get_num_threads()  # OMP_NUM_THREADS counts for both libraries
    if not Path(path).is_file():
        raise BaseError(f"ONNX model {path} is missing; export it again")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=names)
    except Exception as error:  # its exception classes share no base of their own
        reason = str(error).strip().splitlines()[0]
        raise BaseError(f"ONNX model {path} cannot be loaded ({reason}); export it again") from error


class Runner:
    """One session, called without copies: torch's memory is bound for inputs and outputs.

    A swappable graph's factors are bound once, when they change, and stay bound from call to call. What is
    not bound takes the graph's default: no adapter.

    Args:
        session: an ONNX Runtime session.
    Raises:
        BaseError: it takes or gives what a model of ours does not.

    Attributes:
        inputs, outputs: name -> dtype; inputs with the factors.
        factor_shapes: input name of a factor -> dimensions, a word for the free rank; empty if merged.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        free = session.get_overridable_initializers()  # inputs that have a default
        ends = (*session.get_inputs(), *free, *session.get_outputs())
        if strange := next((entry for entry in ends if entry.type not in _TORCH_TYPES), None):
            raise BaseError(
                f"the ONNX model is no export of ours: {strange.name} is {strange.type}; export it again"
            )
        self._needed = {entry.name: tuple(entry.shape) for entry in session.get_inputs()}
        self.inputs = {entry.name: _TORCH_TYPES[entry.type] for entry in (*session.get_inputs(), *free)}
        self.outputs = {entry.name: _TORCH_TYPES[entry.type] for entry in session.get_outputs()}
        self.factor_shapes = {entry.name: tuple(entry.shape) for entry in free}
        self.device = session_device(session)
        self._factors: dict[str, Tensor] = {}
        self._binding = session.io_binding()

    @property
    def factors(self) -> dict[str, Tensor]:
        """The adapter's factors that are bound, on the session's device; do not change them in place."""
        return dict(self._factors)

    def set_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Bind these factors in place of all earlier ones; none is no adapter.

        Args:
            factors: input name -> value, of shapes that fit (see `adapters.fitted_factors`).
        """
        # A new binding: an input that was bound once cannot be given back to its default.
        self._binding = self.session.io_binding()
        self._factors = {name: self._placed(name, value) for name, value in factors.items()}
        for name, value in self._factors.items():
            self._bind(name, value)

    def __call__(
        self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """Run the session and return its outputs, in the graph's dtype on its device.

        Args:
            inputs: by name, any dtype and device; cast and moved to what the session takes.
            output_shapes: of the outputs to return.
        Raises:
            UsageError: an input is missing, or has dimensions that the graph does not take.
            ExportError: ONNX Runtime cannot compute with them.
        """
        self._check_inputs(inputs)
        bound = {name: self._placed(name, value) for name, value in inputs.items()}
        for name, value in bound.items():
            self._bind(name, value)
        outputs = {}
        for name, shape in output_shapes.items():
            outputs[name] = torch.empty(tuple(shape), dtype=self.outputs[name], device=self.device)
            self._bind(name, outputs[name], output=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime works on a stream of its own
        try:
            self.session.run_with_iobinding(self._binding)
        except Exception as error:  # its exception classes share no base of their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "alloc" in reason.lower():
                raise  # out of memory is told elsewhere
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in bound.items())
            raise ExportError(f"ONNX Runtime cannot compute with {shapes}: {reason}") from error
        finally:
            self._binding.clear_binding_outputs()
        return outputs

    def _check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse a call that leaves an input out: the last call's memory would still be bound to it."""
        for name, dims in self._needed.items():
            if name not in inputs:
                raise UsageError(
                    f"the ONNX model's input {name} is missing; give all of {', '.join(self._needed)}"
                )
            shape = tuple(inputs[name].shape)
            if not dims:  # of any rank
                continue
            wrong = any(isinstance(d, int) and d != n for d, n in zip(dims, shape, strict=False))
            if wrong or len(dims) != len(shape):
                raise UsageError(f"the ONNX model's input {name} must be {dims}, got {shape}")

    def _placed(self, name: str, value: Tensor) -> Tensor:
        return value.detach().to(self.device, self.inputs[name]).contiguous()

    def _bind(self, name: str, value: Tensor, *, output: bool = False) -> None:
        bind = self._binding.bind_output if output else self._binding.bind_input
        kind = _NUMPY_TYPES[value.dtype]
        bind(name, self.device.type, self.device.index or 0, kind, tuple(value.shape), value.data_ptr())


def session_device(session: Any) -> torch.device:
    """Return where a session computes."""
    return (
        torch.device("cuda", 0)
        if session.get_providers()[0] == "CUDAExecutionProvider"
        else torch.device("cpu")
    )
