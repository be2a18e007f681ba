"""The GPU benchmark's machinery: resuming, the budget, what fails, counts of operations; tiny on a CPU."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click import UsageError
from click.testing import CliRunner
from tiny_bases import write_tiny_base

from benchmarks import flops, gpu, gpu_cells, gpu_inference, inference_variants
from benchmarks.gpu_parts import PARTS, Settings
from dbadapter import toybox

ROOT = Path(__file__).resolve().parents[1]
HERE = {"accelerator": None, "date": "2026-02-02", "versions": {"torch": "2"}}
SETTINGS = {"work": "", "tiny": True, "threads": 1, "script": None}


def record(**cells: Any) -> dict[str, Any]:
    return {"cells": cells, "left": [], "reason": None}


class Runs:
    """Stands in for the processes: notes what it was asked for and answers from a list."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    def __call__(self, name: str, settings: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        self.asked.append((name, dict(settings["done"]), seconds))
        answer = self.answers.get(name, record(a={"seconds": 1.0}))
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]


def go(out: dict[str, Any], parts: list[str], run: Runs, budget: float = 100, **more: Any) -> list[Any]:
    kept: list[Any] = []
    gpu.measure(
        out, parts, SETTINGS, budget, lambda found: kept.append(json.loads(json.dumps(found))), run, **more
    )
    return kept


# --- parts


def test_every_part_is_kept_as_soon_as_it_is_done() -> None:
    kept = go({}, ["limits", "smoke"], Runs())
    assert [list(found["parts"]) for found in kept] == [["limits"], ["limits", "smoke"]]
    assert [found["left"] for found in kept] == [["smoke"], []]


def test_a_finished_part_is_not_run_again() -> None:
    out: dict[str, Any] = {}
    go(out, ["limits", "smoke"], Runs(smoke=record(a={"failed": "no"})))
    assert (out["parts"]["smoke"]["state"], out["left"]) == ("failed", ["smoke"])
    again = Runs()
    go(out, ["limits", "smoke"], again)
    assert [name for name, *_ in again.asked] == ["smoke"]
    assert out["left"] == []


def test_a_part_goes_on_with_the_cells_that_it_has() -> None:
    cells = {"a": {"seconds": 1.0}, "b": {"failed": "out of memory"}, "c": {"not_measured": "no onnxruntime"}}
    cells["d"] = {"bytes": 1, "disturbed": {"seconds": 2.0}}  # other work ran beside it
    out: dict[str, Any] = {}
    go(out, ["infer-sd15"], Runs(**{"infer-sd15": {"cells": cells, "left": ["d"], "reason": None}}))
    assert out["parts"]["infer-sd15"]["state"] == "partial"
    again = Runs()
    go(out, ["infer-sd15"], again)
    assert set(again.asked[0][1]) == {"a"}
    out["parts"]["infer-sd15"]["state"] = "partial"
    go(out, ["limits"], Runs())
    assert out["left"] == ["infer-sd15"]  # this call was not to do it


def test_a_part_that_does_not_fit_is_not_begun_and_listed() -> None:
    times = iter([0.0, 0.0, 0.0, 95.0, 95.0, 95.0])
    out: dict[str, Any] = {}
    run = Runs()
    go(out, ["limits", "smoke"], run, budget=100, clock=lambda: next(times))
    assert [name for name, *_ in run.asked] == ["limits"]
    assert out["left"] == ["smoke"]
    assert "smoke" not in out["parts"]


def test_a_part_that_fails_is_told_in_one_line_and_the_others_go_on() -> None:
    out: dict[str, Any] = {}
    go(out, ["limits", "smoke"], Runs(limits=OSError("no such thing\nsecond line")))
    assert out["parts"]["limits"]["state"] == "failed"
    assert out["parts"]["limits"]["reason"] == "OSError: no such thing"
    assert out["parts"]["smoke"]["state"] == "done"
    assert out["left"] == ["limits"]


def test_an_interrupt_keeps_what_the_part_had_finished(tmp_path: Path) -> None:
    def interrupted(name: str, settings: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        about = {"cells": {"a": {"seconds": 1.0}}, "left": ["c"], "running": "b"}
        (tmp_path / "gpu-limits.json").write_text(json.dumps(about))
        raise KeyboardInterrupt

    kept: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        gpu.measure({}, ["limits"], SETTINGS | {"work": str(tmp_path)}, 100, kept.append, interrupted)
    part = kept[0]["parts"]["limits"]
    assert (part["state"], set(part["cells"]), part["left"]) == ("partial", {"a"}, ["c", "b"])
    assert kept[0]["left"] == ["limits"]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError("cannot start")])
def test_what_ends_a_second_try_keeps_the_cells_of_the_first(
    end: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def ended(name: str, told: Mapping[str, Any], path: Path, log: Path, seconds: float) -> tuple[int, str]:
        tries.append(name)
        if len(tries) == 2:
            raise end
        path.write_text(json.dumps({"cells": {"a": {}}, "left": ["c"], "running": "b"}))
        return -9, "the process ended with -9: no word"

    monkeypatch.setattr(gpu, "_ended", ended)
    out: dict[str, Any] = {}
    settings = SETTINGS | {"work": str(tmp_path)}
    with contextlib.suppress(KeyboardInterrupt):
        gpu.measure(out, ["limits"], settings, 100, lambda found: None)
    assert set(out["parts"]["limits"]["cells"]) == {"a", "b"}
    assert out["left"] == ["limits"]


def test_a_cell_in_which_the_process_died_is_told_and_the_part_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ended(name: str, told: Mapping[str, Any], path: Path, log: Path, seconds: float) -> tuple[int, str]:
        asked.append(dict(told["done"]))
        running = "b" if len(asked) == 1 else None
        path.write_text(json.dumps({"cells": {"a": {}, **told["done"]}, "left": [], "running": running}))
        return (-9, "the process ended with -9: no word") if running else (0, "")

    monkeypatch.setattr(gpu, "_ended", ended)
    found = gpu.run_part("limits", {**SETTINGS, "work": str(tmp_path), "done": {}}, 60)
    assert asked == [{}, {"a": {}, "b": {"failed": "the process ended with -9: no word"}}]
    assert set(found["cells"]) == {"a", "b"}
    assert gpu.state_of(found) == "done"


def test_a_second_try_that_comes_to_nothing_knows_what_the_first_had_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def ended(name: str, told: Mapping[str, Any], path: Path, log: Path, seconds: float) -> tuple[int, str]:
        tries.append(name)
        if len(tries) == 1:
            path.write_text(json.dumps({"cells": {"a": {}}, "left": ["c"], "running": "b"}))
        return -9, "the process ended with -9: no word"

    monkeypatch.setattr(gpu, "_ended", ended)
    found = gpu.run_part("limits", {**SETTINGS, "work": str(tmp_path), "done": {}}, 60)
    assert (len(tries), set(found["cells"]), found["left"]) == (2, {"a", "b"}, ["c"])
    assert gpu.state_of(found) == "partial"


def test_a_part_out_of_time_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    found = gpu.run_part("limits", {**SETTINGS, "work": str(tmp_path), "done": {"x": {"seconds": 1}}}, 0.2)
    assert "the budget was used up" in found["reason"]
    assert found["cells"] == {"x": {"seconds": 1}}
    assert gpu.state_of(found) == "failed"


def test_the_share_of_the_limit_is_of_the_same_precision() -> None:
    parts = {
        "limits": record(products={"tera_flops": {"bf16": 400.0, "fp32": 50.0}}),
        "train-sd15": record(a={"tera_flops": 100.0, "precision": "bf16"}, b={"failed": "no"}),
        "infer-sd15": record(c={"tera_flops": 100.0, "precision": "fp16"}),
    }
    gpu.shares(parts)
    assert parts["train-sd15"]["cells"]["a"]["share_of_the_matrix_rate"] == 0.25
    assert "share_of_the_matrix_rate" not in parts["infer-sd15"]["cells"]["c"]


# --- cells


def cell(name: str, answer: Any = None, seconds: float = 1, again: bool = False) -> gpu_cells.Cell:
    def measure() -> dict[str, Any]:
        if isinstance(answer, Exception):
            raise answer
        return {"value": 1}

    return gpu_cells.Cell(name, seconds, measure, again)


def test_cells_that_fail_or_lack_a_package_are_told_and_the_others_go_on(tmp_path: Path) -> None:
    cells = [
        cell("fails", RuntimeError("CUDA out of memory\nmore")),
        cell("lacks", gpu_cells.NotMeasuredError("onnxruntime is not installed")),
        cell("imports", ModuleNotFoundError("No module named 'onnx'")),
        cell("works"),
    ]
    found = gpu_cells.do_cells(cells, {}, 60, tmp_path / "record.json")["cells"]
    assert found["fails"]["failed"] == "RuntimeError: CUDA out of memory"
    assert found["lacks"]["not_measured"] == "onnxruntime is not installed"
    assert found["imports"]["not_measured"] == "ModuleNotFoundError: No module named 'onnx'"
    assert found["works"]["value"] == 1


def test_the_record_names_the_cell_that_runs_and_those_before_it(tmp_path: Path) -> None:
    path, seen = tmp_path / "record.json", []

    def measure() -> dict[str, Any]:
        seen.append(json.loads(path.read_text()))
        return {}

    gpu_cells.do_cells([cell("first"), gpu_cells.Cell("second", 1, measure)], {}, 60, path)
    assert seen[0]["running"] == "second"
    assert list(seen[0]["cells"]) == ["first"]
    assert json.loads(path.read_text())["running"] is None


def test_the_record_tells_what_is_left_while_a_cell_runs(tmp_path: Path) -> None:
    told, record = [], tmp_path / "record.json"

    def cell_of(name: str, seconds: float) -> gpu_cells.Cell:
        def measure() -> dict[str, Any]:
            about = json.loads(record.read_text())
            told.append((about["running"], about["left"]))
            return {}

        return gpu_cells.Cell(name, seconds, measure)

    cells = [cell_of("done", 1), cell_of("a", 1), cell_of("large", 99), cell_of("b", 1), cell_of("c", 1)]
    found = gpu_cells.do_cells(cells, {"done": {}}, 60, record)
    assert told == [("a", ["large", "b", "c"]), ("b", ["large", "c"]), ("c", ["large"])]
    assert found["left"] == json.loads(record.read_text())["left"] == ["large"]


def test_cells_that_do_not_fit_are_left_and_smaller_ones_taken(tmp_path: Path) -> None:
    cells = [cell("large", seconds=100), cell("small"), cell("done"), cell("gone", again=True)]
    done = {"done": {"value": 7}, "gone": {"value": 7}}
    found = gpu_cells.do_cells(cells, done, 10, tmp_path / "record.json")
    assert found["left"] == ["large"]
    assert {name: about["value"] for name, about in found["cells"].items()} == {
        "small": 1,
        "done": 7,
        "gone": 1,
    }


def test_an_export_is_made_again_where_it_is_wanted_and_not_there(tmp_path: Path) -> None:
    def again(done: frozenset[str]) -> dict[str, bool]:
        settings = Settings(tmp_path, True, 60, 1, None, done)
        return {each.name: each.again for each in gpu_inference.infer("sd15", settings)}

    kinds = gpu_inference.ONNX_KINDS["cuda" if torch.cuda.is_available() else "cpu"]
    assert again(frozenset())[f"export_{kinds[0]}"]
    everything = frozenset([*gpu_inference.CALLED["cpu"], *gpu_inference.CALLED["cuda"], "swap"])
    assert not any(again(everything).values())


def test_every_variant_finds_its_export() -> None:
    kinds = {name: gpu_inference.kind_of(name) for names in gpu_inference.CALLED.values() for name in names}
    assert {name for name, kind in kinds.items() if kind is None} == {"eager", "cuda_eager", "cuda_compile"}
    assert kinds["cuda_swappable_one_graph"] == "cuda-swappable"
    assert kinds["merged"] == "merged"


# --- operations


def test_a_call_counts_what_a_counter_on_a_real_call_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = inference_variants.unet_inputs(toybox.folder(), 16)
    call = inference_variants.torch_variant(
        inference_variants.load_unet(toybox.folder()), inputs, compiled=False
    )
    with FlopCounterMode(display=False) as counter:
        call.call()
    # The fused attention of a CPU may be unknown to the counter: at most its share is missing.
    assert 0.8 < counter.get_total_flops() / flops.call_flops(toybox.folder(), inputs) <= 1.0001


def test_a_steps_operations_are_those_of_its_passes() -> None:
    words: dict[str, Any] = {"rank": 8, "text_encoder": False}
    forward = flops.call_flops(toybox.folder(), inference_variants.unet_inputs(toybox.folder(), 16)) / 2

    def step(*, full: bool, distill: bool) -> float:
        return flops.step_flops(toybox.folder(), 64, 1, full=full, distill=distill, **words) / forward

    assert 1.8 < step(full=False, distill=False) < 2.4  # no gradients of weights
    assert 2.7 < step(full=True, distill=False) < 3.01
    assert step(full=False, distill=True) == pytest.approx(1 + 2 * step(full=False, distill=False), rel=0.02)


def test_sdxls_call_takes_its_further_inputs(tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / "sdxl", "sdxl", clip_vocabulary=False)
    inputs = inference_variants.unet_inputs(folder, 8)
    assert inputs["text_embeds"].shape == (2, 48)
    assert inputs["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    call = inference_variants.torch_variant(inference_variants.load_unet(folder), inputs, compiled=False)
    assert call.call().shape == (2, 4, 8, 8)
    assert flops.call_flops(folder, inputs) > 0


# --- the command


def refusal(path: Path, content: str) -> str:
    path.write_text(content)
    with pytest.raises(UsageError) as told:
        gpu.go_on(path, True, HERE, 1)
    assert "\n" not in told.value.message
    return told.value.message


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"accelerator": None, "versions": {}}
    whole = {"benchmark": "gpu", "parts": {}, "tiny": True, "threads": 1, "machine": nothing}
    path = tmp_path / "out.json"
    assert "is no JSON" in refusal(path, "{")
    assert "not of this benchmark" in refusal(path, '{"benchmark": "cost"}')
    assert "was measured on X, this is a CPU" in refusal(
        path, json.dumps(whole | {"machine": nothing | {"accelerator": "X"}})
    )
    assert "not of a --quick run" in refusal(path, json.dumps(whole | {"tiny": False}))
    path.write_text(json.dumps(whole))
    assert "not of this benchmark" in refusal(path, "[]")
    assert "with torch 1, this is 2" in refusal(
        path, json.dumps(whole | {"machine": {"accelerator": None, "versions": {"torch": "1"}}})
    )
    assert "with --threads 9, not 1" in refusal(path, json.dumps(whole | {"threads": 9}))
    for damage in (
        {"tiny": None},
        {"threads": None},
        {"machine": None},
        {"machine": {"accelerator": None, "versions": None}},
        {"parts": []},
        {"parts": {"limits": 3}},
        {"parts": {"limits": {"cells": []}}},
        {"parts": {"limits": {"cells": {"products": 3}}}},
    ):
        assert "not of this benchmark, or damaged" in refusal(path, json.dumps(whole | damage))
    path.write_text(json.dumps(whole | {"note": "by hand", "machine": HERE | {"date": "2026-01-01"}}))
    found = gpu.go_on(path, True, HERE, 1)
    assert found == whole | {"note": "by hand", "machine": HERE | {"since": "2026-01-01"}}
    assert gpu.go_on(tmp_path / "none.json", True, HERE, 1) == {}


def test_nothing_of_torchs_parts_needs_onnxruntime() -> None:
    code = (
        "import sys\nfor name in ('onnxruntime', 'onnx', 'onnxscript', 'onnx_ir'): sys.modules[name] = None\n"
        "import benchmarks.gpu, benchmarks.inference_gpu, benchmarks.flops, benchmarks.cost\n"
        "import dbadapter.training"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_unknown_parts_are_refused() -> None:
    result = CliRunner().invoke(gpu.main, ["--parts", "limits,best"])
    assert result.exit_code == 2
    assert f"unknown parts best; known: {', '.join(PARTS)}" in result.output
    assert "--parts names none; known: limits" in CliRunner().invoke(gpu.main, ["--parts", ","]).output


def test_the_command_measures_the_limits_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--quick", "--threads", "1", "--json", str(out), "--work-dir", str(tmp_path / "work")]
    first = CliRunner().invoke(gpu.main, [*words, "--parts", "limits,smoke", "--budget-seconds", "9"])
    assert first.exit_code == 0, first.output
    assert not out.exists() or json.loads(out.read_text())["left"] == ["limits", "smoke"]
    second = CliRunner().invoke(gpu.main, [*words, "--parts", "limits", "--budget-seconds", "120"])
    assert second.exit_code == 0, second.output
    found = json.loads(out.read_text())
    assert found["parts"]["limits"]["state"] == "done", found
    assert found["parts"]["limits"]["cells"]["products"]["tera_flops"]["fp32"] > 0
    assert found["parts"]["limits"]["cells"]["copies"]["giga_bytes"] > 0
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    "parts", ["limits,smoke,train-sd15,infer-sdxl", pytest.param(",".join(PARTS), marks=pytest.mark.slow)]
)
def test_parts_go_through_at_a_tiny_size(parts: str, tmp_path: Path) -> None:
    """One part of each kind, a process each; slow: all six."""
    out = tmp_path / "out.json"
    words = ["--quick", "--threads", "1", "--json", str(out), "--work-dir", str(tmp_path / "work")]
    words += ["--parts", parts, "--plot", str(tmp_path / "out.png")]
    result = CliRunner().invoke(gpu.main, [*words, "--budget-seconds", "1500"])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["left"] == []
    assert (tmp_path / "out.png").stat().st_size > 1000
    cells = {
        f"{part} {name}": c for part, about in found["parts"].items() for name, c in about["cells"].items()
    }
    wrong = {name: about for name, about in cells.items() if "failed" in about or "not_measured" in about}
    assert not wrong
    for name in ("train-sd15 adapter_fp32", "train-sd15 full_fp32", "infer-sdxl merged", "infer-sdxl eager"):
        assert cells[name]["share_of_the_matrix_rate"] > 0
    assert cells["infer-sdxl swap"]["seconds"] > 0


def test_what_a_variant_gives_is_compared_with_torch(tmp_path: Path) -> None:
    job = inference_variants.Job(tmp_path, tmp_path / "exports", 8)
    expected = torch.tensor([3.0, 4.0])
    assert gpu_inference.difference("cuda_merged", expected, job) == {}  # nothing to compare with yet
    assert gpu_inference.difference("cuda_eager", expected, job) == {}
    assert gpu_inference.difference("cuda_merged", expected * 1.01, job) == {"relative_error": 0.01}
    assert gpu_inference.difference("cuda_swappable_one", expected, job) == {}  # an adapter is on


def test_of_two_exports_the_one_that_is_needed_is_made_again(tmp_path: Path) -> None:
    done = frozenset({"base", "eager", "export_merged", "merged", "export_swappable", "swappable_one"})
    settings = Settings(tmp_path, True, 60, 1, None, done)
    again = [cell.name for cell in gpu_inference.infer("sd15", settings) if cell.again]
    assert again == ["export_swappable"]  # for the swap, which is left
