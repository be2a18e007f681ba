"""Frozen layers that keep less: the same numbers bit for bit, fewer bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from dbadapter import toybox
from dbadapter.lean import keep_less
from dbadapter.lora import inject
from dbadapter.memory import peak_bytes


def toybox_unet(
    targets: tuple[str, ...], dtype: torch.dtype = torch.float32
) -> tuple[Any, list[nn.Parameter]]:
    config = json.loads((toybox.folder() / "unet/config.json").read_text())
    torch.manual_seed(0)
    unet = nn.Module.to(UNet2DConditionModel.from_config(config), dtype=dtype)
    parameters = inject(unet, None, rank=2, targets=targets).unet
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
    return unet, parameters


def step(unet: Any, precision: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, e = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 8, 128, generator=generator)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        prediction: torch.Tensor = unet(x, torch.tensor([10, 500]), e).sample
    prediction.float().square().mean().backward()
    return prediction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("attention",), ("attention", "feed-forward", "proj", "conv")])
def test_prediction_and_gradients_are_the_same(targets: tuple[str, ...], dtype: torch.dtype) -> None:
    (plain, its), (lean, theirs) = toybox_unet(targets, dtype), toybox_unet(targets, dtype)
    keep_less(lean)
    assert torch.equal(step(plain, dtype), step(lean, dtype))
    for one, other in zip(its, theirs, strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_names_and_weights_stay() -> None:
    plain, lean = toybox_unet(("attention",))[0], toybox_unet(("attention",))[0]
    keep_less(lean)
    ours, theirs = lean.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_keeps_less() -> None:
    plain, lean = toybox_unet(("attention",))[0], toybox_unet(("attention",))[0]
    keep_less(lean)
    bytes_of = [peak_bytes(lambda unet=unet: step(unet, torch.float32)) for unet in (plain, lean)]  # type: ignore[misc]
    assert bytes_of[1] < 0.85 * bytes_of[0]


def test_checkpointed_layers_may_keep_less_too() -> None:
    (plain, its), (lean, theirs) = toybox_unet(("attention",)), toybox_unet(("attention",))
    keep_less(lean)
    for unet in (plain, lean):
        unet.enable_gradient_checkpointing()
        unet.train()
        step(unet, torch.float32)
    for one, other in zip(its, theirs, strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_encoders_learn_the_same(dtype: torch.dtype) -> None:
    config = CLIPTextConfig.from_pretrained(toybox.folder() / "text_encoder", hidden_act="quick_gelu")
    gradients = []
    for lean in (False, True):
        torch.manual_seed(0)
        model = CLIPTextModel(config)
        embeddings = getattr(model, "text_model", model).embeddings  # transformers 4 has the one more level
        embeddings.requires_grad_(True)
        if lean:
            keep_less(model)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = model(torch.arange(20)[None]).last_hidden_state
        hidden.float().square().mean().backward()
        gradients.append(embeddings.token_embedding.weight.grad)
    assert torch.equal(*gradients)


def test_blocks_that_scale_between_norm_and_activation_are_left_as_they_are() -> None:
    config = json.loads((toybox.folder() / "unet/config.json").read_text())
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(config | {"resnet_time_scale_shift": "scale_shift"})
    inject(unet, None, rank=2)
    before = step(unet, torch.float32)
    keep_less(unet)
    assert torch.equal(step(unet, torch.float32), before)
