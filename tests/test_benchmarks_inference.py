"""The inference benchmark's own parts: arithmetic, bars, chart, refusals; slow: one short run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click import ClickException
from click.testing import CliRunner
from PIL import Image

from benchmarks import inference, inference_figures, inference_peer, inference_variants
from benchmarks.inference_variants import Variant
from dbadapter import toybox

# --- seconds to figures


def test_figures_are_over_all_calls_of_all_rounds() -> None:
    made = inference_figures.figures({"merged": [[1.0, 3.0], [2.0, 9.0]]})
    assert made == {"merged": {"seconds": 2.5, "seconds_least": 1.0, "seconds_all": [[1.0, 3.0], [2.0, 9.0]]}}


def test_a_ratio_is_taken_in_each_round() -> None:
    # The second round was three times slower for both: the medians' ratio is off, the rounds' is not.
    calls = {
        "eager": [[2.0], [6.0], [2.0]],
        "merged": [[1.0], [3.0], [1.0]],
        "compile": [[1.5], [4.5], [1.5]],
    }
    made = inference_figures.ratios(calls)
    assert made["eager / merged"] == {"by_round": 2.0, "of_medians": 2.0, "of_least": 2.0}
    assert made["compile / merged"]["by_round"] == 1.5
    assert set(made) == {"eager / compile", "eager / merged", "compile / merged"}
    shifted = inference_figures.ratios({"eager": [[2.0], [6.0], [6.0]], "merged": [[1.0], [1.0], [3.0]]})
    assert shifted["eager / merged"] == {"by_round": 2.0, "of_medians": 6.0, "of_least": 2.0}


def test_every_pair_and_label_names_variants() -> None:
    known = {*inference.CPU_VARIANTS, *inference.GPU_VARIANTS}
    assert {name for pair in inference_figures.PAIRS for name in pair} <= known
    assert set(inference_figures.LABELS) == known
    assert set(inference_figures.GPU_RIVALS) <= known


def test_the_gpus_variants_have_their_exports() -> None:
    from benchmarks import inference_gpu

    kinds = {kind for kind, *_ in inference_gpu._SESSIONS.values()}
    assert kinds <= set(inference_peer.EXPORTS)


def ratio(value: float) -> dict[str, float]:
    return {"by_round": value}


def test_every_bar_says_whether_it_is_met() -> None:
    steps = {
        "eager / merged": ratio(1.8),
        "compile / merged": ratio(1.1),
        "swappable_one / merged": ratio(1.07),
    }
    bases = {
        "toybox": {"step": {"ratios": steps}, "swap": {"seconds": 0.009}},
        "sd15": {
            "step": {"ratios": steps},
            "swap": {"seconds": 0.11},
            "export": {"merged": {"seconds": 241.0, "peak_memory_mb": 9000.0}},
        },
    }
    met = {(bar["base"], bar["ratio"]): bar["met"] for bar in inference_figures.bars(bases)}
    assert met == {
        ("toybox", "eager / merged"): True,
        ("toybox", "compile / merged"): False,
        ("toybox", "swappable_one / merged"): False,
        ("toybox", "seconds"): True,
        ("sd15", "eager / merged"): True,
        ("sd15", "compile / merged"): True,
        ("sd15", "swappable_one / merged"): False,
        ("sd15", "seconds"): False,
        ("sd15", "merged: seconds"): False,
        ("sd15", "merged: peak_memory_mb"): True,
    }
    first = inference_figures.bars(bases)[0]
    assert (first["value"], first["bar"]) == (1.8, "at least 1.8")


def test_on_a_gpu_the_best_of_onnx_runtimes_must_beat_the_compiler() -> None:
    found = {
        "cuda_compile / cuda_merged": ratio(0.9),
        "cuda_compile / cuda_merged_graph": ratio(1.1),
        "cuda_eager / cuda_merged": ratio(2.0),
    }
    bars = inference_figures.bars({"sd15": {"step": {"ratios": found}}})
    assert [(bar["ratio"], bar["met"]) for bar in bars] == [("cuda_compile / cuda_merged_graph", True)]


def test_the_longest_bar_is_the_slowest_and_no_bar_is_an_error() -> None:
    made = inference_figures.bar_chart({"toybox": {"eager": 4.0, "merged": 2.0}})

    def length(colour: str) -> int:
        wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        rows = [sum(made.getpixel((x, y)) == wanted for x in range(made.width)) for y in range(made.height)]
        return max(rows)

    slow, fast = (length(inference_figures._COLOURS[name]) for name in ("torch", "merged"))
    assert slow == pytest.approx(2 * fast, abs=3)
    with pytest.raises(ValueError, match="at least one value"):
        inference_figures.chart({"toybox": {"swap": {}}})


# --- what is measured


def test_every_round_begins_with_another_variant() -> None:
    order: list[str] = []

    def variant(name: str) -> Variant:
        def call() -> torch.Tensor:
            order.append(name)
            return torch.zeros(1)

        return Variant(call, lambda: order.append(f"prepare {name}"))

    made = inference_variants.measure({"a": variant("a"), "b": variant("b")}, rounds=2, calls=2, lead_in=1)
    a, b = ["prepare a", "a", "a", "a"], ["prepare b", "b", "b", "b"]
    assert order == [*a, *b, *b, *a]
    assert [len(values) for values in made["a"]] == [2, 2]


def test_inputs_are_those_of_one_step_with_guidance() -> None:
    made = inference_variants.unet_inputs(toybox.folder(), 16)
    assert made["sample"].shape == (2, 4, 16, 16)
    assert made["encoder_hidden_states"].shape == (2, 32, 128)


def test_random_factors_have_the_rank_and_the_graphs_shapes() -> None:
    shapes = {"unet.x.lora_A": ("rank of x", 6), "unet.x.lora_B": (5, "rank of x")}
    made = inference_variants.random_factors(shapes, 3)
    assert {name: tuple(value.shape) for name, value in made.items()} == {
        "unet.x.lora_A": (3, 6),
        "unet.x.lora_B": (5, 3),
    }
    other = inference_variants.random_factors(shapes, 3, seed=1)
    assert not torch.equal(made["unet.x.lora_A"], other["unet.x.lora_A"])


def test_torch_is_called_as_it_is_and_compiled_from_one_model(tmp_path: Path) -> None:
    opened: dict[str, Any] = {}
    job = inference_variants.Job(toybox.folder(), tmp_path, 16)
    first = inference_variants.load("eager", job, opened)
    inference_variants.load("compile", job, opened)  # nothing is compiled before the first call
    assert list(opened) == ["torch"]
    assert first.call().shape == (2, 4, 16, 16)
    assert not first.call().requires_grad


# --- refusals


def refusal(*words: str) -> str:
    result = CliRunner().invoke(inference.main, list(words))
    assert result.exit_code == 2
    return result.output.strip().splitlines()[-1]


def test_an_unknown_table_is_refused_in_one_line() -> None:
    assert "unknown tables best; known: step, alone, swap, picture, export" in refusal("--tables", "best")


def test_a_plot_without_its_table_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "add step to --tables" in refusal("--tables", "swap", "--plot", str(tmp_path / "plot.png"))


def test_a_task_that_fails_is_told_in_one_line_with_its_log(tmp_path: Path) -> None:
    plan = inference.Plan("toybox", toybox.folder(), tmp_path, 16, ("merged",), 1, True)
    with pytest.raises(
        ClickException, match=r"toybox swap failed: .*model.onnx is missing.*swap\.log"
    ) as told:
        inference.run(plan, "swap", swaps=1)
    assert "\n" not in told.value.message
    assert "Traceback" in (tmp_path / "toybox-swap.log").read_text()


# --- all of it


@pytest.mark.slow
def test_a_quick_run_measures_every_variant(tmp_path: Path) -> None:
    # Without the table `picture` the UNet alone is exported, which is the shortest.
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    words = ["--quick", "--tables", "step,alone,swap", "--threads", "1", "--work-dir", str(tmp_path / "work")]
    result = CliRunner().invoke(inference.main, [*words, "--json", str(out), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    made = json.loads(out.read_text())
    assert made["quick"] is True
    found = made["bases"]["toybox"]
    variants = [name for name in inference.CPU_VARIANTS if name != "compile"]
    assert list(found["step"]["calls"]) == variants
    for name in ("merged", "swappable"):
        assert found["step"]["difference_from_torch"][name] < 1e-4
    for name in ("swappable_one", "swappable_three"):
        assert found["step"]["difference_from_torch"][name] > 1e-3
    assert list(found["alone"]) == variants
    assert min(about["peak_memory_mb"] for about in found["alone"].values()) > 1
    assert found["swap"]["seconds"] > 0
    assert {bar["ratio"] for bar in made["bars"]} == {"eager / merged", "swappable_one / merged", "seconds"}
    assert str(tmp_path) not in out.read_text()
    assert Image.open(plot).width == 760
