"""The merging benchmark's own parts: PEFT on weights that are not there, errors, ratios, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import merging, merging_peer
from dbadapter.adapter_file import read_adapter
from dbadapter.merging import merge, write_merged


@pytest.mark.parametrize("rank", [0, 16])
def test_both_sides_merge_the_same(tmp_path: Path, rank: int) -> None:
    settings = {"family": "toybox", "config": merging.unet_config("toybox"), "rank": rank}
    settings |= merging.write_adapters("toybox", tmp_path)
    found = {}
    for task in ("merge-ours", "merge-theirs"):
        output = tmp_path / f"{task}.safetensors"
        with torch.no_grad():
            seconds = merging_peer.TASKS[task](settings | {"output": str(output)})
        assert set(seconds) == {"read", "merge", "write"}
        found[task] = merging.error_of(output, settings)
    assert found["merge-ours"] == pytest.approx(found["merge-theirs"], rel=0.2)
    assert found["merge-ours"] < (0.9 if rank else 1e-3)


def test_the_error_of_a_file_is_measured(tmp_path: Path) -> None:
    settings = {"family": "toybox", **merging.write_adapters("toybox", tmp_path)}
    files = [about["file"] for about in settings["ours"].values()]
    write_merged(tmp_path / "half.safetensors", merge({files[0]: 0.35, files[1]: 0.25}))
    assert merging.error_of(tmp_path / "half.safetensors", settings) == pytest.approx(0.5, rel=1e-2)


def test_weights_of_the_hollow_unet_take_no_memory() -> None:
    unet = merging_peer.hollow_unet(merging.unet_config("sdxl"))
    assert sum(p.numel() for p in unet.parameters()) > 2e9
    assert {p.untyped_storage().nbytes() for p in unet.parameters()} == {4}


def test_adapters_are_of_the_true_size() -> None:
    adapter = merging.random_adapter("sd1", 16, 8.0, seed=0)
    assert len(adapter.modules) == 128
    assert sum(w.lora_A.numel() + w.lora_B.numel() for w in adapter.modules.values()) == 199_296 * 16
    assert {w.alpha for w in adapter.modules.values()} == {8.0}


def test_the_summary_is_the_median_and_ratios_are_theirs_to_ours() -> None:
    def one(seconds: float) -> dict[str, object]:
        return {"seconds": {"merge": seconds, "all": 2 * seconds}, "peak_memory_mb": 10 * seconds}

    theirs, ours = (merging.summary([one(s) for s in each]) for each in ((6.0, 4.0, 20.0), (2.0, 3.0, 1.0)))
    assert theirs["seconds"] == {"merge": 6.0, "all": 12.0}
    assert theirs["seconds_all"] == [12.0, 8.0, 40.0]
    sides = {"theirs": theirs, "ours": ours}
    assert merging.ratio(sides, lambda side: side["peak_memory_mb"]) == 3.0


def test_unknown_families_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(merging.main, ["--families", "sd9", "--work-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "unknown families sd9" in result.output
    assert not list(tmp_path.iterdir())


def test_a_task_that_fails_says_why(tmp_path: Path) -> None:
    import click

    with pytest.raises(click.ClickException, match="no-such-task failed"):
        merging.run("no-such-task", {}, tmp_path, 1)


def test_the_files_of_both_sides_hold_the_same(tmp_path: Path) -> None:
    settings = merging.write_adapters("toybox", tmp_path)
    for name in merging.ADAPTERS:
        ours = read_adapter(settings["ours"][name]["file"])
        theirs = merging_peer.peft_state(Path(settings["peft"][name]["file"]))
        for module, weights in ours.modules.items():
            key = f"base_model.model.{module.removeprefix('unet.')}.lora_B.weight"
            assert torch.equal(theirs[key], weights.lora_B.float())
