"""DreamBooth adapters: one subject from a handful of photographs, as a small file that works everywhere.

`import dbadapter` is light: torch and its friends load when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbadapter import export as export
    from dbadapter import toybox as toybox
    from dbadapter.adapter_file import Adapter as Adapter
    from dbadapter.adapter_file import read_adapter as read_adapter
    from dbadapter.adapter_file import write_adapter as write_adapter
    from dbadapter.base import Base as Base
    from dbadapter.base import load_base as load_base
    from dbadapter.config import TrainConfig as TrainConfig
    from dbadapter.demo import run_demo as run_demo
    from dbadapter.errors import DbadapterError as DbadapterError
    from dbadapter.lora import apply as apply
    from dbadapter.lora import load_adapter as load_adapter
    from dbadapter.sampling import Picture as Picture
    from dbadapter.sampling import generate_pictures as generate_pictures
    from dbadapter.sampling import save_pictures as save_pictures
    from dbadapter.tokens import pick_identifier as pick_identifier
    from dbadapter.tokens import rare_tokens as rare_tokens
    from dbadapter.training import TrainResult as TrainResult
    from dbadapter.training import train as train

__version__ = "0.1.0"

# The public names and where they live; None marks a module itself.
_PUBLIC: dict[str, str | None] = {
    "Adapter": "adapter_file",
    "Base": "base",
    "DbadapterError": "errors",
    "Picture": "sampling",
    "TrainConfig": "config",
    "TrainResult": "training",
    "apply": "lora",
    "export": None,
    "generate_pictures": "sampling",
    "load_adapter": "lora",
    "load_base": "base",
    "pick_identifier": "tokens",
    "rare_tokens": "tokens",
    "read_adapter": "adapter_file",
    "run_demo": "demo",
    "save_pictures": "sampling",
    "toybox": None,
    "train": "training",
    "write_adapter": "adapter_file",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dbadapter' has no attribute {name!r}")
    home = _PUBLIC[name]
    if home is None:
        return importlib.import_module(f"dbadapter.{name}")
    value: object = getattr(importlib.import_module(f"dbadapter.{home}"), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
