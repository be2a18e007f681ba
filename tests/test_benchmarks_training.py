"""The training benchmark's own parts: stand-in transforms, arithmetic, refusals, true sizes. No run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click import ClickException, UsageError
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

from benchmarks import training, training_figures, training_peer, true_size

transforms = training_peer.stand_in().transforms


def ramp(width: int, height: int) -> Image.Image:
    """Return a picture whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


# --- the stand-in for torchvision


@pytest.mark.parametrize(
    ("size", "wanted"), [((30, 40), (12, 16)), ((50, 31), (19, 12)), ((12, 40), (12, 40)), ((6, 8), (12, 16))]
)
def test_resize_brings_the_shorter_side_to_the_size(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert transforms.Resize(12)(ramp(*size)).size == wanted


def test_resize_uses_the_filter_asked_for() -> None:
    picture = ramp(40, 40)
    made = transforms.Resize(10, interpolation=transforms.InterpolationMode.LANCZOS)(picture)
    assert made.tobytes() == picture.resize((10, 10), Image.Resampling.LANCZOS).tobytes()
    assert made.tobytes() != picture.resize((10, 10), Image.Resampling.NEAREST).tobytes()


def test_the_filters_have_torchvisions_names() -> None:
    # The script offers dir(InterpolationMode) as choices and looks the chosen one up in capitals.
    assert {"NEAREST", "BILINEAR", "BICUBIC", "LANCZOS"} <= set(dir(transforms.InterpolationMode))
    for name in ("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX", "HAMMING"):
        assert transforms.InterpolationMode[name].value == Image.Resampling[name].value


def test_centre_crop_takes_the_middle() -> None:
    made = np.asarray(transforms.CenterCrop(4)(ramp(10, 7)))
    assert made.shape == (4, 4, 3)
    assert made[0, 0].tolist() == [3, 2, 0]  # left (10 - 4) / 2, top round(1.5)


def test_random_crop_stays_inside_and_reaches_both_ends() -> None:
    torch.manual_seed(0)
    corners = [np.asarray(transforms.RandomCrop(4)(ramp(6, 5)))[0, 0] for _ in range(60)]
    assert {int(corner[0]) for corner in corners} == {0, 1, 2}
    assert {int(corner[1]) for corner in corners} == {0, 1}


@pytest.mark.parametrize("crop", [transforms.CenterCrop, transforms.RandomCrop])
def test_a_crop_refuses_a_smaller_picture(crop: Callable[[int], Any]) -> None:
    with pytest.raises(ValueError, match="at least that large, got 6x5"):
        crop(6)(ramp(6, 5))


def test_to_tensor_and_normalize_give_minus_one_to_one() -> None:
    picture = Image.fromarray(np.array([[[0, 51, 255], [255, 0, 102]]], dtype=np.uint8))
    both = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    made = both(picture)
    assert made.dtype == torch.float32
    assert made.is_contiguous()
    torch.testing.assert_close(made, torch.tensor([[[-1.0, 1.0]], [[-0.6, -1.0]], [[1.0, -0.2]]]))


def test_normalize_takes_a_value_a_channel_and_leaves_its_input() -> None:
    given = torch.ones(3, 1, 1)
    made = transforms.Normalize([0.0, 0.5, 1.0], [1.0, 0.5, 2.0])(given)
    assert made.flatten().tolist() == [1.0, 1.0, 0.0]
    assert given.flatten().tolist() == [1.0, 1.0, 1.0]


def test_flip_mirrors_with_its_probability() -> None:
    picture = ramp(5, 3)
    assert np.asarray(transforms.RandomHorizontalFlip(1.0)(picture))[0, 0, 0] == 4
    assert transforms.RandomHorizontalFlip(0.0)(picture) is picture


def test_the_stand_in_is_importable_and_yields_to_the_real_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    if importlib.util.find_spec("torchvision") is not None:
        assert training_peer.install_stand_in() is False
        return
    # setitem first, so that both are taken away again at the end.
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    assert training_peer.install_stand_in() is True
    from torchvision import transforms as found  # type: ignore[import-not-found]

    assert found.Compose is training_peer.Compose
    assert importlib.util.find_spec("torchvision") is not None
    assert training_peer.install_stand_in() is False


# --- the clock


def test_the_peak_is_this_processs_own() -> None:
    now, peak = training_peer.resident_mb()
    assert 10 < now <= peak


def test_the_clock_writes_its_stamps_at_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(training_peer.os, "_exit", ended.append)
    clock = training_peer.Clock(tmp_path / "record.json", spawned=0.0, steps=2)
    clock.imported()
    for _ in range(2):
        assert ended == []
        clock.begin()
        clock.end()
    assert ended == [0]
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["begins"]) == len(record["ends"]) == len(record["cpu"]) == 2
    assert record["begins"][0] <= record["ends"][0] <= record["begins"][1]
    assert record["threads"] == torch.get_num_threads()


# --- records to figures


def record(step: float, startup: float = 10.0, memory: float = 500.0, steps: int = 4) -> dict[str, Any]:
    """Return a run's record: one second for the first step, then `step` seconds each."""
    ends = [startup + 1 + number * step for number in range(steps)]
    return {
        "begins": [startup],
        "ends": ends,
        "cpu": [2 * end for end in ends],
        "imports_seconds": 4.0,
        "imports_memory_mb": 300.0,
        "startup_peak_memory_mb": 350.0,
        "peak_memory_mb": 300.0 + memory,
        "memory_of": "process",
        "threads": 2,
        "patches": [],
        "command": "dbadapter train",
    }


def test_a_step_lasts_from_end_to_end_without_the_warmup() -> None:
    slow_start = record(2.0)
    slow_start["ends"][0] -= 5
    figures = training_figures.figures([slow_start, record(3.0)], warmup=2)
    assert figures["step_seconds_all"] == [[2.0, 2.0], [3.0, 3.0]]
    assert figures["step_seconds"] == 2.5
    assert figures["step_seconds_by_run"] == [2.0, 3.0]
    assert figures["step_cpu_seconds"] == 5.0
    assert figures["startup_seconds"] == 10
    assert figures["startup_without_imports_seconds"] == 6
    assert figures["peak_memory_mb"] == 500
    assert figures["peak_memory_before_first_step_mb"] == 50


def test_memory_of_a_gpu_counts_from_nothing() -> None:
    assert training_figures.figures([record(1.0) | {"memory_of": "gpu"}], 1)["peak_memory_mb"] == 800


def test_ratios_above_one_are_better_but_for_memory() -> None:
    peer = training_figures.figures([record(3.0), record(3.0)], 1)
    ours = training_figures.figures([record(2.0, 5.0, 400.0), record(1.0, 5.0, 400.0)], 1)
    assert training_figures.ratios(peer, ours) == {
        "steps_per_second": 2.0,
        "steps_per_second_by_round": [1.5, 3.0],
        "steps_per_cpu_second": 2.0,
        "peak_memory": 0.8,
        "startup": 2.0,
        "startup_without_imports": 6.0,
    }


def test_startup_at_the_defaults_is_a_pictures_share_times_their_number() -> None:
    begins = {
        "peer": 18.0,
        "peer_pictures_there": 10.0,
        "ours": 10.0,
        "ours_prior_source_instance": 8.0,
    }
    records = {name: [record(1.0, start, steps=0)] for name, start in begins.items()}
    made = training_figures.startup_figures(records, pictures=4, their_default=100, our_default=40)
    assert made["peer"]["seconds_a_picture"] == 2.0
    assert made["peer"]["seconds_at_the_default"] == 210.0
    assert made["ours"]["seconds_at_the_default"] == 28.0
    assert made["ratios"]["startup"] == 1.8
    assert made["ratios"]["startup_at_the_defaults"] == 7.5
    assert made["ratios"]["startup_at_the_defaults_prior_source_instance"] == 26.25


def test_every_bar_says_whether_it_is_met() -> None:
    ratios = {"steps_per_second": 1.3, "peak_memory": 0.81}
    bases = {
        "toybox": {
            "resolution": 64,
            "fp32": {"ratios": ratios},
            "defaults": {"ratios": ratios},
            "startup": {"ratios": {"startup_at_the_defaults": 9.9}},
        }
    }
    found = training_figures.bars(bases, on_gpu=False)
    met = {(bar["table"], bar["ratio"]): bar["met"] for bar in found}
    assert met == {
        ("fp32", "steps_per_second"): True,
        ("fp32", "peak_memory"): False,
        ("defaults", "steps_per_second"): False,
        ("defaults", "peak_memory"): False,
        ("startup", "startup_at_the_defaults"): False,
    }
    assert found[0]["bar"] == "at least 1.3"
    assert found[1]["bar"] == "at most 0.8"


def test_a_gpu_has_its_own_bar_at_512_pixels() -> None:
    ratios = {"steps_per_second": 2.1, "peak_memory": 0.5}
    bases = {"sd15": {"resolution": 512, "defaults": {"ratios": ratios}}}
    assert training_figures.bars(bases, on_gpu=True)[0]["met"] is True
    assert training_figures.bars(bases, on_gpu=False)[0]["met"] is False


# --- what is run


def test_both_sides_are_given_the_same_job(tmp_path: Path) -> None:
    job = training.Job(
        base="sd15",
        folder=tmp_path / "base",
        ours=str(tmp_path / "base"),
        instances=tmp_path / "photographs",
        classes=tmp_path / "classes",
        pictures=3,
        noun="mug",
        resolution=256,
        batch=1,
        script=tmp_path / "train_dreambooth_lora.py",
        work=tmp_path,
        threads=2,
    )
    theirs, ours = training.like_for_like(job, "bf16")
    peer, command = job.peer_arguments(theirs), job.our_arguments(ours)

    def after(words: list[str], name: str) -> str:
        return words[words.index(name) + 1]

    pairs = {
        "--pretrained_model_name_or_path": "--base",
        "--instance_data_dir": "--instance-data-dir",
        "--class_data_dir": "--class-data-dir",
        "--resolution": "--resolution",
        "--train_batch_size": "--train-batch-size",
        "--rank": "--rank",
        "--mixed_precision": "--mixed-precision",
    }
    for name, own in pairs.items():
        assert after(peer, name) == after(command, own)
    assert "--with_prior_preservation" in peer
    assert after(command, "--prior") == "generated"
    assert "--train_text_encoder" in peer
    assert "--train-text-encoder" in command
    assert after(command, "--targets") == "attention"


def test_our_arguments_are_options_of_the_command(tmp_path: Path) -> None:
    from dbadapter.cli.train import train

    known = {word for parameter in train.params for word in (*parameter.opts, *parameter.secondary_opts)}
    job = training.Job(
        "toybox", tmp_path, "toybox", tmp_path, tmp_path, 4, "mug", 64, 4, tmp_path, tmp_path, 1
    )
    words = job.our_arguments(training.like_for_like(job, "no")[1])
    assert {word for word in words if word.startswith("--")} <= known


def test_pictures_are_alone_in_their_folders(tmp_path: Path) -> None:
    from dbadapter import toybox

    instances, classes = training.pictures(tmp_path, toybox.example_subject().folder, 2, 64, batch=2)
    # The script opens every file of a folder as a picture; the example's folder has a JSON file too.
    assert {path.suffix for path in instances.iterdir()} == {".png"}
    assert [Image.open(path).size for path in classes.iterdir()] == [(64, 64)] * 2


def test_the_script_gets_whole_batches(tmp_path: Path) -> None:
    """Each of its passes over the photographs ends with the batch that is left, ours do not."""
    from dbadapter import toybox

    example = toybox.example_subject().folder  # five pictures
    assert len(list(training.pictures(tmp_path, example, 1, 64, batch=4)[0].iterdir())) == 4
    with pytest.raises(UsageError, match="has 5 photographs, fewer than --train-batch-size 6"):
        training.pictures(tmp_path, example, 1, 64, batch=6)


# --- refusals


def refusal(*words: str) -> str:
    result = CliRunner().invoke(training.main, list(words))
    assert result.exit_code == 2
    return result.output.strip().splitlines()[-1]


def test_a_missing_script_is_refused_in_one_line(tmp_path: Path) -> None:
    line = refusal("--peer-script", str(tmp_path / "none.py"))
    assert "none.py: no such file; pass the file examples/dreambooth/train_dreambooth_lora.py" in line


def test_another_script_is_refused_in_one_line(tmp_path: Path) -> None:
    other = tmp_path / "train_dreambooth.py"
    other.write_text("class DreamBoothDataset: ...\n")
    line = refusal("--peer-script", str(other))
    assert "has no LoraConfig, so it is another script" in line


def test_the_right_script_is_told_by_its_words(tmp_path: Path) -> None:
    script = tmp_path / "train_dreambooth_lora.py"
    words = [*training._MARKS, 'check_min_version("0.40.0")']
    script.write_text("\n".join(words) + '\nadd("--num_class_images",\n  type=int,\n  default=12)\n')
    about = training.check_script(script)
    assert about["asks_for_diffusers"] == "0.40.0"
    assert about["default_class_pictures"] == 12
    assert "unknown tables best" in refusal("--peer-script", str(script), "--tables", "best")


def test_a_folder_without_photographs_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ClickException, match="no photographs in"):
        training.pictures(tmp_path / "work", tmp_path, 1, 64, batch=1)


# --- true sizes


@pytest.mark.parametrize(
    ("family", "part", "count"),
    [
        ("sd1", "unet", 859_520_964),
        ("sd1", "vae", 83_653_863),
        ("sd1", "text_encoder", 123_060_480),
        ("sd2", "unet", 865_910_724),
        ("sd2", "text_encoder", 340_387_840),
        ("sdxl", "unet", 2_567_463_684),
        ("sdxl", "text_encoder_2", 694_659_840),
    ],
)
def test_parts_have_the_published_number_of_parameters(family: str, part: str, count: int) -> None:
    model = true_size.build(family, part, device="meta", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def shrink(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Make a family's parts narrow and shallow, so that it can be written in a test."""
    read = true_size.read_config
    levels = len(read(family, "unet")["block_out_channels"])
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    unet = {
        "block_out_channels": (32,) * levels,
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "cross_attention_dim": 64 if family == "sdxl" else 32,
    }
    if family == "sdxl":
        unet |= {
            "transformer_layers_per_block": 1,
            "projection_class_embeddings_input_dim": 6 * 256 + 32,
        }
    smaller = {
        "unet": unet,
        "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
        "text_encoder": text,
        "text_encoder_2": text | {"projection_dim": 32},
    }
    monkeypatch.setattr(true_size, "read_config", lambda family, part: read(family, part) | smaller[part])


@pytest.mark.parametrize("family", true_size.FAMILIES)
def test_a_written_base_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    from diffusers import DiffusionPipeline

    shrink(monkeypatch, family)
    folder = true_size.write_base(tmp_path / "base", family)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipeline).__name__.startswith("StableDiffusionXL" if family == "sdxl" else "StableDiffusionP")
    pipeline.set_progress_bar_config(disable=True)
    # Two steps: PNDM's first alone would be its warm-up.
    drawn = pipeline("a mug", height=64, width=64, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3)
    assert np.isfinite(drawn).all()


def test_a_written_base_is_taken_by_dbadapter_and_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dbadapter.base import load_base

    shrink(monkeypatch, "sd1")
    folder = true_size.write_base(tmp_path / "base", "sd1")
    base = load_base(str(folder))
    assert (base.family, base.resolution, base.prediction_type) == ("sd1", 512, "epsilon")
    ids = base.tokenizer("a photo of a mug", padding="max_length").input_ids
    # As in the published folder, where "a photo of a" is 320 1125 539 320; padded to 77, not to toybox's 32.
    assert ids[:5] == [49406, 320, 1125, 539, 320]
    assert len(ids) == 77

    written = (folder / "model_index.json").stat().st_mtime_ns
    true_size.write_base(folder, "sd1")
    assert (folder / "model_index.json").stat().st_mtime_ns == written
    true_size.write_base(folder, "sd1", torch.bfloat16)
    assert json.loads((folder / "true_size.json").read_text())["dtype"] == "bfloat16"
    with safe_open(folder / "unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor("conv_in.weight").dtype == torch.bfloat16


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        true_size.write_base(tmp_path, "sd1")
    assert (tmp_path / "notes.txt").exists()
