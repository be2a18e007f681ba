"""What an adapter's file is, and what other programs will do with it; no weight is loaded for that.

The description is one JSON object; its fields are documented in `docs/inspect.md` and kept stable.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dbadapter import keys
from dbadapter.errors import AdapterError
from dbadapter.file_header import Checksums, Header, checksums, numbers, read_header
from dbadapter.file_layout import Entry, describe_keys
from dbadapter.peft_config import HEADER_KEY, PeftAlphas, read_config
from dbadapter.safetensors_header import parse_json
from dbadapter.tool_rules import FAMILIES, AdapterFile, Outcome, outcomes, tools

__all__ = ["SCHEMA", "inspect_file"]

SCHEMA = 1  # of the JSON; raised when a field goes or changes its meaning

# Width of the text embeddings that cross-attention reads.
_FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}

# Parts of keys -> families of other models; the first that fits counts.
_OTHER_FAMILIES = (
    ("single_transformer_blocks", "flux"),
    ("single_blocks", "flux"),
    ("double_blocks", "flux"),
    ("joint_blocks", "sd3"),
    ("transformer.transformer_blocks", "sd3"),
    ("lora_transformer_transformer_blocks", "sd3"),
    ("diffusion_model.layers", "z-image"),
)
_NAMES = {
    "kohya": "kohya",
    "diffusers": "diffusers' script",
    "raw-peft": "raw PEFT",
    "old-diffusers": "old diffusers",
    "peft-folder": "PEFT folder",
    "lycoris": "LyCORIS, diffusers' names",
    "embedding": "textual inversion",
    "checkpoint": "whole checkpoint",
}
_ALGORITHMS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}
_ALGORITHMS |= {"glora": "GLoRA", "ia3": "IA3", "norm": "norms", "diff": "full weight differences"}


@dataclass(frozen=True)
class _Contents:
    """One description of all the files: a PEFT folder has one a model."""

    headers: tuple[Header, ...]
    entries: tuple[Entry, ...]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    alphas: Mapping[str, float]


def inspect_file(path: Path) -> dict[str, Any]:
    """Return the description of an adapter's file, or of a PEFT folder; see `docs/inspect.md`.

    Foreign files (LoHa, Flux, checkpoints, textual inversions ...) are described too.

    Raises:
        AdapterError: no safetensors file, broken, or with values that are not finite; one line.
    """
    contents = _read(path)
    sums = [checksums(header) for header in contents.headers]
    kind, form = _format(contents)
    base = _base(contents)
    ranks, alphas = _ranks(contents)
    return {
        "schema": SCHEMA,
        "file": str(path),
        "size": sum(header.size for header in contents.headers),
        "kind": kind,
        "format": form,
        "algorithms": _algorithms(contents),
        "base": base,
        "tensors": len(contents.entries),
        "dtypes": dict(Counter(t.dtype for h in contents.headers for t in h.tensors.values())),
        "rank": ranks,
        "alpha": alphas,
        "layers": _layers(contents),
        "trigger": _trigger(contents.metadata),
        "training": _training(contents.metadata),
        "hashes": _hashes(contents, sums),
        "thumbnail": contents.metadata.get("modelspec.thumbnail", "").startswith("data:image/"),
        "tools": [asdict(row) for row in _tools(contents, kind, base["family"])],
    }


def _read(path: Path) -> _Contents:
    if not path.is_dir():
        header = read_header(path)
        entries = describe_keys(header.tensors, _layers_per_block(header.metadata))
        alphas = numbers(header, [e.key for e in entries if e.part == "alpha"])
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        fields = _header_fields(header.metadata)
        if fields:
            where = f"{path}: the header's {HEADER_KEY}"
            entries, said = _with_alphas(entries, shapes, fields, where)
            alphas |= said
        return _Contents((header,), tuple(entries), shapes, header.metadata, alphas)
    parts = {part: path / part for part in keys.COMPONENTS if (path / part / _PEFT_FILE).is_file()}
    if (path / _PEFT_FILE).is_file():
        parts = {"": path}
    if not parts:
        raise AdapterError(f"{path} is a folder without {_PEFT_FILE}: give an adapter's file or PEFT folder")
    found = [_read_peft(folder, component) for component, folder in parts.items()]
    return _Contents(
        tuple(header for part in found for header in part.headers),
        tuple(entry for part in found for entry in part.entries),
        {name: shape for part in found for name, shape in part.shapes.items()},
        found[0].metadata,
        {name: alpha for part in found for name, alpha in part.alphas.items()},
    )


_PEFT_FILE = "adapter_model.safetensors"


def _read_peft(folder: Path, component: str) -> _Contents:
    """Read one folder of PEFT; a second one's equal names get the component in front.

    A text encoder's layer that stands there under both its names (`keys.to_peft`) counts once.
    """
    header = read_header(folder / _PEFT_FILE)
    config = read_config(folder / "adapter_config.json")
    start = f"{keys.PEFT_PREFIX}text_model."
    twins = {keys.PEFT_PREFIX + key.removeprefix(start) for key in header.tensors if key.startswith(start)}
    entries = describe_keys([key for key in header.tensors if key not in twins])
    if component:
        entries = [
            replace(e, key=f"{component}:{e.key}", module=f"{component}:{e.module}", component=component)
            for e in entries
        ]
    shapes = {e.key: header.tensors[e.key.partition(":")[2] or e.key].shape for e in entries}
    own = component or next((e.component for e in entries if e.component), "unet")
    fields = {f"{own}.{key}": value for key, value in config.items()}
    entries, alphas = _with_alphas(entries, shapes, fields, str(folder / "adapter_config.json"))
    return _Contents((header,), tuple(entries), shapes, header.metadata, alphas)


def _with_alphas(
    entries: list[Entry], shapes: Mapping[str, tuple[int, ...]], fields: dict[str, Any], where: str
) -> tuple[list[Entry], dict[str, float]]:
    """Return the entries, those of DoRA marked, and alpha by lora_A's key, as PEFT's configuration says.

    Raises:
        AdapterError: a configuration that means neither plain LoRA nor DoRA.
    """
    dora = {key.partition(".")[0] for key in fields if key.endswith(".use_dora") and fields[key] is True}
    plain = {key: value for key, value in fields.items() if not key.endswith(".use_dora")}
    alphas = PeftAlphas(plain, where)
    marked = [
        replace(e, algorithm="dora") if e.component in dora and e.algorithm == "lora" else e for e in entries
    ]
    said = {key.partition(".")[0] for key in plain}
    found = {
        e.key: alphas.of(e.layer, shapes[e.key][0])
        for e in entries
        if e.part == "down" and e.layer is not None and e.component in said
    }
    return marked, found


def _header_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's configuration in the header of a file in diffusers' format; none if it is broken."""
    try:
        fields = parse_json(metadata.get(HEADER_KEY, "{}").encode("utf-8", "replace"))
    except AdapterError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _layers_per_block(metadata: Mapping[str, str]) -> int:
    text = metadata.get("dbadapter.layers_per_block", "")
    return int(text) if text in map(str, range(1, 9)) else keys.LAYERS_PER_BLOCK


def _format(contents: _Contents) -> tuple[str, str]:
    """Return (kind, format): what the file is, and the layout of its keys."""
    layouts = Counter(entry.layout for entry in contents.entries)
    if layouts["checkpoint"]:
        return "checkpoint", _NAMES["checkpoint"]
    names = {entry.key for entry in contents.entries}
    if names & {"emb_params", "string_to_param.*", "clip_l", "clip_g", "<concept>"} and len(names) <= 3:
        return "textual-inversion", _NAMES["embedding"]
    adapter = [entry for entry in contents.entries if entry.part]
    if not adapter:
        if layouts["embedding"]:
            return "textual-inversion", _NAMES["embedding"]
        return "unknown", "unknown"
    known = [layout for layout in _NAMES if layouts[layout]]
    if "diffusers" in known and "raw-peft" in known:
        known.remove("raw-peft")  # its script writes both spellings
    form = " and ".join(_NAMES[layout] for layout in known) or "unknown"
    if known == ["kohya"] and _is_locon(contents):
        form = "LyCORIS LoCon (kohya's names)"
    return "adapter", form


def _is_locon(contents: _Contents) -> bool:
    """LoRA of 3x3 convolutions too, by LyCORIS' own module, or with its Tucker core."""
    lycoris = contents.metadata.get("ss_network_module", "").startswith("lycoris")
    convolutions = any(e.part == "mid" or contents.shapes[e.key][2:] > (1, 1) for e in contents.entries)
    plain = {e.algorithm for e in contents.entries} <= {"lora", ""}
    return plain and convolutions and (lycoris or any(e.part == "mid" for e in contents.entries))


def _algorithms(contents: _Contents) -> list[str]:
    found = {entry.algorithm for entry in contents.entries if entry.algorithm}
    if "dora" in found:
        found.discard("lora")
    return [name for key, name in _ALGORITHMS.items() if key in found]


def _base(contents: _Contents) -> dict[str, Any]:
    """Return the family of base and how it was decided: header first, then shapes and names."""
    metadata, names = contents.metadata, [entry.key for entry in contents.entries]
    stated: list[tuple[str, str]] = []
    for key in ("dbadapter.family", "ss_base_model_version", "modelspec.architecture"):
        if family := _stated(metadata.get(key, "")):
            stated.append((family, f"the header's {key} is {metadata[key]}"))
    told = _told_by_shapes(contents, names)
    family, evidence = (stated or told or [("unknown", "neither header nor shapes tell")])[0]
    conflicts = [
        f"{why}, which is {other}"
        for other, why in [*stated[1:], *told]
        if other != family and {other, family} != {"toybox", "sd1"}
    ]
    if family == "toybox":
        conflicts = [c for c in conflicts if "wide" not in c]
    return {"family": family, "evidence": evidence, "conflicts": conflicts}


def _stated(text: str) -> str:
    low = text.lower()
    for beginning, family in (
        ("toybox", "toybox"),
        ("sdxl", "sdxl"),
        ("sd_v2", "sd2"),
        ("sd_v1", "sd1"),
        ("sd1", "sd1"),
        ("sd2", "sd2"),
        ("stable-diffusion-xl", "sdxl"),
        ("stable-diffusion-v2", "sd2"),
        ("stable-diffusion-v1", "sd1"),
        ("stable-diffusion-3", "sd3"),
        ("sd3", "sd3"),
        ("flux", "flux"),
    ):
        if low.startswith(beginning):
            return family
    return ""


def _told_by_shapes(contents: _Contents, names: Sequence[str]) -> list[tuple[str, str]]:
    for mark, family in _OTHER_FAMILIES:
        if example := next((name for name in names if mark in name.replace("transformer_lora", "")), None):
            return [(family, f"its layers are {family}'s, e.g. {example}")]
    for entry in contents.entries:
        shape = contents.shapes[entry.key]
        cross = (entry.layer or "").endswith((".attn2.to_k", ".attn2.to_v"))
        told = cross and entry.part in ("down", "w1_b", "diff") and shape[1:2]
        if told and (family := _FAMILY_OF_WIDTH.get(told[0], "")):
            return [(family, f"its cross-attention is {told[0]} wide")]
    if any(entry.component == "text_encoder_2" for entry in contents.entries):
        return [("sdxl", "it has layers of a second text encoder")]
    for entry in contents.entries:
        shape = contents.shapes[entry.key]
        if entry.kind == "text attention" and entry.part == "down" and shape[1:] in ((768,), (1024,)):
            return [(_FAMILY_OF_WIDTH[shape[1]], f"its text encoder is {shape[1]} wide")]
    return []


def _ranks(contents: _Contents) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return rank and alpha: the commonest, how many layers have which, and where others are."""
    ranks: dict[str, float] = {}
    scales: dict[str, float] = {}
    for entry in contents.entries:
        shape = contents.shapes[entry.key]
        if entry.part in ("down", "w1_b") and len(shape) > 1:
            ranks[entry.module] = shape[0]
        if entry.key in contents.alphas:
            scales[entry.module] = contents.alphas[entry.key]
    return _spread(ranks), _spread(scales)


def _spread(values: Mapping[str, float]) -> dict[str, Any]:
    counts = Counter(values.values())
    common = counts.most_common(1)[0][0] if counts else None
    others = {
        f"{value:g}": next(name for name, own in values.items() if own == value)
        for value in sorted(counts)
        if value != common
    }
    return {
        "common": common,
        "counts": {f"{value:g}": counts[value] for value in sorted(counts)},
        "examples_of_others": others,
    }


def _layers(contents: _Contents) -> dict[str, Any]:
    """Return component -> kind of layer -> how many."""
    seen: dict[str, tuple[str, str]] = {}
    for entry in contents.entries:
        if entry.part:
            seen[entry.module] = (entry.component or "other", entry.kind)
    found: dict[str, Counter[str]] = {}
    for component, kind in seen.values():
        found.setdefault(component, Counter())[kind] += 1
    return {component: dict(sorted(kinds.items())) for component, kinds in sorted(found.items())}


def _trigger(metadata: Mapping[str, str]) -> list[str]:
    """Return the words that call the subject: ModelSpec's phrase, else the commonest training tags."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return [phrase]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        tags: Counter[str] = Counter()
        for counts in folders.values():
            tags.update({str(tag): int(count) for tag, count in counts.items()})
    except (ValueError, RecursionError, TypeError, AttributeError, OverflowError):
        return []
    return [tag for tag, _ in tags.most_common(5)]


def _training(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that the header tells, except long lists, hashes and pictures."""
    left_out = ("ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info", "ss_datasets")
    return {
        key: value if len(value) <= 200 else value[:197] + "..."
        for key, value in sorted(metadata.items())
        if key.startswith(("ss_", "dbadapter.", "modelspec."))
        and key not in left_out
        and key not in ("modelspec.thumbnail", "modelspec.hash_sha256")
    }


def _hashes(contents: _Contents, sums: Sequence[Checksums]) -> dict[str, Any]:
    """Return the hashes, computed anew, and whether those stored in the header agree: true, false or null."""
    own, metadata = sums[0], contents.metadata
    stored = {
        "sshs_model_hash": own.tensors,
        "modelspec.hash_sha256": f"0x{own.tensors}",
        "sshs_legacy_hash": own.legacy,
    }
    agree = {key: metadata[key] == value if key in metadata else None for key, value in stored.items()}
    return {
        "file_sha256": own.file,
        "tensors_sha256": own.tensors,
        "legacy": own.legacy,
        "stored_agree": agree,
    }


_NOTES = {
    "unknown": "the base is not known, taken for SD1.x",
    "toybox": "told by SD1's names; toybox itself is a base for dbadapter and diffusers",
}


def _tools(contents: _Contents, kind: str, family: str) -> list[Outcome]:
    present = len(contents.entries)
    stated, family = family, "sd1" if family == "toybox" else family

    def all_of_them(result: str, reason: str) -> list[Outcome]:
        return [
            Outcome(tool["name"], tool["version"], result, 0, present, reason, "not run", "")
            for tool in tools()
        ]

    if kind == "checkpoint":
        return all_of_them("refused", "a whole checkpoint is no adapter: load it as a base")
    if kind == "textual-inversion":
        return all_of_them("refused", "a textual inversion is no LoRA: put it among the embeddings")
    if kind == "unknown":
        return all_of_them("unknown", "no key is one of an adapter")
    if family not in (*FAMILIES, "unknown"):
        return all_of_them("unknown", f"the rules are for SD1.x, SD2.x and SDXL, not {family}")
    assumed = "sd1" if family == "unknown" else family
    rows = outcomes(
        AdapterFile(
            contents.entries,
            contents.shapes,
            contents.metadata,
            assumed,
            {
                e.key: contents.alphas[e.key]
                for e in contents.entries
                if e.part == "alpha" and e.key in contents.alphas
            },
            any(
                e.part == "down"
                and contents.alphas.get(e.key, contents.shapes[e.key][0]) != contents.shapes[e.key][0]
                for e in contents.entries
            ),
        )
    )
    note = _NOTES.get(stated, "")
    if not note:
        return rows
    return [replace(row, reason=f"{row.reason}; {note}" if row.reason else note) for row in rows]
