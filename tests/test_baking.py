"""Adapters baked into bases: what a base computes then, in a folder and in a single file; and back again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import assert_refused, run, tree
from diffusers import DDIMScheduler
from ldm import ldm_state, write_header
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_bases import FAMILIES, Family, write_tiny_base
from torch import Tensor

from benchmarks import true_size
from dbadapter import lora, single_file_writing
from dbadapter.adapter import Adapter
from dbadapter.adapter_file import write_adapter
from dbadapter.baking import NOTE, bake, write_base
from dbadapter.base import Base, load_base
from dbadapter.errors import AdapterError, OutputError
from dbadapter.export.parity import synthetic_adapter
from dbadapter.merging import RECORD
from dbadapter.single_file import CONFIGS, check_single_file, inspect_single_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: write_tiny_base(root / family, family, clip_vocabulary=False) for family in FAMILIES}


def load(path: Path, **options: Any) -> Base:
    return load_base(str(path), device="cpu", **options)


def state(base: Base) -> dict[str, Tensor]:
    models = {"unet": base.unet, "vae": base.vae, **base.text_encoders}
    return {
        f"{part}.{k.removeprefix('text_model.')}": v.clone()
        for part, model in models.items()
        for k, v in model.state_dict().items()
    }


def adapters(base: Base) -> dict[Adapter, float]:
    """Two that change attention and convolutions of the UNet, and the text encoders."""
    targets = ("attention", "proj", "conv")
    return {
        synthetic_adapter(base, rank=3, seed=1, targets=targets): 0.7,
        synthetic_adapter(base, rank=2, seed=2): -0.4,
    }


def baked_state(base: Base, given: dict[Adapter, float]) -> dict[str, Tensor]:
    """Return the base's weights with the sum of whole matrices added in float64."""
    wanted = {name: value.double() for name, value in state(base).items()}
    for each, weight in given.items():
        for name, factors in each.modules.items():
            key = f"{name.replace('.text_model.', '.', 1)}.weight"
            a, b = factors.lora_A.double().flatten(1), factors.lora_B.double().flatten(1)
            wanted[key] += weight * factors.scaling * (b @ a).reshape(wanted[key].shape)
    return wanted


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name].double(), value.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_and_a_file_hold_base_plus_sum(
    folders: dict[str, Path], tmp_path: Path, family: Family
) -> None:
    base = load(folders[family])
    before, given = state(base), adapters(base)
    wanted = baked_state(base, given)
    record = bake(base, given)
    assert max(float((wanted[k] - before[k]).abs().max()) for k in wanted) > 1e-3
    assert_same(state(base), wanted, 1e-6)

    assert write_base(base, tmp_path / "folder", record=record) is None
    file = tmp_path / "file.safetensors"
    assert write_base(base, file, record=record) == tmp_path / "file"
    for path in (tmp_path / "folder", file):
        read = load(path)
        assert read.family == family
        assert read.prediction_type == base.prediction_type
        assert_same(state(read), state(base))
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    assert json.loads(said[RECORD]) == json.loads((tmp_path / "folder" / NOTE).read_text()) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.safetensors", "folder"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")} == {0o644}

    # Back again, by the adapters' negative weights.
    for path in (tmp_path / "folder", file):
        read = load(path)
        bake(read, {adapter: -weight for adapter, weight in given.items()})
        assert_same(state(read), before, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_what_diffusers_reads(folders: dict[str, Path], tmp_path: Path, family: Family) -> None:
    """`from_single_file` takes the same weights out of it, with the configs beside it."""
    import diffusers

    base = load(folders[family])
    file = tmp_path / "file.safetensors"
    write_base(base, file)
    kind = type(base.pipeline)
    assert issubclass(kind, diffusers.DiffusionPipeline)
    pipeline = kind.from_single_file(
        str(file), config=str(tmp_path / "file"), local_files_only=True, safety_checker=None
    )
    for name, model in {"unet": base.unet, "vae": base.vae, **base.text_encoders}.items():
        got, wanted = getattr(pipeline, name).state_dict(), model.state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], value) for key, value in wanted.items()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_the_true_sizes_has_its_place(tmp_path: Path, family: Family) -> None:
    """Every key and shape is that of a published file, and our reader finds every weight."""
    models = {
        part: true_size.build(family, part, device="meta")
        for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else []))
    }
    scheduler = DDIMScheduler.from_config(
        json.loads((CONFIGS / family / "scheduler" / "scheduler_config.json").read_text())
    )
    base = Base("true", family, SimpleNamespace(scheduler=scheduler, **models))
    tensors = single_file_writing.ldm_tensors(base)
    published = ldm_state(models, sd2=family == "sd2")
    assert all(published[key].shape == tensor.shape for key, tensor in tensors.items())
    file = write_header(tmp_path / "file.safetensors", tensors)
    check_single_file(inspect_single_file(file, prediction_type="epsilon"))
    assert single_file_writing.is_published(base)


def test_toybox_as_a_single_file(tmp_path: Path) -> None:
    base = load_base("toybox", device="cpu")
    bake(base, {synthetic_adapter(base, rank=2): 0.5})
    assert write_base(base, tmp_path / "model.safetensors") == tmp_path / "model"
    read = load(tmp_path / "model.safetensors")
    assert read.family == "toybox"
    assert_same(state(read), state(base))
    assert read.resolution == base.resolution


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_file_says_what_it_predicts(tmp_path: Path, family: Family, prediction: str) -> None:
    folder = write_tiny_base(tmp_path / "base", family, prediction_type=prediction, clip_vocabulary=False)
    write_base(load(folder), tmp_path / "file.safetensors")
    assert load(tmp_path / "file.safetensors").prediction_type == prediction
    marked = "v_pred" in load_file(tmp_path / "file.safetensors")
    assert marked == (family == "sdxl" and prediction == "v_prediction")


def test_float16_is_rounded_once(folders: dict[str, Path], tmp_path: Path) -> None:
    base = load(folders["sd1"], dtype=torch.float16)
    given = adapters(load(folders["sd1"]))
    wanted = baked_state(base, given)
    bake(base, given)
    write_base(base, tmp_path / "file.safetensors")
    read = load_file(tmp_path / "file.safetensors")
    assert {tensor.dtype for tensor in read.values()} == {torch.float16}
    got = state(load(tmp_path / "file.safetensors", dtype=torch.float16))
    for name, value in wanted.items():
        # Half a unit in the last place of float16, and float32's rounding where W and dW cancel.
        assert ((got[name].double() - value).abs() <= value.abs() * 2**-11 * 1.001 + 2**-24).all(), name


def test_large_weights_are_split_and_read_again(folders: dict[str, Path], tmp_path: Path) -> None:
    base = load(folders["sdxl"])
    write_base(base, tmp_path / "folder", max_shard_size="70KB")
    assert len(list((tmp_path / "folder" / "unet").glob("*-of-*.safetensors"))) > 1
    assert_same(state(load(tmp_path / "folder")), state(base))


def test_a_published_architecture_needs_no_configs(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(folders["sd1"], configs / "sd1")
    monkeypatch.setattr(single_file_writing, "CONFIGS", configs)
    assert write_base(load(folders["sd1"]), tmp_path / "file.safetensors") is None
    assert not (tmp_path / "file").exists()


def test_a_misfit_changes_nothing(folders: dict[str, Path]) -> None:
    base, other = load(folders["sd1"]), load(folders["sdxl"])
    before = state(base)
    with pytest.raises(AdapterError, match="family"):
        bake(base, {synthetic_adapter(other, rank=2): 1.0})
    assert_same(state(base), before)


def test_a_weight_too_large_for_float16_is_refused(folders: dict[str, Path]) -> None:
    base = load(folders["sd1"], dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"too large for torch\.float16: pass --dtype float32"):
        bake(base, {synthetic_adapter(base, rank=2): 1e12})


def test_outputs_that_exist(folders: dict[str, Path], tmp_path: Path) -> None:
    base = load(folders["sd1"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_text("mine")
    (tmp_path / "plain").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    before = tree(tmp_path)
    for name, words in (
        ("mine", "something else"),
        ("model.safetensors", "holds more than configs"),
        ("plain", "is a file"),
        ("folder.safetensors", "is a folder"),
    ):
        with pytest.raises(OutputError, match=words):
            write_base(base, tmp_path / name, overwrite=True)
    assert tree(tmp_path) == before


def test_a_failed_write_leaves_the_earlier_file(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(folders["sd1"])
    file = tmp_path / "file.safetensors"
    write_base(base, file)
    content, before = file.read_bytes(), tree(tmp_path)
    for taken in (file, tmp_path / "folder.safetensors"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match=r"exists already: pass --overwrite"):
            write_base(base, taken)
    (tmp_path / "folder").rmdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single_file_writing, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_base(base, file, overwrite=True)
    assert file.read_bytes() == content
    assert tree(tmp_path) == before
    monkeypatch.undo()
    write_base(base, file, overwrite=True)


def test_the_command_bakes_and_takes_out_again(folders: dict[str, Path], tmp_path: Path) -> None:
    base = load(folders["sd1"])
    path = tmp_path / "a.safetensors"
    write_adapter(path, synthetic_adapter(base, rank=2), sidecars=False)
    words = ["merge", f"{path}=0.8", "--base", folders["sd1"], "--output-base", tmp_path / "baked"]
    result = run(*words, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert "sd1 with 1 adapter inside" in result.stdout
    assert_refused(run(*words), 1, "baked exists already", "--overwrite")
    lora.merge_into(base.pipeline, path, 0.8)
    assert_same(state(load(tmp_path / "baked")), state(base), 1e-6)
    result = run(
        *("merge", f"{path}=-0.8", "--base", tmp_path / "baked", "--dtype", "float32"),
        *("--output-base", tmp_path / "plain.safetensors"),
    )
    assert result.exit_code == 0, result.stderr
    assert f"Keep {tmp_path / 'plain'} beside it" in result.stdout
    assert_same(state(load(tmp_path / "plain.safetensors")), state(load(folders["sd1"])), 1e-6)


def test_nothing_of_the_users_is_replaced(folders: dict[str, Path], tmp_path: Path) -> None:
    base = load(folders["sd1"])
    adapter = tmp_path / "dog.safetensors"
    write_adapter(adapter, synthetic_adapter(base))
    (tmp_path / "mug").mkdir()
    (tmp_path / "mug" / "00.txt").write_text("a caption")
    write_base(base, tmp_path / "model")
    (tmp_path / "model" / "photos").mkdir()
    before = adapter.read_bytes()
    merge = ("merge", adapter, "--base", folders["sd1"], "--overwrite", "--output-base")
    assert_refused(run(*merge, adapter), 1, "dog.safetensors is no checkpoint")
    assert_refused(run(*merge, tmp_path / "mug.safetensors"), 1, "mug holds more than configs")
    assert_refused(run(*merge, tmp_path / "model"), 1, "model holds photos, which is no part of a model")
    assert adapter.read_bytes() == before
    assert (tmp_path / "mug" / "00.txt").exists()
    assert (tmp_path / "model" / "photos").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["a.safetensors", "--base", "gone"], "gone: no such file or folder"),
        (["broken.safetensors", "--base", "base"], "broken.safetensors"),
        (["xl.safetensors", "--base", "base"], "family"),
    ],
)
def test_refusals(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["sd1"], "base")
    write_adapter("a.safetensors", synthetic_adapter(load(folders["sd1"]), rank=2), sidecars=False)
    write_adapter("xl.safetensors", synthetic_adapter(load(folders["sdxl"]), rank=2), sidecars=False)
    Path("broken.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:-1])
    before = tree(tmp_path)
    assert_refused(run("merge", *words, "--output-base", "out"), 1, part)
    assert tree(tmp_path) == before
