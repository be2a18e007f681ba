"""Loading a base: the family is told from configs, and what is no base is refused with the cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbadapter.base import (
    Base,
    check_prompt,
    load_base,
    load_tokenizers_of,
    pick_device,
    pick_precision,
    tokenize,
)
from dbadapter.base_folder import detect_family, is_toybox_on_disk
from dbadapter.conditioning import encode_prompts
from dbadapter.errors import BaseError, DataError, UsageError
from dbadapter.model_folder import write_model_folder


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may break."""
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_tiny_base(tiny_base: Base) -> None:
    assert tiny_base.family == "sd1"
    assert tiny_base.resolution == 32
    assert tiny_base.vae_scale_factor == 4
    assert tiny_base.prediction_type == "epsilon"
    assert tiny_base.device == torch.device("cpu")
    models = (tiny_base.unet, tiny_base.text_encoder, tiny_base.vae)
    assert not any(parameter.requires_grad for model in models for parameter in model.parameters())
    assert not any(model.training for model in models)


def test_toybox_is_its_own_family() -> None:
    base = load_base("toybox", device="cpu")
    assert (base.name, base.family, base.resolution) == ("toybox", "toybox", 64)
    assert base.prediction_type == "v_prediction"
    assert base.pipeline.family == "toybox"  # its pictures take the guidance scale by it


def test_a_copy_of_toybox_is_toybox(tmp_path: Path, tiny_base_folder: Path) -> None:
    """Tuned or merged, it still wants toybox's guidance and presets, and its judges know it."""
    write_model_folder(load_base("toybox", device="cpu").pipeline, tmp_path / "tuned")
    copy = load_base(str(tmp_path / "tuned"), device="cpu")
    assert (copy.name, copy.family, copy.pipeline.family) == ("tuned", "toybox", "toybox")
    assert is_toybox_on_disk(str(tmp_path / "tuned"))
    assert is_toybox_on_disk("toybox")
    assert not is_toybox_on_disk(str(tiny_base_folder))
    assert not is_toybox_on_disk("some/base")


def test_family_comes_from_configs_not_from_the_name(folder: Path) -> None:
    renamed = folder.rename(folder.with_name("sdxl-turbo-v2"))
    assert detect_family(renamed) == "sd1"


def test_dtype_is_of_all_weights(tiny_base_folder: Path) -> None:
    base = load_base(str(tiny_base_folder), device="cpu", dtype=torch.bfloat16)
    for model in (base.unet, base.text_encoder, base.vae):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_prediction_type_can_be_set(tiny_base_folder: Path) -> None:
    base = load_base(str(tiny_base_folder), device="cpu", prediction_type="v_prediction")
    assert base.prediction_type == "v_prediction"
    assert base.noise_scheduler().config["prediction_type"] == "v_prediction"
    with pytest.raises(UsageError, match="got 'x0'"):
        load_base(str(tiny_base_folder), prediction_type="x0")


def test_noise_scheduler_has_the_betas_of_the_base(tiny_base: Base) -> None:
    scheduler = tiny_base.noise_scheduler()
    assert torch.equal(scheduler.alphas_cumprod, tiny_base.scheduler.alphas_cumprod)


def test_loading_says_nothing(tiny_base_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(str(tiny_base_folder), device="cpu", dtype=torch.bfloat16)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no-such-base", "no such file or folder; pass toybox, a diffusers folder, a file or a hub id"),
        ("someone/some-model", "cannot be fetched from the hub .*HF_HUB_OFFLINE"),
        ("./a/b", "no such file or folder"),
        ("a/b.safetensors", "no such file or folder"),
        ("~nosuchuser/x", "pass toybox, a folder or a file"),
    ],
)
def test_spec_that_names_nothing(spec: str, message: str) -> None:
    with pytest.raises(BaseError, match=message):
        load_base(spec)


def test_plain_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"no model_index\.json"):
        load_base(str(tmp_path))


def set_key(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({key: value})


def null_text_config(content: dict[str, Any]) -> None:
    del content["hidden_size"]
    content["text_config"] = None


def refiner(index: dict[str, Any]) -> None:
    index.update(text_encoder=[None, None], text_encoder_2=["transformers", "CLIPTextModelWithProjection"])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", set_key("transformer", ["diffusers", "FluxTransformer2DModel"]), "DiT"),
        ("model_index.json", set_key("text_encoder", ["transformers", "T5EncoderModel"]), "T5EncoderModel"),
        ("model_index.json", set_key("vae", [None, None]), "part vae is missing"),
        ("model_index.json", lambda content: content.pop("scheduler"), "part scheduler is missing"),
        ("model_index.json", set_key("vae", []), "part vae is missing"),
        ("text_encoder/config.json", null_text_config, "no hidden_size"),
        ("unet/config.json", set_key("in_channels", [4]), "not a plain text-to-image UNet"),
        ("unet/config.json", set_key("in_channels", 9), "inpainting"),
        ("unet/config.json", set_key("in_channels", 8), "InstructPix2Pix"),
        ("unet/config.json", set_key("cross_attention_dim", 1024), "belong to different models"),
        ("unet/config.json", set_key("addition_embed_type", "text_time"), "SDXL has two encoders"),
        ("unet/config.json", set_key("cross_attention_dim", 768), "belong to different models"),
        ("text_encoder/config.json", lambda content: content.pop("hidden_size"), "no hidden_size"),
        ("scheduler/scheduler_config.json", set_key("prediction_type", "sample"), "predicts 'sample'"),
    ],
)
def test_other_kinds_are_refused_by_name(
    folder: Path, file: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder / file, change)
    with pytest.raises(BaseError, match=message):
        load_base(str(folder), device="cpu")


def test_missing_weights_and_pickles_are_refused(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(BaseError, match=r"unet has no diffusion_pytorch_model\.safetensors"):
        load_base(str(folder))
    weights.with_suffix(".bin").write_bytes(b"pickle")
    with pytest.raises(BaseError, match="a pickle"):
        load_base(str(folder))


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
def test_incomplete_weights_are_never_random(folder: Path, file: str) -> None:
    """The libraries would only log it, and draw the missing layers at random."""
    weights = load_file(folder / file)
    save_file({name: weights[name] for name in sorted(weights)[::2]}, folder / file, {"format": "pt"})
    part = file.split("/")[0]
    with pytest.raises(BaseError, match=rf"weights of {part} are incomplete: \d+ are missing, first \w+\."):
        load_base(str(folder), device="cpu")


def test_text_encoder_in_the_naming_of_transformers_4(folder: Path) -> None:
    """Published SD1.x files have `text_model.` and position ids, which transformers 5 knows no more."""
    path = folder / "text_encoder/model.safetensors"
    weights = {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    old = {f"text_model.{name}": value for name, value in weights.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(old, path, {"format": "pt"})
    assert load_base(str(folder), device="cpu").family == "sd1"


def test_folder_as_transformers_5_saves_it(folder: Path) -> None:
    """No `text_model.` in the keys, and tokenizer.json alone: transformers 4 needs help with both."""
    from transformers import CLIPTokenizerFast

    expected = load_base(str(folder), device="cpu")
    path = folder / "text_encoder/model.safetensors"
    weights = {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    CLIPTokenizerFast.from_pretrained(folder / "tokenizer").save_pretrained(folder / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    base = load_base(str(folder), device="cpu")
    ids = tokenize(expected.tokenizer, ["a photo of sks dog"])
    assert torch.equal(tokenize(base.tokenizer, ["a photo of sks dog"]), ids)
    assert torch.equal(base.text_encoder(ids)[0], expected.text_encoder(ids)[0])
    assert load_tokenizers_of(str(folder))[0].get_vocab() == expected.tokenizer.get_vocab()


def test_broken_files_are_named_on_one_line(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(BaseError, match="cannot be loaded") as caught:
        load_base(str(folder), device="cpu")
    assert "\n" not in str(caught.value)
    (folder / "unet/config.json").write_text("{")
    with pytest.raises(BaseError, match=r"unet/config\.json cannot be read as JSON"):
        load_base(str(folder))


def test_half_precision_variant_is_found(folder: Path) -> None:
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    assert load_base(str(folder), device="cpu").family == "sd1"


def test_too_long_prompt_is_an_error_never_cut(tiny_base: Base) -> None:
    tokenizer = tiny_base.tokenizer
    check_prompt(tokenizer, "mug " * 30)
    with pytest.raises(DataError, match="31 tokens long, this base reads at most 30"):
        check_prompt(tokenizer, "mug " * 31)
    with pytest.raises(DataError):
        encode_prompts(tiny_base, ["mug", "mug " * 31])


def test_encoding_is_that_of_the_pipeline(tiny_base: Base) -> None:
    with torch.no_grad():
        ours = encode_prompts(tiny_base, ["a photo of sks dog", ""]).embeddings
        theirs, _ = tiny_base.pipeline.encode_prompt(
            ["a photo of sks dog", ""], "cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    assert ours.shape == (2, 32, 32)
    assert torch.equal(ours, theirs)


def test_tokenize_pads_to_the_length(tiny_base: Base) -> None:
    ids = tokenize(tiny_base.tokenizer, ["sks", "a photo of a dog"])
    assert ids.shape == (2, 32)
    assert ids[0, :3].tolist() == [49406, 48136, 49407]


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pick_precision(cpu, "no") == "no"
    assert pick_precision(cpu, "bf16") == "bf16"
    assert pick_precision(cpu, "auto") in ("no", "bf16")
    with pytest.raises(UsageError, match="needs a GPU"):
        pick_precision(cpu, "fp16")
    with pytest.raises(UsageError, match="got 'fp8'"):
        pick_precision(cpu, "fp8")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert pick_precision(cpu, "auto") == "no"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert pick_precision(cpu, "auto") == "bf16"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_of_gpus(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision(torch.device("cuda"), "auto") == expected


def test_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def hub_cache(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds one repository, as `hf download` leaves it."""
    from huggingface_hub import constants

    repository = tmp_path / "hub/models--someone--tiny"
    shutil.copytree(tiny_base_folder, repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False
    )
    return repository


def test_hub_id_is_read_from_the_cache_offline(hub_cache: Path) -> None:
    base = load_base("someone/tiny", device="cpu")
    assert (base.name, base.family) == ("someone/tiny", "sd1")
    with pytest.raises(BaseError, match=r"base someone/other: .* cannot be fetched from the hub"):
        load_base("someone/other")


def test_a_tokenizer_without_vocabulary_is_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    for name in ("vocab.json", "tokenizer.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(BaseError, match="tokenizer has no vocabulary"):
        load_base(str(folder), device="cpu")


def test_a_width_that_is_no_number_is_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))
    with pytest.raises(BaseError, match="no hidden_size"):
        load_base(str(folder), device="cpu")
