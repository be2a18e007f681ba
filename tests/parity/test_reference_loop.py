"""The training step against a plain loop: diffusers' modules, float32, no cache, no tricks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from peft import LoraConfig
from PIL import Image
from tiny_bases import write_tiny_base
from tiny_runs import set_up, tiny_config, write_photographs

from dbadapter.base import Base, load_base
from dbadapter.data import draw, picture_indices
from dbadapter.training import train_step

STEPS, BATCH, RANK, RATE = 20, 2, 2, 5e-3
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
SNR_GAMMA = 5.0


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "photographs", ((32, 32),) * 3)


def add_adapters(base: Base) -> list[torch.nn.Parameter]:
    """Give the models PEFT's adapters with the first factors that ours start from."""
    from dbadapter.lora import inject

    reference = copy.deepcopy(base)
    texts = reference.text_encoders
    inject(reference.unet, texts["text_encoder"], texts.get("text_encoder_2"), rank=RANK, seed=0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    parameters = []
    for name, model in {"unet": base.unet, **base.text_encoders}.items():
        layers = targets if name == "unet" else TEXT_LAYERS
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers), adapter_name="plain")
        theirs = getattr(reference.pipeline, name).state_dict()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if ".plain." in path:
                    parameter.copy_(theirs[path.replace(".plain.", ".dbadapter.")])
                    parameters.append(parameter)
    return parameters


def embed(base: Base, prompt: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what diffusers' own pipeline gives the UNet for a prompt, with gradients."""
    if base.family != "sdxl":
        embeddings, _ = base.pipeline.encode_prompt(prompt, "cpu", 1, False)
        return embeddings, {}
    found = base.pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    return found[0], {"text_embeds": found[2], "time_ids": time_ids}


def one_loss(
    base: Base, scheduler: Any, picture: torch.Tensor, prompt: str, drawn: Any, sample: int
) -> torch.Tensor:
    posterior = base.vae.encode(picture[None]).latent_dist
    latents = (
        posterior.mean + posterior.std * drawn.posterior_noise[sample]
    ) * base.vae.config.scaling_factor
    noise, timestep = drawn.noise[sample][None], drawn.timesteps[sample][None]
    noisy = scheduler.add_noise(latents, noise, timestep)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timestep) if velocity else noise
    embeddings, added = embed(base, prompt)
    pred = base.unet(noisy, timestep, embeddings, added_cond_kwargs=added).sample
    # Min-SNR by hand (Hang et al. 2023): one number for this one sample.
    alpha = float(scheduler.alphas_cumprod[int(timestep)])
    snr = alpha / (1 - alpha)
    weight = min(snr, SNR_GAMMA) / (snr + 1 if velocity else snr)
    return weight * F.mse_loss(pred, target)


def plain_losses(base: Base, photographs: Path, class_folder: Path) -> list[list[float]]:
    def load(path: Path) -> torch.Tensor:
        pixels = np.array(Image.open(path).convert("RGB"), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1

    instance = [load(path) for path in sorted(photographs.iterdir())]
    classes = [load(path) for path in sorted(class_folder.glob("*.png"))]
    scheduler = DDPMScheduler.from_config(base.scheduler.config)
    parameters = add_adapters(base)
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    found = []
    for step in range(STEPS):
        numbers = range(step * BATCH, (step + 1) * BATCH)
        losses = []
        for stream, pictures, prompt in (
            ("instance", instance, "a photo of sks dog"),
            ("prior", classes, "a photo of a dog"),
        ):
            drawn = draw(stream, 0, step, range(BATCH), (4, 8, 8), scheduler.config.num_train_timesteps)
            chosen = picture_indices(stream, 0, numbers, len(pictures))
            each = [
                one_loss(base, scheduler, pictures[index], prompt, drawn, sample)
                for sample, index in enumerate(chosen)
            ]
            losses.append(torch.stack(each).mean())
        (losses[0] + losses[1]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append([float(loss) for loss in losses])
    return found


@pytest.mark.parametrize(
    ("family", "prediction_type"),
    [("sd1", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon")],
)
def test_twenty_steps_are_those_of_a_plain_loop(
    photographs: Path, tmp_path: Path, family: Any, prediction_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `generated` prior on the same class pictures, text encoders trained, min-SNR on both terms."""
    folder = write_tiny_base(tmp_path / "base", family, prediction_type=prediction_type)
    monkeypatch.setattr("dbadapter.class_images.PICTURE_STEPS", 2)
    monkeypatch.setattr("dbadapter.lean.LARGE_ENOUGH", 0)
    config = tiny_config(
        photographs,
        tmp_path / "out",
        folder,
        prior="generated",
        train_text_encoder=True,
        learning_rate=RATE,
        text_encoder_learning_rate=RATE,
        train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        snr_gamma=SNR_GAMMA,
    )
    run = set_up(config, tmp_path)
    ours = [train_step(run, step)[1:3].tolist() for step in range(STEPS)]
    plain = plain_losses(load_base(str(folder), device="cpu"), photographs, tmp_path / "class_images")
    np.testing.assert_allclose(ours, plain, rtol=2e-3, atol=1e-5)
    assert abs(plain[0][0] - plain[-1][0]) > 1e-3
