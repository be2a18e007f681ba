"""An exported folder in optimum's and diffusers' own ONNX pipelines: the pictures that torch and we draw."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bases import write_tiny_base

from dbadapter import lora
from dbadapter.base import Base, load_base
from dbadapter.export import export_onnx, load_onnx_pipeline
from dbadapter.export.parity import EFFECT_OVER_TOLERANCE, PICTURE_TOLERANCE, synthetic_adapter
from dbadapter.sampling import Picture, generate_pictures

pytestmark = pytest.mark.optimum

PROMPTS = ["a photo of sks cat", "a dog on the beach"]
TOLERANCE = PICTURE_TOLERANCE["float32"]  # 3 of 255, in every pixel and channel
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "num_images_per_prompt": 2,
    "negative_prompt": "blurry",
    "seed": 3,
}


@dataclass(frozen=True)
class Exported:
    """An export with an adapter merged into it, and torch's side of it.

    Attributes:
        folder: the export.
        base: with the same adapter on.
        pictures: what the base draws with it.
    """

    folder: Path
    base: Base
    pictures: list[Picture]


@pytest.fixture(scope="class")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder, spec = tmp_path_factory.mktemp("export"), request.cls.base
    if spec != "toybox":
        prediction_type = "v_prediction" if spec == "sd2" else "epsilon"
        made = write_tiny_base(folder / "base", spec, prediction_type=prediction_type, shallow=True)
        spec = str(made)
    base = load_base(spec, device="cpu")
    # SDXL's has many layers without attention: a stronger one, of all layers, shows in its pictures.
    strong: dict[str, Any] = (
        {"strength": 1.5, "targets": tuple(lora.TARGETS)} if base.family == "sdxl" else {}
    )
    adapters = {synthetic_adapter(base, **strong): 0.8}
    without = generate_pictures(base.pipeline, PROMPTS, **SETTINGS)
    export_onnx(base, adapters, folder / "onnx")
    lora.apply(base.pipeline, adapters)
    pictures = generate_pictures(base.pipeline, PROMPTS, **SETTINGS)
    assert largest_difference(images(without), images(pictures)) >= EFFECT_OVER_TOLERANCE * TOLERANCE
    return Exported(folder / "onnx", base, pictures)


def images(pictures: list[Picture]) -> list[Image.Image]:
    return [picture.image for picture in pictures]


def largest_difference(ones: list[Image.Image], others: list[Image.Image]) -> int:
    """Return the largest difference of two lists of pictures, of 255."""
    pairs = [(np.asarray(one, int), np.asarray(other, int)) for one, other in zip(ones, others, strict=True)]
    return max(int(np.abs(one - other).max()) for one, other in pairs)


class InOptimum:
    """What every base's export must do there; its class is what one worker runs (`--dist loadscope`)."""

    @pytest.mark.parametrize("use_io_binding", [False, True])
    def test_optimum_draws_what_torch_draws(self, exported: Exported, use_io_binding: bool) -> None:
        """The same seeds, so the same latents. Bound buffers have the shapes that the graphs' words say."""
        from optimum.onnxruntime import (
            ORTDiffusionPipeline,
            ORTStableDiffusionPipeline,
            ORTStableDiffusionXLPipeline,
        )

        theirs = ORTDiffusionPipeline.from_pretrained(exported.folder, use_io_binding=use_io_binding)
        xl = exported.base.family == "sdxl"
        # as the folder's model_index.json says
        assert type(theirs) is (ORTStableDiffusionXLPipeline if xl else ORTStableDiffusionPipeline)
        drawn = images(generate_pictures(theirs, PROMPTS, **SETTINGS))
        assert largest_difference(drawn, images(exported.pictures)) <= TOLERANCE
        ours = images(generate_pictures(load_onnx_pipeline(exported.folder), PROMPTS, **SETTINGS))
        assert largest_difference(drawn, ours) <= TOLERANCE

    def test_optimum_changes_a_picture_as_torch_does(self, exported: Exported) -> None:
        """Image to image, the only one that takes the VAE's encoder; not square, and several at once."""
        import diffusers
        from optimum import onnxruntime

        kind = "StableDiffusionXLImg2ImgPipeline"
        options: dict[str, Any] = {"add_watermarker": False}
        if exported.base.family != "sdxl":
            kind, options = "StableDiffusionImg2ImgPipeline", {"requires_safety_checker": False}
        side = exported.base.resolution
        picture = exported.pictures[0].image.resize((side, 2 * side))
        drawn = []
        for pipeline in (
            getattr(onnxruntime, f"ORT{kind}").from_pretrained(exported.folder),
            getattr(diffusers, kind)(**exported.base.pipeline.components, **options),
        ):
            pipeline.set_progress_bar_config(disable=True)
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            result = pipeline(
                PROMPTS, image=picture, strength=0.5, num_inference_steps=20, generator=generators
            )
            drawn.append(result.images)
        assert drawn[0][0].size == picture.size
        assert largest_difference(*drawn) <= TOLERANCE


class InDiffusersToo(InOptimum):
    """Of the bases for which diffusers has a pipeline of its own: it has none for SDXL."""

    def test_diffusers_own_onnx_pipeline_draws_the_same(self, exported: Exported) -> None:
        """It has 8 pixels a latent cell in its code; these bases have 4: it is asked for twice their size."""
        from diffusers import OnnxStableDiffusionPipeline

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces its own removal
            theirs = OnnxStableDiffusionPipeline.from_pretrained(
                exported.folder, provider="CPUExecutionProvider", local_files_only=True
            )
        theirs.set_progress_bar_config(disable=True)
        cells = exported.base.resolution // exported.base.vae_scale_factor
        latents = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(1))
        settings: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 5.0}
        drawn = theirs(
            PROMPTS[0], latents=latents.numpy(), height=8 * cells, width=8 * cells, **settings
        ).images
        by_torch = exported.base.pipeline(PROMPTS[0], latents=latents, **settings).images
        by_us = load_onnx_pipeline(exported.folder)(PROMPTS[0], latents=latents, **settings).images
        assert largest_difference(drawn, by_torch) <= TOLERANCE
        assert largest_difference(drawn, by_us) <= TOLERANCE


class TestToybox(InDiffusersToo):
    """Built like SD1, its weights real."""

    base = "toybox"


class TestSD2(InDiffusersToo):
    """A random base that predicts v."""

    base = "sd2"


class TestSDXL(InOptimum):
    """A random base."""

    base = "sdxl"
