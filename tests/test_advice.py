"""Warnings from experience: each where it belongs, none for an ordinary run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dbadapter.advice import advice
from dbadapter.config import TrainConfig
from dbadapter.photographs import Photograph

LARGE = [Photograph(Path(f"{index}.jpg"), (2000, 1500)) for index in range(4)]


def said(photographs: list[Photograph] = LARGE, family: str = "sd1", **options: Any) -> list[str]:
    config = TrainConfig(Path("in"), "dog", Path("out"), **options).resolved(family, 512, "sks")
    return list(advice(config, family, photographs, [(512, 512)] * len(photographs)))


@pytest.mark.parametrize("family", ["toybox", "sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"full": True}, {"optimizer": "prodigy"}, {"train_text_encoder": False}),
        *({"prior": "none"}, {"prior": "generated"}, {"prior_source": "sampled"}),
        {"train_text_encoder": False, "full": True},
    ],
)
def test_nothing_to_say_of_the_presets(family: str, options: dict[str, Any]) -> None:
    assert said(family=family, **options) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 5e-6}, "5e-06 is one for full fine-tuning, an adapter hardly moves with it"),
        ({"full": True, "learning_rate": 1e-4}, "0.0001 is one for an adapter, it breaks a model"),
        ({"select": "best"}, "so nothing counts against a checkpoint that knows the photographs by heart"),
        ({"lr_warmup_steps": 500}, "500 steps of warm-up are as many as the run's 500"),
        ({"prior": "none", "num_class_images": 50}, "--num-class-images 50 does nothing with --prior none"),
        ({"prior": "none", "prior_loss_weight": 0.5}, "--prior-loss-weight 0.5 does nothing"),
        ({"prior": "generated", "prior_source": "sampled"}, "does nothing with --prior generated"),
        ({"num_class_images": 50}, "--num-class-images 50 does nothing with --prior-source instance"),
        ({"class_data_dir": Path("dogs"), "num_class_images": 50}, "does nothing with --class-data-dir"),
        ({"class_data_dir": Path("dogs"), "prior_source": "sampled"}, "--prior-source sampled does nothing"),
        ({"train_text_encoder": False, "text_encoder_rank": 4}, "does nothing with --no-train-text-encoder"),
        ({"train_text_encoder": False, "text_encoder_learning_rate": 1e-3}, "0.001 does nothing"),
        ({"masked_loss": True}, "4 of 4 photographs have no mask, e.g. 0.jpg"),
    ],
)
def test_settings(options: dict[str, Any], message: str) -> None:
    (found,) = said(**options)
    assert message in found


def test_photographs() -> None:
    assert "1 photograph of the subject may be learned by heart" in said(LARGE[:1])[0]
    assert "2 photographs of the subject" in said(LARGE[:2])[0]
    small = [*LARGE[:3], Photograph(Path("thumb.png"), (120, 90))]
    (found,) = said(small)
    assert "1 of 4 photographs are far smaller" in found
    assert "thumb.png is 120x90" in found
