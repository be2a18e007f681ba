"""Coverage-guided fuzzing of what reads files: every outcome is an adapter or one AdapterError of one line.

    pip install --target /tmp/atheris atheris        (Linux; Python 3.11 to 3.13)
    PYTHONPATH=/tmp/atheris python tests/fuzz/fuzz_adapter.py CORPUS -max_total_time=600

CORPUS is a folder for what is found; it is filled with valid files first. A crash leaves `crash-*`:
mend what it shows and add it to tests/fuzz/corpus.txt (base64, one input a line), which test_cases.py reads.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import tempfile
from pathlib import Path

_INSTRUMENTED = (
    "adapter", "adapter_file", "adapter_kinds", "adapter_metadata", "adapter_parts", "folding", "keys",
    "ldm_names", "metadata_edit", "peft_config", "peft_folder", "safetensors_file", "safetensors_header",
)  # fmt: skip

MOST_DATA = 1 << 16  # bytes behind a header that says how many it needs

# The first byte of an input says what the rest is.
RAW, FRAMED, PEFT, EDIT, BUILT = range(5)
SPLIT = b"\n----\n"  # between adapter_config.json and the weights' header


def framed(text: bytes) -> bytes:
    """Return a file of which the rest is a header; length and amount of data fit it, where possible."""
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        size = max(0, min(MOST_DATA, max(ends))) if ends else 0
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        size = 8
    return struct.pack("<Q", len(text)) + text + bytes(int(size))


_LAYERS = (
    "lora_unet_down_blocks_1_attentions_0_proj_in",
    "lora_unet_input_blocks_4_1_proj_in",
    "lora_te1_text_model_x",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_unet_",
    "unet.mid_block.resnets.0.conv1",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
    "unet.",
    "down_blocks.0.to_q",
    "text_encoder_2.encoder.layers.0.mlp.fc2",
    "text_encoder.",
)
_PARTS = (
    ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".alpha",
    ".lora_A.weight", ".lora_B.weight", ".lora.down.weight", ".lora.up.weight",
    "_lora.down.weight", "_lora.up.weight", ".diff", ".dora_scale",
)  # fmt: skip
_ENTRIES = (
    "lora_adapter_metadata",
    "dbadapter.folded",
    "dbadapter.layers_per_block",
    "dbadapter.family",
    "ss_v2",
    "ss_base_model_version",
)
_TEXTS = (
    '{"unet.lora_alpha": %d, "unet.alpha_pattern": {"attn2.to_k": %d}}',
    '{"unet": {"alpha": %d, "dtype": "F%d"}}',
    '{"unet.mid_block.resnets.0.conv1": null, "unet": {"alpha": 0.%d, "dtype": "F16"}, "x%d": 1}',
    "%d%.0s", "sd_v%d%.0s", "sdxl%.0s%.0s", "[%d, %d]",
    '{"text_encoder.alpha_pattern": {"^a\\\\.b[.]c%d": %d}}',
)  # fmt: skip


def built(choices: bytes) -> bytes:
    """Return a file of well-formed entries that the input chooses, so that more than JSON is met."""
    given = iter(choices)

    def pick(count: int) -> int:
        return next(given, 0) % count

    header: dict[str, object] = {}
    end = 0
    for _ in range(pick(8)):
        name = _LAYERS[pick(len(_LAYERS))] + _PARTS[pick(len(_PARTS))]
        dtype, size = (("F16", 2), ("F32", 4), ("F64", 8), ("I64", 8), ("BF16", 2))[pick(5)]
        shape = [pick(4) for _ in range(pick(6))]
        begin, end = end, end + math.prod(shape) * size
        if name in header:
            end = begin
        else:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    texts = {
        _ENTRIES[pick(len(_ENTRIES))]: _TEXTS[pick(len(_TEXTS))] % (pick(256), pick(65))
        for _ in range(pick(4))
    }
    text = json.dumps(header | {"__metadata__": texts}).encode()
    data = bytes(given) or b"\0"
    return struct.pack("<Q", len(text)) + text + (data * (end // len(data) + 1))[:end]


def one_input(data: bytes, folder: Path) -> None:
    """Read one input.

    Raises:
        AssertionError: an error has more than one line.
        Exception: anything that is no error of dbadapter's.
    """
    from dbadapter.adapter_file import read_adapter
    from dbadapter.errors import DbadapterError
    from dbadapter.metadata_edit import edit_metadata

    kind, rest = (data[0] % 5, data[1:]) if data else (RAW, b"")
    path = folder / "a.safetensors"
    try:
        if kind == PEFT:
            config, _, text = rest.partition(SPLIT)
            (folder / "unet").mkdir(exist_ok=True)
            (folder / "unet" / "adapter_config.json").write_bytes(config)
            (folder / "unet" / "adapter_model.safetensors").write_bytes(framed(text))
            read_adapter(folder)
            return
        path.write_bytes(rest if kind == RAW else built(rest) if kind == BUILT else framed(rest))
        if kind == EDIT:
            edit_metadata(path, {"modelspec.author": "x"}, output=folder / "b.safetensors", overwrite=True)
            read_adapter(folder / "b.safetensors")
        else:
            read_adapter(path)
    except DbadapterError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"not one line: {error}") from error


def seeds() -> list[bytes]:
    """Return valid inputs of every kind, in each layout."""
    import torch

    from dbadapter import formats
    from dbadapter.adapter_file import Adapter, LoraWeights, write_adapter

    names = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (3, 2),
        "unet.down_blocks.1.attentions.0.proj_in": (3, 2),
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj": (2, 2),
    }
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in ("sd1", "sdxl"):
            layers = {n: LoraWeights(torch.ones(r, i), torch.ones(i, r), 1.5) for n, (i, r) in names.items()}
            adapter = Adapter(family, layers, {"modelspec.author": "A"})
            write_adapter(folder / f"{family}.safetensors", adapter, sidecars=False)
            formats.write_diffusers(folder / f"{family}-d.safetensors", adapter)
            formats.write_peft(folder / family, adapter)
            weights = (folder / family / "unet" / "adapter_model.safetensors").read_bytes()
            config = (folder / family / "unet" / "adapter_config.json").read_bytes()
            found.append(bytes([PEFT]) + config + SPLIT + _header(weights))
        for path in folder.glob("*.safetensors"):
            content = path.read_bytes()
            found += [bytes([RAW]) + content, *(bytes([k]) + _header(content) for k in (FRAMED, EDIT))]
    for layer in range(len(_LAYERS)):  # a whole layer of each name, linear and with a core
        for a, b, core in ((0, 1, False), (4, 5, False), (0, 1, True)):
            shapes = [[layer, a, 0, 4, 2, 3, 1, 1] if core else [layer, a, 0, 2, 2, 3]]
            shapes += [[layer, b, 1, 4, 3, 2, 1, 1] if core else [layer, b, 1, 2, 3, 2]]
            shapes += [[layer, 2, 0, 4, 2, 2, 3, 3]] if core else []
            for entry in range(len(_ENTRIES)):
                said = [1, entry, entry, 4, 16]
                found.append(bytes([BUILT, len(shapes), *(n for s in shapes for n in s), *said, 60, 1, 7]))
    return found


def _header(content: bytes) -> bytes:
    return content[8 : 8 + struct.unpack("<Q", content[:8])[0]]


def main() -> None:
    """Fuzz until libFuzzer's limits are reached."""
    import atheris

    with atheris.instrument_imports(include=[f"dbadapter.{name}" for name in _INSTRUMENTED]):
        import dbadapter.adapter_file
        import dbadapter.metadata_edit  # noqa: F401

    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    with tempfile.TemporaryDirectory() as name:
        atheris.Setup(sys.argv, lambda data: one_input(data, Path(name)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
