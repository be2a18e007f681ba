"""ONNX Runtime under diffusers: sessions, IO binding, providers, drop-in modules for its pipelines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from dbadapter.errors import BaseError, UsageError

__all__ = ["REPORT_NAME", "load_onnx_pipeline", "open_session", "pick_providers", "run_session"]

REPORT_NAME = "export_report.json"
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
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


def load_onnx_pipeline(folder: str | Path, providers: Sequence[str] | None = None) -> Any:
    """Return a diffusers StableDiffusionPipeline whose models run in ONNX Runtime.

    It is called like any other: `pipeline("a photo of sks dog").images`. Latents and sampler stay float32
    whatever the graphs' precision, so a seed starts from the same noise as in torch.

    Args:
        folder: as `export_onnx` writes it.
        providers: ONNX Runtime's execution providers, the wished one first; None means CUDA where it is, else
            the CPU.
    Raises:
        BaseError: the folder is no ONNX export, or a part of it is missing or broken.
        UsageError: a provider that this installation of ONNX Runtime has not.
    """
    import diffusers

    folder = Path(folder)
    index = _check_folder(folder)
    names = pick_providers(providers)
    sessions = {name: open_session(folder / name / "model.onnx", names) for name in COMPONENTS}
    try:
        pipeline = diffusers.StableDiffusionPipeline(
            **_models(folder, sessions),
            scheduler=getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as error:  # third-party loaders raise anything on a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(f"{folder}: the ONNX export cannot be loaded ({reason}); export it again") from error
    pipeline.register_to_config(_name_or_path=str(folder))
    pipeline.family = _family(folder)  # `generate_pictures` takes its guidance scale by it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def run_session(
    session: Any, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Run a session without copies: torch's own memory is bound for inputs and outputs.

    Args:
        inputs: by name, any dtype and device; cast and moved to what the session takes.
        output_shapes: of the outputs to compute.
    Returns:
        The outputs by name, in the graph's dtypes, on the session's device.
    """
    device = session_device(session)
    binding = session.io_binding()
    bound = []  # keeps the memory alive until the run is over
    for entry in session.get_inputs():
        tensor = inputs[entry.name].detach().to(device, _TORCH_TYPES[entry.type]).contiguous()
        bound.append(tensor)
        binding.bind_input(
            entry.name,
            device.type,
            device.index or 0,
            _NUMPY_TYPES[tensor.dtype],
            tuple(tensor.shape),
            tensor.data_ptr(),
        )
    outputs = {}
    for entry in session.get_outputs():
        if entry.name not in output_shapes:
            continue
        shape = tuple(output_shapes[entry.name])
        tensor = torch.empty(shape, dtype=_TORCH_TYPES[entry.type], device=device)
        binding.bind_output(
            entry.name, device.type, device.index or 0, _NUMPY_TYPES[tensor.dtype], shape, tensor.data_ptr()
        )
        outputs[entry.name] = tensor
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # ONNX Runtime works on a stream of its own
    session.run_with_iobinding(binding)
    return outputs


def session_device(session: Any) -> torch.device:
    """Return where a session computes."""
    return (
        torch.device("cuda", 0)
        if session.get_providers()[0] == "CUDAExecutionProvider"
        else torch.device("cpu")
    )


class _OnnxModule(nn.Module):
    """What a diffusers pipeline asks of any of its models."""

    def __init__(self, session: Any, config: Any) -> None:
        super().__init__()
        self.session = session
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the session computes; `pipeline.to` does not move it."""
        return session_device(self.session)

    @property
    def dtype(self) -> torch.dtype:
        """Always float32: a half-precision graph is fed and read through casts."""
        return torch.float32


class OnnxUNet(_OnnxModule):
    """In place of UNet2DConditionModel."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the prediction like UNet2DConditionModel.forward.

        Raises:
            UsageError: a latent side does not halve evenly as often as the UNet needs, or an input that the
                exported graph has not.
        """
        extras = {"timestep_cond": timestep_cond, "added_cond_kwargs": added_cond_kwargs}
        extras["cross_attention_kwargs"] = cross_attention_kwargs or None
        if unknown := [name for name, value in extras.items() if value is not None]:
            raise UsageError(
                f"the exported UNet has no input {', '.join(unknown)}; export with the adapter merged"
            )
        multiple = 2 ** (len(self.config.block_out_channels) - 1)
        if sample.shape[-2] % multiple or sample.shape[-1] % multiple:
            raise UsageError(
                f"latents must be a multiple of {multiple} high and wide for this ONNX model, got "
                f"{sample.shape[-2]} x {sample.shape[-1]}; choose another height and width"
            )
        inputs = {
            "sample": sample,
            "timestep": torch.as_tensor(timestep),
            "encoder_hidden_states": encoder_hidden_states,
        }
        shape = (sample.shape[0], self.config.out_channels, *sample.shape[2:])
        out = run_session(self.session, inputs, {"out_sample": shape})["out_sample"].float()
        return SimpleNamespace(sample=out) if return_dict else (out,)


class OnnxTextEncoder(_OnnxModule):
    """In place of CLIPTextModel."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Return last_hidden_state and pooler_output like CLIPTextModel.forward.

        Raises:
            UsageError: an attention mask or the hidden states (clip_skip) are asked for.
        """
        if attention_mask is not None or output_hidden_states:
            raise UsageError(
                "the exported text encoder has neither attention mask nor hidden states (clip_skip)"
            )
        width, shape = self.config.hidden_size, tuple(input_ids.shape)
        wanted = {"last_hidden_state": (*shape, width), "pooler_output": (shape[0], width)}
        outputs = run_session(self.session, {"input_ids": input_ids}, wanted)
        values = tuple(outputs[name].float() for name in wanted)
        return _ModelOutput(**dict(zip(wanted, values, strict=True))) if return_dict else values


class OnnxVae(_OnnxModule):
    """In place of AutoencoderKL."""

    def __init__(self, decoder: Any, encoder: Any, config: Any) -> None:
        super().__init__(decoder, config)
        self.encoder_session = encoder

    def decode(self, latents: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Return pixels in [-1, 1] like AutoencoderKL.decode; `generator` is unused there too."""
        batch, _, height, width = latents.shape
        factor = self._factor()
        shape = (batch, self.config.out_channels, height * factor, width * factor)
        out = run_session(self.session, {"latent_sample": latents}, {"sample": shape})["sample"].float()
        return SimpleNamespace(sample=out) if return_dict else (out,)

    def encode(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Return the distribution of the latents like AutoencoderKL.encode.

        Raises:
            UsageError: the sides are no multiple of the VAE's factor.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        batch, _, height, width = sample.shape
        factor = self._factor()
        if height % factor or width % factor:
            raise UsageError(
                f"pictures must be a multiple of {factor} pixels high and wide, got {width} x {height}"
            )
        shape = (batch, 2 * self.config.latent_channels, height // factor, width // factor)
        outputs = run_session(self.encoder_session, {"sample": sample}, {"latent_parameters": shape})
        distribution = DiagonalGaussianDistribution(outputs["latent_parameters"].float())
        return SimpleNamespace(latent_dist=distribution) if return_dict else (distribution,)

    def _factor(self) -> int:
        return int(2 ** (len(self.config.block_out_channels) - 1))


class _ModelOutput(dict[str, Tensor]):
    """A model's outputs by name, as attribute, or by position, as transformers gives them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


def _check_folder(folder: Path) -> dict[str, Any]:
    """Return model_index.json of an ONNX folder, or raise BaseError that says what is wrong with it."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise BaseError(
            f"{folder} is no ONNX export: it has no model_index.json; pass what export --onnx wrote"
        )
    missing = [name for name in COMPONENTS if not (folder / name / "model.onnx").is_file()]
    if missing:
        raise BaseError(
            f"{folder} is no whole ONNX export: {missing[0]}/model.onnx is missing; export it with "
            "dbadapter export --onnx --output-dir FOLDER"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index["scheduler"][1], str):
            raise TypeError("scheduler names no class")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise BaseError(f"{path} cannot be read ({error}); export the model again") from error
    checked: dict[str, Any] = index
    return checked


def _family(folder: Path) -> str:
    """Return the family of the exported base; "" if the report is lost: the models run without it."""
    try:
        family = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))["base"]["family"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return str(family)


def _models(folder: Path, sessions: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTokenizer

    text_config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    return {
        "vae": OnnxVae(sessions["vae_decoder"], sessions["vae_encoder"], _config(folder / "vae_decoder")),
        "text_encoder": OnnxTextEncoder(sessions["text_encoder"], text_config),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "unet": OnnxUNet(sessions["unet"], _config(folder / "unet")),
    }


def _config(folder: Path) -> Any:
    """Return config.json with its entries as attributes, as diffusers' own models have it."""
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
