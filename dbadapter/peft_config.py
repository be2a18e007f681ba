"""PEFT's configuration: alpha of a file's layers, from a header or a folder, and the same written.

    scaling = lora_alpha / r, with one's own of `alpha_pattern` and `rank_pattern` where a name matches

diffusers puts the configuration of every model into the header's `lora_adapter_metadata`, each key with the
model's name in front; PEFT puts it beside the weights (peft, `LoraConfig`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbadapter import keys
from dbadapter.errors import AdapterError
from dbadapter.safetensors_header import parse_json

if TYPE_CHECKING:  # it brings torch, which `inspect` does without
    from dbadapter.adapter import LoraWeights

__all__ = ["PeftAlphas", "check_plain", "header_config", "lora_config", "read_config"]

HEADER_KEY = "lora_adapter_metadata"
_MAX_CONFIG_BYTES = 4 * 2**20  # SDXL with a pattern for every layer takes 150 kB
_COUNT = 20_000  # patterns at most; SDXL has 800 layers

# True or not empty, each makes factors mean something else, or leaves out a part of what was trained.
_VARIANTS = (
    "use_dora",
    "use_rslora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# These change the base's own weights too, so the factors alone are not what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftAlphas:
    """alpha of layers by PEFT's rules: the first pattern that matches, else `lora_alpha`, else the rank."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        """Check a configuration.

        Args:
            fields: `{component}.{name of a field}` -> value; other keys are passed over.
            where: it was found, for messages.
        Raises:
            AdapterError: a variant that plain factors cannot express, or an alpha that is no number.
        """
        self._where = where
        self._common: dict[str, float] = {}
        self._patterns: dict[str, dict[str, tuple[int, float]]] = {}
        for component in keys.COMPONENTS:
            own = {
                key.removeprefix(f"{component}."): value
                for key, value in fields.items()
                if key.startswith(f"{component}.")
            }
            check_plain(own, where)
            if own.get("lora_alpha") is not None:
                self._common[component] = _number(own["lora_alpha"], "lora_alpha", where)
            self._patterns[component] = self._literals(own.get("alpha_pattern"))

    @classmethod
    def of_header(cls, metadata: Mapping[str, str]) -> PeftAlphas:
        """Return what a file in diffusers' format says; without it every alpha is the rank."""
        where = f"the header's {HEADER_KEY}"
        text = metadata.get(HEADER_KEY)
        if text is None:
            return cls({}, where)
        try:
            fields = parse_json(text.encode("utf-8", "replace"))
        except AdapterError as error:
            raise AdapterError(f"{where} is no JSON ({error}): alpha cannot be known") from None
        if not isinstance(fields, dict):
            raise AdapterError(f"{where} must be a JSON object: alpha cannot be known")
        return cls(fields, where)

    def of(self, module: str, rank: int) -> float:
        """Return alpha of a layer.

        Args:
            module: its canonical name.
            rank: is alpha where nothing is said.
        """
        component, _, path = module.partition(".")
        patterns = self._patterns[component]
        found: list[tuple[int, float]] = []
        while patterns and path:  # a pattern matches the end of a name, from the beginning of a word
            if path in patterns:
                found.append(patterns[path])
            path = path.partition(".")[2]
        return min(found)[1] if found else self._common.get(component, float(rank))

    def _literals(self, patterns: Any) -> dict[str, tuple[int, float]]:
        """Return name -> (place, alpha); PEFT's patterns are regular expressions, files hold names."""
        if not patterns:
            return {}
        if not isinstance(patterns, dict) or len(patterns) > _COUNT:
            raise AdapterError(f"alpha_pattern in {self._where} must be a JSON object of names")
        found: dict[str, tuple[int, float]] = {}
        for place, (pattern, value) in enumerate(patterns.items()):
            name = re.sub(r"\\([.\-_])|\[\.\]", lambda m: m.group(1) or ".", pattern.removeprefix("^"))
            name = name.removesuffix("$")
            if not re.fullmatch(r"[\w.\-]+", name):
                raise AdapterError(
                    f"alpha_pattern in {self._where} has {pattern[:40]!r}, which is no layer's name: "
                    "alpha cannot be known"
                )
            found.setdefault(name, (place, _number(value, pattern[:40], self._where)))
        return found


def read_config(path: Path) -> dict[str, Any]:
    """Return a folder's adapter_config.json.

    Raises:
        AdapterError: it is missing, too large, or no JSON object; the message names it.
    """
    if not path.is_file():
        state = "no regular file" if path.exists() else "missing"
        raise AdapterError(f"{path} is {state}, and alpha stands in it: get the folder again")
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterError(f"Cannot read {path}: {error.strerror or error}") from None
    if len(text) > _MAX_CONFIG_BYTES:
        raise AdapterError(
            f"{path} has more than {_MAX_CONFIG_BYTES} bytes, so it is no configuration of PEFT"
        )
    try:
        config = parse_json(text)
    except AdapterError as error:
        raise AdapterError(f"{path} cannot be read ({error}): get the folder again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object: get the folder again")
    return config


def check_plain(fields: Mapping[str, Any], where: str) -> None:
    """Pass if a configuration is that of a plain LoRA.

    Raises:
        AdapterError: it is not; the message names the field.
    """
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f"{where} says {str(kind)[:40]}; only plain LoRA is read: train it as one")
    for name in _VARIANTS:
        if fields.get(name):
            raise AdapterError(f"{where} uses {name}; only plain LoRA is read: train it without")
    if fields.get("bias", "none") != "none":
        raise AdapterError(f"{where} trains biases; only plain LoRA is read: train it with bias none")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{where} says init_lora_weights {start[:20]}, which changes the base too: save it with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def lora_config(layers: Mapping[str, LoraWeights], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return the fields of PEFT's LoraConfig that make it what it is, for the layers of one component.

    Args:
        layers: canonical name -> factors.
        alphas: canonical name -> alpha that the file needs.
    """
    component = keys.component_of(next(iter(layers)))
    names = {name: _name_in_model(name, component) for name in layers}
    rank = Counter(weights.rank for weights in layers.values()).most_common(1)[0][0]
    alpha = Counter(alphas[name] for name in layers).most_common(1)[0][0]
    # PEFT matches patterns at the end of a name; the caret pins a UNet's. Text encoders have `text_model.` in
    # front or not, by the version of transformers.
    caret = "^" if component == "unet" else ""
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {caret + names[n]: w.rank for n, w in layers.items() if w.rank != rank},
        "alpha_pattern": {caret + names[n]: _whole(alphas[n]) for n in layers if alphas[n] != alpha},
        "target_modules": sorted(names.values()),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
    }


def header_config(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the header's entry for diffusers, of component -> fields."""
    flat = {
        f"{component}.{key}": value for component, fields in configs.items() for key, value in fields.items()
    }
    return json.dumps(flat, sort_keys=True)


def _name_in_model(module: str, component: str) -> str:
    return module.removeprefix(f"{component}.").removeprefix("text_model.")


def _whole(alpha: float) -> float | int:
    # PEFT's own type is int; what is no whole number works as well.
    return int(alpha) if float(alpha).is_integer() else alpha


def _number(value: Any, key: str, where: str) -> float:
    # The comparison is false for NaN, and exact for integers too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise AdapterError(f"{key} in {where} must be a number, got {str(value)[:40]}")
    return float(value)
