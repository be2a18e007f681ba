"""What other programs do with an adapter's file: loaded, in part, ignored or refused, by rules kept as data.

The rules (`tool_rules.toml`) speak of tensors' names, shapes and metadata only, so no weight is read. Each
tool has its version, and where the rule rests: a run of its own code on such names, or the source read.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from dbadapter.file_layout import Entry

__all__ = ["FAMILIES", "AdapterFile", "Outcome", "outcomes", "tools"]

# The bases that the rules speak of; toybox is a small SD1.
FAMILIES = ("sd1", "sd2", "sdxl")

_SELECTORS = ("layout", "prefix", "component", "kind", "layer", "names", "algorithm", "part")


@dataclass(frozen=True)
class AdapterFile:
    """What the rules look at.

    Attributes:
        entries: of all tensors, in the file's order.
        shapes: tensor's name -> shape.
        metadata: the header's.
        family: "sd1", "sd2" or "sdxl".
        alphas: tensor's name -> value of alpha.
        peft_scale: alpha / rank differs from 1 by what the header says in PEFT's form.
    """

    entries: Sequence[Entry]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    family: str
    alphas: Mapping[str, float]
    peft_scale: bool = False

    def algorithms(self) -> dict[str, str]:
        """Return layer's name in the file -> the algorithm that its tensors belong to; "dora" wins."""
        found: dict[str, str] = {}
        for entry in self.entries:
            if entry.algorithm and found.get(entry.module) != "dora":
                found[entry.module] = entry.algorithm
        return found


@dataclass(frozen=True)
class Outcome:
    """What one tool does with the file.

    Attributes:
        tool, version: e.g. "ComfyUI", "0.3.64".
        result: "loaded", "partly", "ignored", "refused" or "unknown".
        loaded, present: numbers of tensors.
        reason: why not all is loaded, or what else to know; "" if all is well.
        basis: "run", "source" or "not run".
        source: file and line that it rests on.
    """

    tool: str
    version: str
    result: str
    loaded: int
    present: int
    reason: str
    basis: str
    source: str


@cache
def tools() -> tuple[dict[str, Any], ...]:
    """Return the rules, one table a tool, in the order of the file."""
    text = files("dbadapter").joinpath("tool_rules.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text)["tool"])


def outcomes(file: AdapterFile) -> list[Outcome]:
    """Return a row for every tool."""
    return [_outcome(tool, file) for tool in tools()]


def _outcome(tool: Mapping[str, Any], file: AdapterFile) -> Outcome:
    present = len(file.entries)
    groups = file.algorithms()
    reasons: Counter[tuple[str, str]] = Counter()
    loaded = 0
    refused: tuple[str, str] | None = None
    rules = [r for r in tool.get("tensor", ()) if "when" not in r or _CONDITIONS[r["when"]](file, 0)]
    for entry in file.entries:
        rule = _rule_for(rules, entry, groups.get(entry.module, ""), file.family)
        if rule["result"] == "loaded":
            loaded += 1
        elif rule["result"] == "refused" and refused is None:
            refused = _why(rule)
        if rule.get("reason"):
            reasons[_why(rule)] += 1
    notes: list[tuple[str, str]] = []
    wrong = False
    for rule in tool.get("file", ()):
        if file.family not in rule.get("family", FAMILIES):
            continue
        if _CONDITIONS[rule["when"]](file, present - loaded):
            if rule["result"] == "refused":
                refused = refused or _why(rule)
            elif rule["result"] == "ignored":
                loaded, reasons = 0, Counter({_why(rule): present})
            else:
                notes.append(_why(rule))
                wrong = wrong or rule["result"] == "wrong"
    if refused is not None:
        return _row(tool, "refused", 0, present, [refused])
    why = [(f"{count} of {present} tensors: {reason}", source) for (reason, source), count in reasons.items()]
    whole = loaded == present and not wrong and not why
    result = "loaded" if whole else "partly" if loaded else "ignored"
    return _row(tool, result, loaded, present, why + notes)


def _row(
    tool: Mapping[str, Any], result: str, loaded: int, present: int, why: Sequence[tuple[str, str]]
) -> Outcome:
    source = "; ".join(dict.fromkeys(source for _, source in why)) or tool["source"]
    reason = "; ".join(reason for reason, _ in why)
    return Outcome(tool["name"], tool["version"], result, loaded, present, reason, tool["basis"], source)


def _why(rule: Mapping[str, Any]) -> tuple[str, str]:
    return rule.get("reason", ""), rule["source"]


_NO_LAYER = {"result": "ignored", "reason": "no layer of such a base", "source": "dbadapter/file_layout.py"}
_LOADED = {"result": "loaded"}


def _rule_for(
    rules: Sequence[Mapping[str, Any]], entry: Entry, algorithm: str, family: str
) -> Mapping[str, Any]:
    """Return the first rule that fits the tensor."""
    own = {name: getattr(entry, name) for name in _SELECTORS} | {"algorithm": algorithm, "family": family}
    for rule in rules:
        if all(own[name] in rule[name] for name in own if name in rule):
            return rule
    missing = entry.layer is None or (entry.component == "text_encoder_2" and family != "sdxl")
    return _NO_LAYER if missing else _LOADED


def _kohya(file: AdapterFile) -> bool:
    return all(entry.prefix.startswith("lora_") for entry in file.entries)


def _mixed_unet_names(file: AdapterFile, missed: int) -> bool:
    return {"ldm", "diffusers"} <= {entry.names for entry in file.entries}


def _more_than_12_missed(file: AdapterFile, missed: int) -> bool:
    return missed > 12


def _kohya_and_peft_metadata(file: AdapterFile, missed: int) -> bool:
    return _kohya(file) and bool(file.alphas) and "lora_adapter_metadata" in file.metadata


def _kohya_and_others(file: AdapterFile, missed: int) -> bool:
    """Some keys in kohya's layout, but not all; diffusers converts only where all are."""
    kohya = [entry.prefix.startswith("lora_") for entry in file.entries]
    return any(kohya) and not all(kohya)


def _no_word_lora(file: AdapterFile, missed: int) -> bool:
    return not _kohya(file) and any("lora" not in entry.key for entry in file.entries)


def _text_encoder_without_out_proj(file: AdapterFile, missed: int) -> bool:
    """A kohya file's text encoder has attention layers, and neither an out_proj nor an MLP among them."""
    return _lacks_out_proj(file, mlp=False)


def _text_encoder_with_mlp_only(file: AdapterFile, missed: int) -> bool:
    return _lacks_out_proj(file, mlp=True)


def _lacks_out_proj(file: AdapterFile, *, mlp: bool) -> bool:
    if not _kohya(file):
        return False
    for component in ("text_encoder", "text_encoder_2"):
        layers = [e.layer or "" for e in file.entries if e.component == component]
        has_mlp = any(layer.endswith((".fc1", ".fc2")) for layer in layers)
        if layers and has_mlp == mlp and not any(layer.endswith(".out_proj") for layer in layers):
            return True
    return False


def _lora_A_first(file: AdapterFile, missed: int) -> bool:  # noqa: N802 (PEFT's name)
    """The UNet's first key is spelled as PEFT does, and others as diffusers' script does."""
    layouts = [entry.layout for entry in file.entries if entry.prefix == "unet."]
    return layouts[:1] == ["raw-peft"] and "diffusers" in layouts


def _only_ldm_blocks(file: AdapterFile, missed: int) -> bool:
    """Every layer of SD1's or SD2's UNet is in a block and has its LDM name."""
    unet = [entry for entry in file.entries if entry.component == "unet"]
    outside = ("conv in and out", "time embedding", "add embedding")
    ldm = all(entry.names == "ldm" and entry.kind not in outside for entry in unet)
    return bool(unet) and ldm and file.family != "sdxl"


def _no_conventional_base(file: AdapterFile, missed: int) -> bool:
    return _invoke_base(file) == ""


def _other_base(file: AdapterFile, missed: int) -> bool:
    return _invoke_base(file) not in ("", file.family)


def _invoke_base(file: AdapterFile) -> str:
    """Return the base that InvokeAI takes the file for, "" for none: the first key that tells decides.

    Its way (model_manager/util/model_util.py, `lora_token_vector_length`), in our words: the input width of a
    cross-attention key or value or of a time embedding, or the width of the text encoders.
    """
    widths: dict[str, int | None] = {}
    for entry in file.entries:
        unet = entry.prefix == "lora_unet_"
        cross = entry.module.endswith(("_attn2_to_k", "_attn2_to_v"))
        time = entry.module.endswith("time_emb_proj") and entry.part == "down"
        if unet and (cross or time) and (width := _input_width(entry, file.shapes)):
            return _base_of_width(width)
        if entry.prefix.startswith("lora_te") and "_self_attn_" in entry.module:
            # Every key counts, also those that tell no width.
            widths[entry.prefix] = _input_width(entry, file.shapes)
            one, two = widths.get("lora_te1_"), widths.get("lora_te2_")
            width = widths.get("lora_te_") or (one + two if one and two else None)
            if width:
                return _base_of_width(width)
    deep = any(
        e.prefix == "lora_unet_" and (e.layer or "").partition("transformer_blocks.")[2].split(".")[0] > "1"
        for e in file.entries
    )
    return "sdxl" if deep else ""


def _input_width(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    shape = shapes[entry.key]
    if len(shape) < 2:
        return None
    if entry.part in ("down", "w1_b", "w2_b", "diff") and entry.algorithm != "lokr":
        return shape[1]
    if entry.algorithm == "lokr":
        both = [shapes.get(f"{entry.module}.lokr_{part}") for part in ("w1", "w2")]
        return both[0][1] * both[1][1] if both[0] and both[1] else None
    return None


def _base_of_width(width: int) -> str:
    return {768: "sd1", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}.get(width, "")


def _unet_alphas_differ(file: AdapterFile, missed: int) -> bool:
    scales = {
        file.alphas[entry.key]
        for entry in file.entries
        if entry.kind == "attention" and entry.part == "alpha" and entry.key in file.alphas
    }
    return len(scales) > 1


def _alpha_only_in_header(file: AdapterFile, missed: int) -> bool:
    return file.peft_scale


def _stated_family(file: AdapterFile) -> str:
    """Return the family that AUTOMATIC1111 reads from the metadata, "" without any (network.py)."""
    if file.metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    if file.metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if file.metadata else ""


def _hidden(file: AdapterFile, missed: int) -> bool:
    return _stated_family(file) not in ("", file.family)


_CONDITIONS: dict[str, Callable[[AdapterFile, int], bool]] = {
    "alpha only in the header": _alpha_only_in_header,
    "alphas of UNet attention differ": _unet_alphas_differ,
    "kohya and other layouts mixed": _kohya_and_others,
    "kohya with lora_adapter_metadata": _kohya_and_peft_metadata,
    "metadata of another family": _hidden,
    "more than 12 tensors missed": _more_than_12_missed,
    "names without lora": _no_word_lora,
    "no base told by keys": _no_conventional_base,
    "taken for another base": _other_base,
    "text encoder with an MLP and no out_proj": _text_encoder_with_mlp_only,
    "text encoder without out_proj": _text_encoder_without_out_proj,
    "UNet names mixed": _mixed_unet_names,
    "UNet only in LDM's blocks": _only_ldm_blocks,
    "UNet spelled in two ways, lora_A first": _lora_A_first,
}
