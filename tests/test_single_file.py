"""A single file in LDM's layout: every weight arrives bit for bit, offline; what is no base is refused."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm import State, load_models, write_ldm
from safetensors.torch import load_file, save_file
from tiny_bases import FAMILIES, write_tiny_base
from torch import Tensor

from dbadapter.errors import BaseError, UsageError
from dbadapter.single_file import (
    CONFIGS,
    SingleFile,
    check_single_file,
    inspect_single_file,
    load_single_file,
    load_single_file_tokenizer,
)

CPU = torch.device("cpu")
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: write_tiny_base(root / family, family, clip_vocabulary=False) for family in FAMILIES}


@pytest.fixture(scope="module")
def files(folders: dict[str, Path]) -> dict[str, Path]:
    """One file per family, its configs beside it: not to be changed."""
    return {
        family: write_ldm(folder, folder.parent / f"{family}-file.safetensors")
        for family, folder in folders.items()
    }


def copied(file: Path, folder: Path, change: Callable[[State], object] | None = None) -> Path:
    """Return a copy of a file and its configs that a test may break."""
    state = load_file(file)
    if change is not None:
        change(state)
    target = folder / "model.safetensors"
    save_file(state, target)
    shutil.copytree(file.with_suffix(""), target.with_suffix(""))
    return target


def load(file: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_single_file(inspect_single_file(file), CPU, dtype)


def outputs(unet: Any, encoders: list[Any], vae: Any) -> list[Tensor]:
    """Return what the models make of fixed inputs."""
    ids = torch.arange(2 * 32).reshape(2, 32) % 500
    ids[:, -1] = 513
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        texts = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        hidden = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
        added = None
        if len(texts) == 2:
            added = {"text_embeds": texts[1].text_embeds, "time_ids": torch.full((2, 6), 32.0)}
        noise = unet(latents, 500, hidden, added_cond_kwargs=added).sample
        return [*(text[0] for text in texts), hidden, noise, vae.decode(latents).sample]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_and_output_is_that_of_the_folder(
    family: str, files: dict[str, Path], folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    file = inspect_single_file(files[family])
    assert (file.family, file.prediction_type, file.own_configs) == (family, "epsilon", True)
    capfd.readouterr()
    pipeline = load_single_file(file, CPU, torch.float32)
    assert capfd.readouterr() == ("", "")
    models = load_models(folders[family])
    for part, original in models.items():
        loaded = getattr(pipeline, part)
        assert type(loaded) is type(original)
        assert not loaded.training
        expected, got = original.state_dict(), loaded.state_dict()
        assert list(got) == list(expected)
        for name, value in expected.items():
            assert torch.equal(got[name], value), f"{part} {name}"
        assert not [name for name, value in loaded.named_buffers() if value.is_meta]
    ours = [getattr(pipeline, part) for part in models if part.startswith("text")]
    theirs = [model for part, model in models.items() if part.startswith("text")]
    pairs = zip(
        outputs(pipeline.unet, ours, pipeline.vae),
        outputs(models["unet"], theirs, models["vae"]),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)
    assert pipeline.safety_checker is None if family != "sdxl" else pipeline.watermark is None
    assert pipeline("a b", num_inference_steps=2, output_type="np", generator=None).images.shape == (
        1,
        32,
        32,
        3,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_own_converter_agrees(family: str, files: dict[str, Path]) -> None:
    """diffusers converts from the file's names to its own; this loader goes the other way."""
    from diffusers.loaders import single_file_utils as theirs

    pipeline, state = load(files[family]), load_file(files[family])
    unet = theirs.convert_ldm_unet_checkpoint(dict(state), dict(pipeline.unet.config))
    vae = theirs.convert_ldm_vae_checkpoint(dict(state), dict(pipeline.vae.config))
    for model, converted in ((pipeline.unet, unet), (pipeline.vae, vae)):
        own = model.state_dict()
        assert set(own) == set(converted)
        assert all(torch.equal(own[name], value) for name, value in converted.items())


def test_weights_can_be_saved_and_changed(files: dict[str, Path], tmp_path: Path) -> None:
    """They may be views of the file; neither the file nor one another may feel a change."""
    before = files["sdxl"].read_bytes()
    pipeline = load(files["sdxl"])
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for parameter in getattr(pipeline, part).parameters():
            parameter.data.fill_(1.0)
    assert files["sdxl"].read_bytes() == before
    pipeline.save_pretrained(tmp_path / "saved")
    assert load_models(tmp_path / "saved")["unet"].conv_in.weight.eq(1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_is_of_all_weights(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    half = copied(
        files[family],
        tmp_path,
        lambda state: state.update({key: value.half() for key, value in state.items()}),
    )
    pipeline = load(half, torch.bfloat16)
    for part in ("unet", "vae", "text_encoder"):
        assert {weight.dtype for weight in getattr(pipeline, part).parameters()} == {torch.bfloat16}


def test_oldest_naming_of_the_text_encoder(files: dict[str, Path], tmp_path: Path) -> None:
    def rename(state: State) -> None:
        for key in [key for key in state if ".text_model." in key]:
            state[key.replace(".text_model.", ".")] = state.pop(key)

    old, new = load(copied(files["sd1"], tmp_path, rename)), load(files["sd1"])
    for one, other in zip(old.text_encoder.parameters(), new.text_encoder.parameters(), strict=True):
        assert torch.equal(one, other)


def test_projection_as_a_linear_layer(files: dict[str, Path], tmp_path: Path) -> None:
    """Some programs save OpenCLIP's projection as a weight, (out, in), and not as a matrix, (in, out)."""

    def rename(state: State) -> None:
        matrix = state.pop("conditioner.embedders.1.model.text_projection")
        state["conditioner.embedders.1.model.text_projection.weight"] = matrix.T.contiguous()

    old, new = load(copied(files["sdxl"], tmp_path, rename)), load(files["sdxl"])
    assert torch.equal(old.text_encoder_2.text_projection.weight, new.text_encoder_2.text_projection.weight)


def test_sd2_file_without_its_last_text_layer(files: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' own script writes only the 23 layers that it uses."""

    def drop(state: State) -> None:
        for key in [key for key in state if ".resblocks.2." in key]:
            del state[key]

    encoder = load(copied(files["sd2"], tmp_path, drop)).text_encoder
    # transformers 4 has one more level
    assert len(getattr(encoder, "text_model", encoder).encoder.layers) == 2


def test_linear_attention_of_the_vae(files: dict[str, Path], tmp_path: Path) -> None:
    def flatten(state: State) -> None:
        for key in [key for key in state if ".attn_1." in key and state[key].ndim == 4]:
            state[key] = state[key][:, :, 0, 0].contiguous()

    old, new = load(copied(files["sd1"], tmp_path, flatten)), load(files["sd1"])
    one, other = (each.vae.decoder.mid_block.attentions[0].to_q.weight for each in (old, new))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "part", "pad"),
    [
        ("sd1", "tokenizer", 49407),
        ("sd2", "tokenizer", 0),
        ("sdxl", "tokenizer", 49407),
        ("sdxl", "tokenizer_2", 0),
    ],
)
def test_tokenizers_of_our_configs(family: str, part: str, pad: int) -> None:
    file = SingleFile(Path("model.safetensors"), family, "epsilon", CONFIGS / family)
    tokenizer = load_single_file_tokenizer(file, part)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length, len(tokenizer)) == (pad, 77, 49408)
    ids = tokenizer("a photo of sks dog", padding="max_length", max_length=77).input_ids
    assert ids == [49406, 320, 1125, 539, 48136, 1929, 49407] + [pad] * 70
    assert tokenizer("dog").input_ids == [49406, 1929, 49407]


def test_tokenizer_of_a_folder_without_one(files: dict[str, Path], tmp_path: Path) -> None:
    path = copied(files["sd1"], tmp_path)
    shutil.rmtree(tmp_path / "model/tokenizer")
    with pytest.raises(
        BaseError, match=r"knows 514 tokens, CLIP's vocabulary has 49408; put its tokenizer in"
    ):
        load_single_file_tokenizer(inspect_single_file(path))
    config = tmp_path / "model/text_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 49408}))
    assert load_single_file_tokenizer(inspect_single_file(path)).model_max_length == 32


# What it predicts.


def bare(files: dict[str, Path], family: str, tmp_path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Return a file of the family without configs beside it."""
    target = tmp_path / "bare.safetensors"
    save_file(load_file(files[family]), target, metadata)
    return target


def test_prediction_type_of_sd2_must_be_said(files: dict[str, Path], tmp_path: Path) -> None:
    path = bare(files, "sd2", tmp_path)
    with pytest.raises(BaseError, match=r"--prediction-type epsilon .512 px.* or v_prediction .768 px"):
        inspect_single_file(path)
    assert inspect_single_file(path, "epsilon").prediction_type == "epsilon"
    assert inspect_single_file(path, "v_prediction").prediction_type == "v_prediction"
    with pytest.raises(UsageError, match="got 'x0'"):
        inspect_single_file(path, "x0")


@pytest.mark.parametrize(
    ("stated", "expected"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("v-prediction", "v_prediction")]
)
def test_prediction_type_in_the_header(
    stated: str, expected: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path = bare(files, "sd2", tmp_path, {"modelspec.prediction_type": stated})
    assert inspect_single_file(path).prediction_type == expected
    assert inspect_single_file(path, "epsilon").prediction_type == "epsilon"


def test_sd2_sample_size_follows_what_it_predicts() -> None:
    from dbadapter import single_file

    for prediction, size in (("epsilon", 64), ("v_prediction", 96)):
        file = SingleFile(Path("model.safetensors"), "sd2", prediction, CONFIGS / "sd2")
        assert single_file._empty_model(file, "unet").config.sample_size == size


def test_marker_keys_of_sdxl(files: dict[str, Path], tmp_path: Path) -> None:
    path = copied(
        files["sdxl"],
        tmp_path,
        lambda state: state.update({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}),
    )
    file = inspect_single_file(path)
    assert (file.prediction_type, file.zero_snr) == ("v_prediction", True)
    config = load_single_file(file, CPU, torch.float32).scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"
    assert inspect_single_file(path, "epsilon").prediction_type == "epsilon"


def test_prediction_type_of_the_configs_beside(files: dict[str, Path], tmp_path: Path) -> None:
    path = copied(files["sd1"], tmp_path)
    config = tmp_path / "model/scheduler/scheduler_config.json"
    for stated in ("v_prediction", "sample"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": stated}))
        if stated == "v_prediction":
            assert load(path).scheduler.config.prediction_type == "v_prediction"
        else:
            with pytest.raises(BaseError, match="predicts 'sample'"):
                inspect_single_file(path)


# Refusals.


def refusal(path: Path) -> str:
    with pytest.raises(BaseError) as caught:
        check_single_file(inspect_single_file(path, "epsilon"))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message or str(path.with_suffix("")) in message
    return message


def test_shapes_of_other_configs(files: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(bare(files, "sd1", tmp_path))
    assert f"{FIRST} has the shape (32, 4, 3, 3), the configs of unet say (320, 4, 3, 3)" in message
    assert f"put its diffusers configs in {tmp_path / 'bare'} (unet/" in message


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("sd1", "model.diffusion_model.middle_block.1.proj_in.bias"),
        ("sd1", "first_stage_model.decoder.up.2.block.0.norm1.bias"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"),
        ("sdxl", "conditioner.embedders.1.model.text_projection"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"),
    ],
)
def test_missing_key_is_named(family: str, key: str, files: dict[str, Path], tmp_path: Path) -> None:
    path = copied(files[family], tmp_path, lambda state: state.pop(key))
    assert f"{key} is missing" in refusal(path)
    with pytest.raises(BaseError, match=re.escape(key)):
        load(path)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("sd1", "model.diffusion_model.output_blocks.9.0.in_layers.0.weight"),
        ("sd1", "first_stage_model.decoder.up.3.block.0.norm1.bias"),
        ("sd1", "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.bias"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.3.mlp.c_fc.bias"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_fc.bias"),
    ],
)
def test_layer_too_many_is_named(family: str, key: str, files: dict[str, Path], tmp_path: Path) -> None:
    path = copied(files[family], tmp_path, lambda state: state.update({key: torch.zeros(3)}))
    assert f"{key} is no part of" in refusal(path)


def test_layers_of_a_vision_model_are_ignored(files: dict[str, Path], tmp_path: Path) -> None:
    """The oldest files hold CLIP's picture encoder too, which has more layers than its text encoder."""
    key = "cond_stage_model.transformer.vision_model.encoder.layers.23.mlp.fc1.bias"
    path = copied(files["sd1"], tmp_path, lambda state: state.update({key: torch.zeros(3)}))
    check_single_file(inspect_single_file(path))


def test_integers_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = copied(files["sd1"], tmp_path, lambda state: state.update({FIRST: state[FIRST].to(torch.int8)}))
    assert f"{FIRST} holds I8 numbers: a quantised checkpoint" in refusal(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "vae/config.json").unlink(), r"vae/config\.json is missing"),
        (lambda folder: (folder / "unet/config.json").write_text("["), "cannot be read as JSON"),
        (lambda folder: (folder / "unet/config.json").write_text("[]"), "must hold a JSON object"),
        (
            lambda folder: (folder / "unet/config.json").write_text('{"layers_per_block": [2, 2, 2, 2]}'),
            "one number",
        ),
        (lambda folder: (folder / "unet/config.json").write_text('{"act_fn": 3}'), "cannot be used"),
    ],
)
def test_broken_configs_beside(
    change: Callable[[Path], object], message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path = copied(files["sd1"], tmp_path)
    change(tmp_path / "model")
    assert re.search(message, refusal(path))


def test_folder_beside_that_holds_something_else_is_ignored(files: dict[str, Path], tmp_path: Path) -> None:
    path = bare(files, "sd1", tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/photograph.png").write_bytes(b"")
    assert not inspect_single_file(path).own_configs


def test_truncated_missing_and_folder(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(files["sd1"].read_bytes()[:-1000])
    assert "cannot be read as safetensors" in refusal(path)
    assert "No such file" in refusal(tmp_path / "nothing.safetensors")
    assert "Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("channels", "message"), [(9, "inpainting"), (8, "InstructPix2Pix"), (5, "depth"), (6, "not a plain")]
)
def test_other_unets_are_refused_by_name(
    channels: int, message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path = copied(
        files["sd1"], tmp_path, lambda state: state.update({FIRST: torch.zeros(32, channels, 3, 3)})
    )
    assert message in refusal(path)
