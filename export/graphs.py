"""The graphs of a Stable Diffusion export: wrappers with pinned inputs, outputs and dimension names.

The names are those that diffusers' OnnxStableDiffusionPipeline and optimum-onnx's ORTStableDiffusionPipeline
and ORTStableDiffusionXLPipeline ask for, so that one folder loads in all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dbadapter import lora
from dbadapter.base import Base
from dbadapter.export.attention import structure_copy, use_fused_attention
from dbadapter.export.swappable import factor_dims

__all__ = [
    "DTYPES",
    "SCALING_FACTOR",
    "Graph",
    "Sizes",
    "component_graphs",
    "example_inputs",
    "traced_sizes",
    "usual_sizes",
]

# What the graphs take and give. Weights in int8 are made of a float32 graph afterwards.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.float32}

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
        dynamic_shapes: what torch.export may vary of `inputs`.
        layers: those of the module whose factors become inputs too, behind the others, by canonical name;
            empty for a merged graph.
        attentions: how many fused ones the graph shall have.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Dims | None]
    outputs: Mapping[str, Dims]
    dynamic_shapes: Mapping[str, Mapping[int, Any]]
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    attentions: int = 0

    @property
    def factors(self) -> dict[str, Dims]:
        """The factors' input names and dimensions; none in a merged graph."""
        return factor_dims(self.layers)


@dataclass(frozen=True)
class Sizes:
    """The free dimensions of one call; `latent_height` and `latent_width` in latent cells."""

    batch: int
    latent_height: int
    latent_width: int
    sequence_length: int


class UNetGraph(nn.Module):
    """sample, timestep, encoder_hidden_states -> out_sample; SDXL's has text_embeds and time_ids too."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction, shaped like `sample`.

        Args:
            sample: noisy latents (batch, channels, height, width).
            timestep: float32 and not an integer, because Karras and Euler schedules take steps between.
                A scalar (optimum), (1,) (diffusers) or (batch,): the reshape makes all three work.
            encoder_hidden_states: text embeddings (batch, length, width).
            text_embeds: SDXL's pooled text (batch, projection_dim).
            time_ids: SDXL's sizes and crops in pixels (batch, 6).
        """
        added = None
        if text_embeds is not None:
            # diffusers joins them with sines in float32, and the exporter does not promote a float16 half.
            added = {"text_embeds": text_embeds.float(), "time_ids": time_ids}
        out: Tensor = self.unet(
            sample, timestep.reshape(-1), encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]
        return out


class TextEncoderGraph(nn.Module):
    """input_ids -> last_hidden_state, pooler_output; or, of SDXL, also the hidden states of every layer."""

    def __init__(self, text_encoder: Any, hidden_states: bool) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.projected = hasattr(text_encoder, "text_projection")
        self.layers = int(text_encoder.config.num_hidden_layers) if hidden_states else 0

    @property
    def outputs(self) -> dict[str, Dims]:
        """The outputs' names and dimensions, in their order."""
        config = self.text_encoder.config
        words: Dims = ("batch_size", "sequence_length", int(config.hidden_size))
        hidden = {f"hidden_states.{number}": words for number in range(self.layers)}
        if self.projected:  # diffusers takes the first output for the pooled one if it has two dimensions
            pooled: Dims = ("batch_size", int(config.projection_dim))
            return {"text_embeds": pooled, "last_hidden_state": words, **hidden}
        return {
            "last_hidden_state": words,
            "pooler_output": ("batch_size", int(config.hidden_size)),
            **hidden,
        }

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return the embeddings (batch, length, width), and that of the end token (batch, width).

        Args:
            input_ids: int32 (batch, length): diffusers' ONNX pipeline sends int32 whatever the graph says.
        """
        out = self.text_encoder(input_ids=input_ids, output_hidden_states=self.layers > 0)
        hidden = tuple(out.hidden_states[: self.layers]) if self.layers else ()
        if self.projected:
            return (out.text_embeds, out.last_hidden_state, *hidden)
        return (out.last_hidden_state, out.pooler_output, *hidden)


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


def component_graphs(
    base: Base,
    dtype: str = "float32",
    *,
    targets: Sequence[str] = (),
    fused: bool = False,
) -> dict[str, Graph]:
    """Return the graphs of a base by folder name: the text encoders', unet, vae_decoder, vae_encoder.

    The modules hold the base's own weights for float32. For float16 the UNet and the text encoders are
    copies; the VAE computes in float32 between float16 inputs and outputs, because several VAEs overflow in
    float16 and give black pictures.

    Args:
        base: with float32 weights.
        dtype: a name of `DTYPES`.
        targets: of `lora.TARGETS`: the layers whose adapters are inputs; none for a merged graph.
        fused: let the UNet's attention be ONNX Runtime's fused one.
    """
    models = {**base.text_encoders, "unet": base.unet}
    half = DTYPES[dtype] != torch.float32
    if half:
        models = {name: copy.deepcopy(model).to(DTYPES[dtype]) for name, model in models.items()}
    elif fused:
        models["unet"] = structure_copy(base.unet)
    layers = {
        name: lora.target_layers(model, name, targets) if targets else {} for name, model in models.items()
    }
    attentions = use_fused_attention(models["unet"]) if fused else 0
    free = _FreeDimensions(base)
    latent: Dims = ("batch_size", int(base.unet.config.in_channels), "latent_height", "latent_width")
    factor = base.vae_scale_factor
    pixels: Dims = (
        "batch_size",
        int(base.vae.config.in_channels),
        f"latent_height * {factor}",  # with spaces: optimum computes the shapes of outputs from these words
        f"latent_width * {factor}",
    )
    graphs = []
    for name in base.text_encoders:
        text = TextEncoderGraph(models[name], hidden_states=base.family == "sdxl")
        inputs: dict[str, Dims | None] = {"input_ids": ("batch_size", "sequence_length")}
        graphs.append(Graph(name, text, inputs, text.outputs, {"input_ids": free.tokens}, layers[name]))
    graphs += [
        _unet_graph(base, models["unet"], latent, free, layers["unet"], attentions),
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


def _unet_graph(
    base: Base,
    unet: nn.Module,
    latent: Dims,
    free: _FreeDimensions,
    layers: Mapping[str, nn.Module],
    attentions: int,
) -> Graph:
    width = int(base.unet.config.cross_attention_dim)
    inputs: dict[str, Dims | None] = {
        "sample": latent,
        "timestep": None,
        "encoder_hidden_states": ("batch_size", "sequence_length", width),
    }
    shapes: dict[str, Mapping[int, Any]] = {
        "sample": free.pictures(base.latent_multiple),
        "timestep": {},
        "encoder_hidden_states": free.tokens,
    }
    if base.family == "sdxl":
        inputs |= {"text_embeds": ("batch_size", _pooled_width(base)), "time_ids": ("batch_size", 6)}
        shapes |= {"text_embeds": {0: free.batch}, "time_ids": {0: free.batch}}
    outputs: dict[str, Dims] = {"out_sample": (latent[0], int(base.unet.config.out_channels), *latent[2:])}
    return Graph("unet", UNetGraph(unet), inputs, outputs, shapes, layers, attentions)


def _pooled_width(base: Base) -> int:
    return int(base.text_encoders["text_encoder_2"].config.projection_dim)


def traced_sizes(base: Base) -> Sizes:
    """Return sizes that differ from each other and from 1, which torch.export would take for a constant."""
    return Sizes(2, 2 * base.latent_multiple, 3 * base.latent_multiple, 7)


def usual_sizes(base: Base) -> Sizes:
    """Return those of one picture at the base's own size, with guidance and a whole prompt."""
    side = int(base.unet.config.sample_size)
    return Sizes(2, side, side, int(base.text_encoder.config.max_position_embeddings))


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
    if name in base.text_encoders:
        return {"input_ids": _example_tokens(base, name, sizes, generator)}
    if name == "unet":
        words = (sizes.batch, sizes.sequence_length, int(base.unet.config.cross_attention_dim))
        last = int(base.scheduler.config.num_train_timesteps) - 1
        inputs = {
            "sample": torch.randn(latents, generator=generator).to(kind),
            "timestep": torch.tensor(float(last * (seed % 3 + 1) // 3)),
            "encoder_hidden_states": torch.randn(words, generator=generator).to(kind),
        }
        if base.family == "sdxl":
            pooled = torch.randn(sizes.batch, _pooled_width(base), generator=generator)
            height, width = (side * base.vae_scale_factor for side in latents[2:])
            crops = torch.tensor([float(side) for side in (height, width, 0, 0, height, width)])
            inputs |= {"text_embeds": pooled.to(kind), "time_ids": crops.expand(sizes.batch, 6).to(kind)}
        return inputs
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


def _example_tokens(base: Base, name: str, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Return random token ids with start and end where a prompt has them; CLIP pools at the end token."""
    config = base.text_encoders[name].config
    tokenizer = base.tokenizers[list(base.text_encoders).index(name)]
    shape = (sizes.batch, sizes.sequence_length)
    # Not the last two of CLIP's vocabulary, start and end: the first end token would be the one pooled at.
    ids = torch.randint(0, int(config.vocab_size) - 2, shape, generator=generator, dtype=torch.int32)
    ids[:, 0] = int(tokenizer.bos_token_id)
    ids[:, -1] = int(tokenizer.eos_token_id)
    return ids
