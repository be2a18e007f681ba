"""The whole model's folder: the one before it is there until the new one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbadapter.base import Base
from dbadapter.errors import OutputError
from dbadapter.model_folder import write_model_folder


def test_the_earlier_folder_survives_a_failure_at_any_rename(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    write_model_folder(tiny_base.pipeline, folder)
    (folder / "mark").write_text("earlier")
    rename = Path.replace

    def fails(self: Path, target: Path) -> Path:
        if self.name == ".model.partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OutputError, match="No space left"):
        write_model_folder(tiny_base.pipeline, folder)
    assert (folder / "mark").read_text() == "earlier"
    monkeypatch.undo()
    write_model_folder(tiny_base.pipeline, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (folder / "mark").exists()
