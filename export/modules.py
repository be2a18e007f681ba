"""ONNX models in place of torch's in a diffusers pipeline, whose schedulers and callbacks stay its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter.errors import UsageError
from dbadapter.export.runtime import Runner

__all__ = ["OnnxModule", "OnnxTextEncoder", "OnnxUNet", "OnnxVae"]


class OnnxModule(nn.Module):
    """What a diffusers pipeline asks of any of its models."""

    def __init__(self, runner: Runner, config: Any) -> None:
        super().__init__()
        self.runner = runner
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the session computes; `pipeline.to` does not move it."""
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        """Always float32: a half-precision graph is fed and read through casts."""
        return torch.float32


class OnnxUNet(OnnxModule):
    """In place of UNet2DConditionModel."""

    def __init__(self, runner: Runner, config: Any) -> None:
        super().__init__(runner, config)
        # SDXL's pipeline reads the width of its micro-conditioning there, as of a torch UNet.
        width = config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

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
        added = {name: value for name, value in (added_cond_kwargs or {}).items() if value is not None}
        extras = {"timestep_cond": timestep_cond, "cross_attention_kwargs": cross_attention_kwargs or None}
        unknown = [name for name, value in extras.items() if value is not None]
        if unknown := unknown + [name for name in added if name not in self.runner.inputs]:
            raise UsageError(
                f"the exported UNet has no input {', '.join(unknown)}; leave it out (adapters: "
                "OnnxPipeline.set_adapters)"
            )
        self._check_sides(*sample.shape[-2:])
        inputs = {
            "sample": sample,
            "timestep": torch.as_tensor(timestep),
            "encoder_hidden_states": encoder_hidden_states,
            **added,
        }
        shape = (sample.shape[0], self.config.out_channels, *sample.shape[2:])
        out = self.runner(inputs, {"out_sample": shape})["out_sample"].float()
        return SimpleNamespace(sample=out) if return_dict else (out,)

    def _check_sides(self, height: int, width: int) -> None:
        """Refuse latents that do not meet themselves on the way up, with the nearest that do."""
        multiple = 2 ** (len(self.config.block_out_channels) - 1)
        if height % multiple or width % multiple:
            near = [" or ".join(str(each) for each in _nearest(side, multiple)) for side in (height, width)]
            raise UsageError(
                f"latents must be a multiple of {multiple} high and wide for this ONNX model, got {height} x "
                f"{width}: the nearest are {near[0]} high and {near[1]} wide; choose another height and width"
            )


class OnnxTextEncoder(OnnxModule):
    """In place of CLIPTextModel, and of SDXL's CLIPTextModelWithProjection."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Return what torch's model returns: last_hidden_state and pooler_output, or text_embeds first.

        Raises:
            UsageError: an attention mask, hidden states (clip_skip) that the graph does not give, or too many
                tokens.
        """
        hidden = [name for name in self.runner.outputs if name.startswith("hidden_states.")]
        if attention_mask is not None or (output_hidden_states and not hidden):
            raise UsageError(
                "the exported text encoder has neither attention mask nor hidden states (clip_skip)"
            )
        longest = int(self.config.max_position_embeddings)
        if input_ids.shape[1] > longest:
            raise UsageError(f"the text encoder takes {longest} tokens at the most, got {input_ids.shape[1]}")
        words = (*input_ids.shape, int(self.config.hidden_size))
        pooled = {
            "text_embeds": (input_ids.shape[0], int(self.config.projection_dim)),
            "pooler_output": (input_ids.shape[0], int(self.config.hidden_size)),
        }
        names = [name for name in self.runner.outputs if output_hidden_states or name not in hidden]
        found = self.runner({"input_ids": input_ids}, {name: pooled.get(name, words) for name in names})
        values: dict[str, Any] = {name: found[name].float() for name in names if name not in hidden}
        if output_hidden_states:  # of each layer's input, as torch counts them, and the last one's output
            states = tuple(found[f"hidden_states.{number}"].float() for number in range(len(hidden)))
            values["hidden_states"] = (*states, values["last_hidden_state"])
        return _ModelOutput(**values) if return_dict else tuple(values.values())


class OnnxVae(OnnxModule):
    """In place of AutoencoderKL."""

    def __init__(self, decoder: Runner, encoder: Runner, config: Any) -> None:
        super().__init__(decoder, config)
        self.encoder = encoder

    def decode(self, latents: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Return pixels in [-1, 1] like AutoencoderKL.decode; `generator` is unused there too."""
        batch, _, height, width = latents.shape
        factor = self._factor()
        shape = (batch, self.config.out_channels, height * factor, width * factor)
        out = self.runner({"latent_sample": latents}, {"sample": shape})["sample"].float()
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
        outputs = self.encoder({"sample": sample}, {"latent_parameters": shape})
        distribution = DiagonalGaussianDistribution(outputs["latent_parameters"].float())
        return SimpleNamespace(latent_dist=distribution) if return_dict else (distribution,)

    def _factor(self) -> int:
        return int(2 ** (len(self.config.block_out_channels) - 1))


class _ModelOutput(dict[str, Any]):
    """A model's outputs by name, as attribute, or by position, as transformers gives them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


def _nearest(side: int, multiple: int) -> list[int]:
    """Return the multiples around a side; only the upper one below the first."""
    lower = side // multiple * multiple
    return [side] if side == lower else [each for each in (lower, lower + multiple) if each]
