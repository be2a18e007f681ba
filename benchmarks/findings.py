"""The table of all findings at the top of `benchmarks/README.md`, made of the numbers in `results/`.

To add one: let the benchmark write its JSON by `report.write`, put the file into `results/`, write a function
that makes one line of its numbers, mark it with `@finding("NAME")`, and run `make benchmarks-readme`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FINDINGS", "finding", "logs_of", "read", "row", "table"]

RESULTS = Path(__file__).parent / "results"
NAMES = {"sd1": "SD1.5", "sd15": "SD1.5", "sdxl": "SDXL", "toybox": "toybox"}
#: Benchmark, as its JSON names it -> what makes one line of that JSON.
FINDINGS: dict[str, Callable[[Any], str]] = {}

Line = Callable[[Any], str]


def finding(name: str) -> Callable[[Line], Line]:
    """Register a function as the one that makes the finding of a benchmark's JSON.

    Args:
        name: the JSON's value of "benchmark".
    """

    def register(make: Line) -> Line:
        FINDINGS[name] = make
        return make

    return register


def read(path: Path) -> dict[str, Any]:
    """Return a result, checked for what the table needs of it.

    Raises:
        ValueError: it lacks a benchmark, a command or a machine, or no function makes a line of it.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("benchmark") and not found.get("command"):  # its JSON was written by no command line
        found["command"] = f"python -m benchmarks.{found['benchmark']}"
    for key in ("benchmark", "command", "machine"):
        if not found.get(key):
            raise ValueError(f"{path.name} says no {key}; write it by benchmarks.report.write")
    if found["benchmark"] not in FINDINGS:
        raise ValueError(
            f"{path.name} is of the benchmark {found['benchmark']}, for which benchmarks/findings.py has no "
            "function; add one there"
        )
    return found


def logs_of(folder: Path) -> dict[str, list[str]]:
    """Return the logs (.jsonl) of each result: the one whose name theirs begins with, the longest such.

    Raises:
        ValueError: a file that is neither a result nor the log or picture of one.
    """
    logs: dict[str, list[str]] = {path.stem: [] for path in sorted(folder.glob("*.json"))}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" or path.name.startswith(".") or path in unfinished(folder):
            continue
        owners = [stem for stem in logs if path.stem == stem or path.stem.startswith(f"{stem}-")]
        if not owners:
            raise ValueError(f"{path.name} belongs to no result: name it as one's JSON, or that and -WORD")
        logs[max(owners, key=len)].append(path.name)
    return logs


def row(path: Path, logs: list[str]) -> str:
    """Return a result's row: the finding, its command, the machine's kind, the date, the files."""
    found = read(path)
    date = found["machine"]["date"]
    others = (f"[{'plot' if name.endswith('.png') else 'log'}](results/{name})" for name in logs)
    files = [f"[{path.stem}](results/{path.name})", *others]
    cells = (
        FINDINGS[found["benchmark"]](found),
        f"`{found['command']}`",
        kind(found),
        " to ".join(sorted({found["machine"].get("since", date), date})),
        ", ".join(files),
    )
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table(folder: Path = RESULTS) -> str:
    """Return all results as a Markdown table, sorted by name.

    Raises:
        ValueError: as `read` and `logs_of`.
    """
    rows = [row(folder / f"{stem}.json", logs) for stem, logs in logs_of(folder).items()]
    rows += [
        f"| {len(path.read_text(encoding='utf-8').splitlines())} runs so far, no summary yet | "
        f"`python -m benchmarks.{path.stem.partition('-')[0]}` | | | [log](results/{path.name}) |"
        for path in unfinished(folder)
    ]
    return "\n".join(["| finding | command | machine | date | JSON |", "|---|---|---|---|---|", *rows])


def unfinished(folder: Path) -> list[Path]:
    """Return logs of runs whose result is yet to come."""
    stems = [path.stem for path in folder.glob("*.json")]
    return [
        path
        for path in sorted(folder.glob("*.jsonl"))
        if not any(path.stem == stem or path.stem.startswith(f"{stem}-") for stem in stems)
    ]


def kind(found: Mapping[str, Any]) -> str:
    """Return the kind of machine that a result came from."""
    machine, threads = found["machine"], found.get("threads")
    if machine.get("accelerator"):
        return str(machine["accelerator"])
    cores = f"{machine['cores']} cores, {machine['processor']}"
    return cores if threads in (None, machine["cores"]) else f"{threads} of {cores}"


# --- one function a benchmark


@finding("toybox")
def _toybox(found: Any) -> str:
    return (
        f"the embedded base draws the right noun in {found['noun_agreement']:.1%} and the right place in "
        f"{found['context_agreement']:.1%} of {found['pictures']} pictures; its autoencoder reaches "
        f"{found['vae_psnr']:.1f} dB"
    )


@finding("subject")
def _subject(found: Any) -> str:
    share = found["similarity_after"] / found["similarity_ceiling"]
    line = (
        f"an adapter reaches {share:.2f} of the possible likeness over {len(found['subjects'])} subjects and "
        f"keeps {found['class_diversity_ratio']:.0%} of its class's diversity"
    )
    if "no_prior" in found:
        line += f" ({found['no_prior']['class_diversity_ratio']:.0%} without a prior)"
    return f"{line}; {found['seconds']:.0f} s a subject"


@finding("training")
def _training(found: Any) -> str:
    parts = []
    for base, tables in found["bases"].items():
        words = [
            f"{name} {about['ratios']['steps_per_second']:.2f} times the steps at "
            f"{about['ratios']['peak_memory']:.2f} of the memory"
            for name, about in tables.items()
            if isinstance(about, dict) and "steps_per_second" in about.get("ratios", {})
        ]
        parts.append(f"{NAMES[base]} beside diffusers' script: {', '.join(words)}")
    return "; ".join(parts) + _bars(found)


@finding("inference")
def _inference(found: Any) -> str:
    parts = []
    words = {
        "eager / merged": "merged is {:.2f} times as fast as torch",
        "compile / merged": "{:.2f} times as fast as torch.compile",
        "swappable_one / merged": "a swappable adapter takes {:.2f} times merged's time",
    }
    for base, tables in found["bases"].items():
        ratios = tables.get("step", tables.get("picture", {})).get("ratios", {})
        told = [text.format(ratios[pair]["by_round"]) for pair, text in words.items() if pair in ratios]
        if "swap" in tables:
            told.append(f"a swap takes {tables['swap']['seconds'] * 1000:.1f} ms")
        parts.append(f"{NAMES[base]} through ONNX Runtime: {', '.join(told)}")
    return "; ".join(parts) + _bars(found)


@finding("export")
def _export(found: Any) -> str:
    worst = max(about["relative_error"] for about in found["components"].values())
    return (
        f"a base of {NAMES[found['base']['family']]}'s size is exported and checked in "
        f"{found['seconds']:.0f} s and {found['peak_memory_mb']:,.0f} MB; the worst component differs from "
        f"torch by {worst:.1e}"
    )


@finding("merging")
def _merging(found: Any) -> str:
    names = {
        "exact": "exact merge",
        "rank": f"merge cut to rank {found['rank']}",
        "bake": "baking",
    }
    parts = [
        f"{names[table]}, {NAMES[family]}: {'diffusers' if table == 'bake' else 'PEFT'} takes "
        f"{about['ratios']['seconds']:.3g} times the time and {about['ratios']['peak_memory']:.2g} times the "
        "memory"
        for table, families in found["tables"].items()
        for family, about in families.items()
    ]
    return "; ".join(parts)


@finding("cost")
def _cost(found: Any) -> str:
    parts = []
    for base, about in found["bases"].items():
        if "not_measured" in about:
            parts.append(f"{NAMES[base]}: {about['not_measured']}")
            continue
        for name, each in about.items():
            if not isinstance(each, dict):
                continue
            where = f"{NAMES[base]}, {name.replace('_', ' ')}"
            if "ratios" not in each:
                parts.append(f"{where}: full fine-tuning {each['not_measured'].get('full', 'not measured')}")
                continue
            ratios = each["ratios"]
            parts.append(
                f"{where}: full fine-tuning takes {ratios['step_seconds']:.2g} times the adapter's time a "
                f"step, {ratios['peak_memory']:.2g} times its memory"
                + (f", {ratios['file']:,.0f} times its file" if "file" in ratios else "")
            )
    return "; ".join(parts)


@finding("gpu")
def _gpu(found: Any) -> str:
    whole = sum(part["state"] == "done" for part in found["parts"].values())
    parts = [f"{whole} of {len(found['parts'])} parts measured whole"]
    for name, part in found["parts"].items():
        base = NAMES.get(name.partition("-")[2], name)
        told = []
        for cell, about in part["cells"].items():
            seconds = about.get("step_seconds", about.get("call_seconds"))
            if seconds is not None:
                share = about.get("share_of_the_matrix_rate")
                of_limit = "" if share is None else f" ({share:.0%} of the matrix rate)"
                told.append(f"{cell} {seconds * 1000:.3g} ms{of_limit}")
        if told:
            parts.append(f"{base} {'a step' if name.startswith('train') else 'a call'}: {', '.join(told)}")
        if name == "limits" and (rates := part["cells"].get("products", {}).get("tera_flops")):
            shown = ", ".join(f"{kind} {rate:.3g}" for kind, rate in rates.items())
            parts.append(f"matrix products in TFLOP/s: {shown}")
    return "; ".join(parts)


@finding("class_noun")
def _class_noun(found: Any) -> str:
    real = found["real"]
    told = real["all_photographs"][f"{real['threshold']:g}"]
    return (
        f"of {len(real['subjects'])} photographed subjects --class-noun auto names {told['right']:.0f} right "
        f"and {told['wrong']:.0f} wrong, and lists candidates for {told['refused']:.0f}"
    )


@finding("select")
def _select(found: Any) -> str:
    return "; ".join(
        f"{kind}: the chosen checkpoint scores {about['best']['score']:.3f}, the last "
        f"{about['last']['score']:.3f} ({about['subjects']} subjects)"
        for kind, about in found.items()
        if isinstance(about, dict) and "best_minus_last" in about
    )


@finding("quality")
def _quality(found: Any) -> str:
    def told(name: str) -> str:
        about = found["methods"][name]
        return (
            f"{name} reaches {about['likeness']['value']:.2f} of the possible likeness and forgets "
            f"{about['forgotten']['value']:.2f} of its class ({about['subjects']} x {about['seeds']} runs)"
        )

    parts = [told(name) for name in ("adapter", "full") if name in found["methods"]]
    if forgotten := found["targets"].get("forgetting_at_most_half_of_no_prior"):
        parts.append(
            f"without a prior, at the adapter's rate, {forgotten['all']['without']:.2f} of it is forgotten"
        )
    return "; ".join(parts) or f"{found['compared']} runs so far"


def _bars(found: Any) -> str:
    """Return how many of the bars that were set are met."""
    bars = found.get("bars", [])
    return f" ({sum(bar['met'] for bar in bars)} of {len(bars)} bars met)" if bars else ""
