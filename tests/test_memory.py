"""The memory estimate: counted right, and the same on the meta device as where there is data."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dbadapter import toybox
from dbadapter.base import Precision, load_base
from dbadapter.lora import inject
from dbadapter.memory import Estimate, estimate, peak_bytes
from dbadapter.speed import DTYPES, PLAIN_ATTENTION_TOKENS

META = torch.device("meta")


def test_what_is_alive_at_one_time_counts() -> None:
    def run() -> None:
        first = torch.zeros(1000, device=META)  # 4000 bytes
        second = first + 1
        del first
        third = second.half()
        del second, third

    assert peak_bytes(run) == 8000


def test_a_storage_counts_once_and_not_if_it_was_there() -> None:
    weight = torch.zeros(50, 20, device=META)

    def run() -> Any:
        made = torch.zeros(1000, device=META)
        return made.view(10, 100), made[5:], weight.T, weight[3], made.add_(1)

    assert peak_bytes(run) == 4000


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_autograd_keeps_counts_until_the_backward_pass(device: str) -> None:
    weight = nn.Parameter(torch.ones(1000, device=device))

    def run() -> None:
        y = torch.zeros(1000, device=device)
        for _ in range(5):
            y = (weight * y).sigmoid()  # keeps the product's factor and its own result: one of them each
        y.sum().backward()

    gc.collect()
    # 1 + 5 results, the gradient on its way and the next, and the weight's own, besides numbers.
    assert 6 * 4000 <= peak_bytes(run) <= 9.1 * 4000


def toybox_on_meta() -> tuple[Any, Any, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def config(part: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((toybox.folder() / part / "config.json").read_text())
        return loaded

    with META:
        unet = UNet2DConditionModel.from_config(config("unet"))
        vae = AutoencoderKL.from_config(config("vae"))
        return unet, CLIPTextModel(CLIPTextConfig(**config("text_encoder"))), vae


def asked(
    *,
    batch: int = 2,
    precision: Precision = "no",
    text: bool = True,
    whole: bool = False,
    side: int = 16,
    device_type: str = "cpu",
    **options: Any,
) -> Estimate:
    unet, text_encoder, vae = toybox_on_meta()
    if not whole:
        inject(unet, text_encoder if text else None, rank=8)
    return estimate(
        unet,
        [text_encoder],
        vae,
        latent_shape=(4, side, side),
        text_length=text_encoder.config.max_position_embeddings,
        batch_samples=batch,
        precision=precision,
        device_type=device_type,
        train_text_encoder=text,
        **options,
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("side", [16, 48])  # plain attention and torch's fused one
def test_meta_counts_what_a_real_step_takes(precision: Precision, side: int) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    base = load_base("toybox", device="cpu")
    for model in (base.unet, base.text_encoder):
        nn.Module.to(model, dtype=DTYPES[precision])
    parameters = [p for part in inject(base.unet, base.text_encoder, rank=8) for p in part]
    for module in (*base.unet.modules(), *base.text_encoder.modules()):
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False
    if side**2 <= PLAIN_ATTENTION_TOKENS[precision]:
        base.unet.set_attn_processor(AttnProcessor())
    ids = torch.zeros(2, base.tokenizer.model_max_length, dtype=torch.int64)

    def step() -> None:
        x_t = torch.randn(2, 4, side, side)
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "no"):
            embeddings = base.text_encoder(ids).last_hidden_state
            pred = base.unet(x_t, torch.tensor([3, 4]), embeddings).sample
        torch.nn.functional.mse_loss(pred.float(), x_t).backward()

    gradients = sum(p.numel() * 4 for p in parameters)
    real = (peak_bytes(step) - gradients) / 2**20
    assert asked(precision=precision, side=side).activations_mb == pytest.approx(real, rel=0.08)


def test_parts_add_up() -> None:
    found = asked(previews=True)
    loaded = load_base("toybox", device="cpu")
    models = (loaded.unet, loaded.text_encoder, loaded.vae)
    vae = sum(p.numel() * 4 for p in loaded.vae.parameters()) / 2**20
    assert asked().frozen_mb == pytest.approx(found.frozen_mb - vae)
    weights = sum(p.numel() * 4 for model in models for p in model.parameters())
    assert found.frozen_mb == pytest.approx(weights / 2**20)
    parts = (found.frozen_mb, found.trainable_mb, found.activations_mb, found.overhead_mb)
    assert found.peak_mb >= sum(parts) * 0.999  # other phases may take more: loading, encoding, decoding
    assert 0 < found.encode_mb < found.decode_mb


def test_trained_weights_take_four_times_their_size() -> None:
    unet, _, _ = toybox_on_meta()
    factors = inject(unet, None, rank=8)
    expected = sum(p.numel() for p in factors.unet) * 16 / 2**20
    assert asked(text=False).trainable_mb == pytest.approx(expected)
    assert asked(text=False, optimizer="prodigy").trainable_mb == pytest.approx(expected * 1.5)
    assert asked(text=False, optimizer="adamw8bit").trainable_mb < expected * 0.7


def test_a_whole_model_is_trainable() -> None:
    unet, text_encoder, vae = toybox_on_meta()
    weights = [sum(p.numel() for p in model.parameters()) for model in (unet, text_encoder, vae)]
    found = asked(whole=True, precision="bf16", previews=True)
    assert found.trainable_mb == pytest.approx(16 * sum(weights[:2]) / 2**20)
    assert found.frozen_mb == pytest.approx(2 * weights[2] * 2 / 2**20)  # the VAE stays float32
    teacher = asked(whole=True, precision="bf16", previews=True, prior="distill").frozen_mb - found.frozen_mb
    assert teacher == pytest.approx(2 * weights[0] / 2**20)
    # The gradients grow while the activations go: their sum is more than either alone.
    gradients = found.trainable_mb / 4
    adapter = asked(precision="bf16").activations_mb
    assert gradients < gradients + found.activations_mb < gradients + adapter


def test_what_saves_memory_does() -> None:
    plain = asked()
    assert asked(batch=4).activations_mb == pytest.approx(2 * plain.activations_mb, rel=0.1)
    assert asked(prior="distill").activations_mb == pytest.approx(asked(batch=4).activations_mb, rel=0.1)
    assert asked(gradient_checkpointing=True).activations_mb < 0.6 * plain.activations_mb
    assert asked(precision="bf16").activations_mb < 0.7 * plain.activations_mb
    assert asked(text=False).activations_mb < plain.activations_mb


def test_cuda_has_no_process_but_norms_in_float32() -> None:
    cuda, cpu = (asked(precision="bf16", side=48, device_type=kind) for kind in ("cuda", "cpu"))
    assert cuda.overhead_mb == 0
    assert cuda.activations_mb > 1.2 * cpu.activations_mb
    assert cuda.peak_mb < cpu.peak_mb


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux counts from zero")
def test_the_peak_is_this_process_own_not_that_of_the_one_which_started_it() -> None:
    filled = torch.ones(2**28)  # a gigabyte here
    code = "import torch; from dbadapter.speed import peak_memory_mb as m; print(m(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < filled.nbytes / 2**20
