"""The four graphs of a Stable Diffusion export: wrappers with pinned inputs, outputs and dimension names.

The names are those that diffusers' OnnxStableDiffusionPipeline and optimum-onnx's ORTStableDiffusionPipeline
ask for, so that one folder loads in both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter.base import Base

__all__ = ["DTYPES", "SCALING_FACTOR", "Graph", "Sizes", "component_graphs", "example_inputs"]

DTYPES = {"float32": torch.float32, "float16": torch.float16}

# diffusers' upsampler copies its input when 64 or more pictures come at once, and torch.export takes that for
# a limit. The graph is the same on both sides of it: ONNX knows no memory layouts.
LARGEST_TRACED_BATCH = 63

# diffusers' ONNX pipeline has SD1's factor in its code and reads no config. So the graphs of every VAE speak
# in this scale, and the exported configs say so.
SCALING_FACTOR = 0.18215

Dims = tuple[str | int, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file: what is traced, and how its inputs and outputs are called.

    Attributes:
        name: the component's folder.
        module: called with the inputs in the order of `inputs`.
        inputs: name -> dimensions, a word for a free one; None clears the shape (any rank).
        outputs: the same, in the order in which the module returns them.
        dynamic_shapes: what torch.export may vary.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Dims | None]
    outputs: Mapping[str, Dims]
    dynamic_shapes: Mapping[str, Mapping[int, Any]]


@dataclass(frozen=True)
class Sizes:
    """The free dimensions of one call; `latent_height` and `latent_width` in latent cells."""

    batch: int
    latent_height: int
    latent_width: int
    sequence_length: int


class UNetGraph(nn.Module):
    """sample, timestep, encoder_hidden_states -> out_sample."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Return the prediction, shaped like `sample`.

        Args:
            sample: noisy latents (batch, channels, height, width).
            timestep: float32 and not an integer, because Karras and Euler schedules take steps between.
                A scalar (optimum), (1,) (diffusers) or (batch,): the reshape makes all three work.
            encoder_hidden_states: text embeddings (batch, length, width).
        """
        out: Tensor = self.unet(sample, timestep.reshape(-1), encoder_hidden_states, return_dict=False)[0]
        return out


class TextEncoderGraph(nn.Module):
    """input_ids -> last_hidden_state, pooler_output."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings (batch, length, width), and that of the end token (batch, width).

        Args:
            input_ids: int32 (batch, length): diffusers' ONNX pipeline sends int32 whatever the graph says.
        """
        out = self.text_encoder(input_ids=input_ids)
        return out.last_hidden_state, out.pooler_output


class VaeDecoderGraph(nn.Module):
    """latent_sample -> sample."""

    def __init__(self, vae: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae: Any = vae
        self.dtype = dtype
        self.ratio = SCALING_FACTOR / float(vae.config.scaling_factor)

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Return pixels in [-1, 1]; the latents are already divided by SCALING_FACTOR."""
        latents = latent_sample.float() if self.ratio == 1 else latent_sample.float() * self.ratio
        sample: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return sample.to(self.dtype)


class VaeEncoderGraph(nn.Module):
    """sample -> latent_sample, latent_parameters."""

    def __init__(self, vae: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae: Any = vae
        self.dtype = dtype
        self.ratio = SCALING_FACTOR / float(vae.config.scaling_factor)

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the latents, and mean and log-variance in one, before the SCALING_FACTOR.

        `latent_sample` is what diffusers reads, and must come first; `latent_parameters` lets optimum and our
        own runtime draw from the distribution with a seed of the caller's.
        """
        mean, log_variance = self.vae.encode(sample.float(), return_dict=False)[0].parameters.chunk(2, dim=1)
        if self.ratio != 1:
            mean, log_variance = mean / self.ratio, log_variance - 2 * math.log(self.ratio)
        return mean.to(self.dtype), torch.cat([mean, log_variance], dim=1).to(self.dtype)


def component_graphs(base: Base, dtype: str = "float32") -> dict[str, Graph]:
    """Return the graphs of a base by folder name: text_encoder, unet, vae_decoder, vae_encoder.

    The modules are the base's own for float32. For float16 the UNet and the text encoder are copies; the VAE
    computes in float32 between float16 inputs and outputs, because several VAEs overflow in float16 and give
    black pictures.

    Args:
        base: with float32 weights.
        dtype: a name of `DTYPES`.
    """
    unet, text_encoder = base.unet, base.text_encoder
    if dtype != "float32":
        unet = copy.deepcopy(unet).to(DTYPES[dtype])
        text_encoder = copy.deepcopy(text_encoder).to(DTYPES[dtype])
    free = _FreeDimensions(base)
    latent: Dims = ("batch_size", int(base.unet.config.in_channels), "latent_height", "latent_width")
    width, factor = int(base.text_encoder.config.hidden_size), base.vae_scale_factor
    pixels: Dims = (
        "batch_size",
        int(base.vae.config.in_channels),
        f"latent_height * {factor}",  # with spaces: optimum computes the shapes of outputs from these words
        f"latent_width * {factor}",
    )
    graphs = [
        Graph(
            "text_encoder",
            TextEncoderGraph(text_encoder),
            {"input_ids": ("batch_size", "sequence_length")},
            {
                "last_hidden_state": ("batch_size", "sequence_length", width),
                "pooler_output": ("batch_size", width),
            },
            {"input_ids": free.tokens},
        ),
        Graph(
            "unet",
            UNetGraph(unet),
            {
                "sample": latent,
                "timestep": None,
                "encoder_hidden_states": ("batch_size", "sequence_length", width),
            },
            {"out_sample": (latent[0], int(base.unet.config.out_channels), *latent[2:])},
            {
                "sample": free.pictures(base.latent_multiple),
                "timestep": {},
                "encoder_hidden_states": free.tokens,
            },
        ),
        Graph(
            "vae_decoder",
            VaeDecoderGraph(base.vae, DTYPES[dtype]),
            {"latent_sample": latent},
            {"sample": pixels},
            {"latent_sample": free.pictures(1)},
        ),
        Graph(
            "vae_encoder",
            VaeEncoderGraph(base.vae, DTYPES[dtype]),
            {"sample": ("batch_size", pixels[1], "height", "width")},
            {
                "latent_sample": (latent[0], latent[1], f"height / {factor}", f"width / {factor}"),
                "latent_parameters": (
                    latent[0],
                    2 * int(latent[1]),
                    f"height / {factor}",
                    f"width / {factor}",
                ),
            },
            {"sample": free.pictures(factor)},
        ),
    ]
    return {graph.name: graph for graph in graphs}


def example_inputs(
    base: Base, name: str, sizes: Sizes, dtype: str = "float32", seed: int = 0
) -> dict[str, Tensor]:
    """Return seeded inputs of one graph on the CPU, by input name.

    Args:
        name: the component's folder name.
        sizes: of the free dimensions; a sequence is at least 2 tokens long.
        dtype: of the floating-point inputs, but `timestep`, which is always float32.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = DTYPES[dtype]
    latents = (sizes.batch, int(base.unet.config.in_channels), sizes.latent_height, sizes.latent_width)
    if name == "text_encoder":
        return {"input_ids": _example_tokens(base, sizes, generator)}
    if name == "unet":
        words = (sizes.batch, sizes.sequence_length, int(base.text_encoder.config.hidden_size))
        last = int(base.scheduler.config.num_train_timesteps) - 1
        return {
            "sample": torch.randn(latents, generator=generator).to(kind),
            "timestep": torch.tensor(float(last * (seed % 3 + 1) // 3)),
            "encoder_hidden_states": torch.randn(words, generator=generator).to(kind),
        }
    if name == "vae_decoder":
        return {"latent_sample": torch.randn(latents, generator=generator).to(kind)}
    factor = base.vae_scale_factor
    pixels = (sizes.batch, int(base.vae.config.in_channels), latents[2] * factor, latents[3] * factor)
    return {"sample": (torch.rand(pixels, generator=generator) * 2 - 1).to(kind)}


class _FreeDimensions:
    """What torch.export may vary, shared by the graphs of one base."""

    def __init__(self, base: Base) -> None:
        longest = int(base.text_encoder.config.max_position_embeddings)
        self.batch = torch.export.Dim("batch_size", max=LARGEST_TRACED_BATCH)
        self.tokens = {0: self.batch, 1: torch.export.Dim("sequence_length", max=longest)}

    def pictures(self, multiple: int) -> dict[int, Any]:
        """Return free batch, height and width, the sides divisible by `multiple`.

        Said here, it keeps torch from writing (n - 1) // 2 + 1 into every layer; other sides are refused at
        run time, since the sizes of the upsampled latents are fixed multiples.
        """
        height, width = torch.export.Dim("height"), torch.export.Dim("width")
        if multiple == 1:
            return {0: self.batch, 2: height, 3: width}
        return {0: self.batch, 2: multiple * height, 3: multiple * width}


def _example_tokens(base: Base, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Return random token ids with start and end where a prompt has them; CLIP pools at the end token."""
    config = base.text_encoder.config
    shape = (sizes.batch, sizes.sequence_length)
    ids = torch.randint(0, int(config.vocab_size), shape, generator=generator, dtype=torch.int32)
    ids[:, 0] = int(base.tokenizer.bos_token_id)
    ids[:, -1] = int(base.tokenizer.eos_token_id)
    return ids
