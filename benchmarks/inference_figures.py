"""The arithmetic of `benchmarks.inference`: seconds of calls in; figures, ratios, bars and a chart out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

__all__ = ["bar_chart", "bars", "chart", "figures", "ratios", "rounded"]

MB = 2**20
# What was to be reached: least speed of merged over these, most time of a swappable call over merged's.
LEAST_SPEED = {"toybox": {"eager": 1.8, "compile": 1.2}, "sd15": {"eager": 1.6, "compile": 1.0}}
MOST_TIME_WITH_ONE = 1.06
MOST_SWAP_SECONDS = {"toybox": 0.010, "sd15": 0.100}
MOST_EXPORT_SECONDS = 240.0
MOST_EXPORT_MB = round(10e9 / MB)  # 10 GB
LEAST_GPU_SPEED = 1.0  # the best of ONNX Runtime's over torch.compile, both in float16
GPU_RIVALS = ("cuda_merged", "cuda_merged_graph", "tensorrt_merged")

# (slower, faster): the first one's seconds over the second's; above 1 the second is the faster.
PAIRS = (
    ("eager", "compile"),
    ("eager", "merged"),
    ("compile", "merged"),
    ("swappable", "merged"),
    ("swappable_one", "merged"),
    ("swappable_three", "merged"),
    ("cuda_eager", "cuda_merged"),
    ("cuda_compile", "cuda_merged"),
    ("cuda_compile", "cuda_merged_graph"),
    ("cuda_compile", "tensorrt_merged"),
    ("cuda_swappable_one", "cuda_merged"),
    ("cuda_swappable_one_graph", "cuda_merged_graph"),
)
LABELS = {
    "eager": "torch",
    "compile": "torch.compile",
    "merged": "ONNX, merged",
    "swappable": "ONNX, swappable, no adapter",
    "swappable_one": "ONNX, swappable, one of rank 8",
    "swappable_three": "ONNX, swappable, three (4, 8, 16)",
    "cuda_eager": "CUDA fp16: torch",
    "cuda_compile": "CUDA fp16: torch.compile",
    "cuda_merged": "CUDA fp16: ONNX, merged",
    "cuda_swappable_one": "CUDA fp16: ONNX, swappable, one",
    "cuda_merged_graph": "CUDA graph fp16: ONNX, merged",
    "cuda_swappable_one_graph": "CUDA graph fp16: ONNX, swappable, one",
    "tensorrt_merged": "TensorRT fp16: ONNX, merged",
}
_COLOURS = {
    "torch": "#8c8c8c",
    "merged": "#2f6fb0",
    "swappable": "#7fb2e0",
    "adapter": "#2f6fb0",
}


def figures(calls: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Return median, least and all seconds of each variant's calls.

    Args:
        calls: variant -> round -> seconds of each call of that round.
    """
    out = {}
    for name, by_round in calls.items():
        every = [value for values in by_round for value in values]
        out[name] = {
            "seconds": rounded(statistics.median(every)),
            "seconds_least": rounded(min(every)),
            "seconds_all": [rounded(list(values)) for values in by_round],
        }
    return out


def ratios(calls: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Return how the variants compare: "A / B" is A's seconds over B's.

    The first way is what the bars take: what slows a machine down slows a whole round, and leaves its ratio.

    Args:
        calls: as for `figures`; every variant has the same number of rounds.
    Returns:
        Pair -> by_round, the median of each round's ratio; of_medians; of_least.
    """
    rounds = {name: [statistics.median(values) for values in by_round] for name, by_round in calls.items()}
    every = {name: [value for values in by_round for value in values] for name, by_round in calls.items()}
    out = {}
    for over, under in PAIRS:
        if over in calls and under in calls:
            pairs = zip(rounds[over], rounds[under], strict=True)
            out[f"{over} / {under}"] = {
                "by_round": rounded(statistics.median(a / b for a, b in pairs)),
                "of_medians": rounded(statistics.median(every[over]) / statistics.median(every[under])),
                "of_least": rounded(min(every[over]) / min(every[under])),
            }
    return out


def bars(bases: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every bar that was measured: what it is about, the value, the limit, and whether it is met.

    Args:
        bases: base -> table -> figures, as `benchmarks.inference` writes them.
    """
    out: list[dict[str, Any]] = []

    def bar(base: str, table: str, what: str, value: float, limit: float, at_most: bool) -> None:
        met = value <= limit if at_most else value >= limit
        word = "at most" if at_most else "at least"
        about = {"base": base, "table": table, "ratio": what, "value": value}
        out.append(about | {"bar": f"{word} {limit}", "met": met})

    for base, tables in bases.items():
        found = tables.get("step", {}).get("ratios", {})
        for slower, least in LEAST_SPEED[base].items():
            if (pair := f"{slower} / merged") in found:
                bar(base, "step", pair, found[pair]["by_round"], least, at_most=False)
        if (pair := "swappable_one / merged") in found:
            bar(base, "step", pair, found[pair]["by_round"], MOST_TIME_WITH_ONE, at_most=True)
        rivals = [f"cuda_compile / {name}" for name in GPU_RIVALS if f"cuda_compile / {name}" in found]
        if base == "sd15" and rivals:
            best = max(rivals, key=lambda pair: found[pair]["by_round"])
            bar(base, "step", best, found[best]["by_round"], LEAST_GPU_SPEED, at_most=False)
        if "swap" in tables:
            bar(base, "swap", "seconds", tables["swap"]["seconds"], MOST_SWAP_SECONDS[base], at_most=True)
        if base == "sd15":
            for kind, about in tables.get("export", {}).items():
                name = f"{kind}: peak_memory_mb"
                bar(base, "export", f"{kind}: seconds", about["seconds"], MOST_EXPORT_SECONDS, at_most=True)
                bar(base, "export", name, about["peak_memory_mb"], MOST_EXPORT_MB, at_most=True)
    return out


def rounded(value: Any) -> Any:
    """Return a number, or each of a list, with five decimals: of seconds, a hundredth of a millisecond."""
    return [round(each, 5) for each in value] if isinstance(value, list) else round(float(value), 5)


# --- the chart


def chart(bases: Mapping[str, Any]) -> Image.Image:
    """Return one picture of the median call of every variant, a group of bars for each base.

    Raises:
        ValueError: no base has the table `step`.
    """
    groups = {}
    for base, tables in bases.items():
        if "step" in tables:
            side, calls = tables["latents"], tables["step"]["calls"]
            title = f"{base}: one UNet call, latents 2 x {side} x {side}, milliseconds"
            groups[title] = {name: about["seconds"] * 1000 for name, about in calls.items()}
    return bar_chart(groups)


def bar_chart(groups: Mapping[str, Mapping[str, float]], width: int = 760) -> Image.Image:
    """Return horizontal bars with their names at the left and their values at the right; shorter is better.

    Args:
        groups: title -> variant -> value; bars of one group share a scale.
        width: of the picture in pixels.
    Raises:
        ValueError: there is no bar.
    """
    if not any(groups.values()):
        raise ValueError("a chart needs at least one value, got none")
    font: Any = ImageFont.load_default(14)
    line, margin = math.ceil(font.getbbox("Ag|")[3]) + 8, 12
    names = [LABELS.get(name, name) for values in groups.values() for name in values]
    left = margin + max(math.ceil(font.getlength(name)) for name in names) + margin
    room = width - left - margin - math.ceil(font.getlength("00000.00"))
    height = margin + sum((len(values) + 1) * line + margin for values in groups.values())
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    y = margin
    for title, values in groups.items():
        draw.text((margin, y), title, fill="black", font=font)
        y += line
        longest = max(values.values(), default=0)
        for name, value in values.items():
            length = max(1, round(room * value / longest)) if longest > 0 else 1
            draw.text((margin, y + 2), LABELS.get(name, name), fill="black", font=font)
            draw.rectangle((left, y + 2, left + length, y + line - 4), fill=_colour(name))
            shown = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            draw.text((left + length + 6, y + 2), shown, fill="black", font=font)
            y += line
        y += margin
    return image


def _colour(name: str) -> str:
    return next((colour for word, colour in _COLOURS.items() if word in name), _COLOURS["torch"])
