"""What is shared with an adapter tells nothing of where and in which files its photographs lay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_runs import draw_quickly, tiny_config, write_photographs

from dbadapter import formats
from dbadapter.training import train


def test_no_path_and_no_name_of_a_photograph(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_quickly(monkeypatch)
    home = tmp_path / "home-of-jane"
    home.mkdir()
    photographs = write_photographs(home / "jane-2024")
    for index, path in enumerate(sorted(photographs.iterdir())):
        path.rename(path.with_name(f"passport-{index}.png"))
    base = home / "base"
    base.symlink_to(tiny_base_folder)
    config = tiny_config(photographs, home / "out" / "mug", base, max_train_steps=1, checkpointing_steps=0)
    result = train(config)
    formats.convert(result.adapter_path, "diffusers", tmp_path / "d.safetensors")
    formats.convert(result.adapter_path, "peft", tmp_path / "peft")
    shared = [result.adapter_path, *(result.adapter_path.with_suffix(s) for s in (".json", ".png"))]
    shared += [tmp_path / "d.safetensors", *(p for p in (tmp_path / "peft").rglob("*") if p.is_file())]
    assert len(shared) == 8
    words = ("jane", "passport", str(tmp_path), str(tiny_base_folder), os.path.expanduser("~/"))  # noqa: PTH111
    for path in shared:
        content = path.read_bytes()
        assert not [word for word in words if word.encode() in content], path
