"""The two tested sets of versions, and what pyproject.toml says of them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64"}
MACHINES = [("linux", "x86_64"), ("win32", "AMD64"), ("darwin", "arm64"), ("linux", "aarch64")]


def versions(name: str) -> dict[str, str]:
    """Return package -> version of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package.lower().replace("_", "-"): version for package, version in pairs}


def requirements(lines: list[str], machine: dict[str, str]) -> list[Requirement]:
    """Return those that count on a machine."""
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate(machine)]


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-optimum.txt"])
def test_both_sets_are_allowed(name: str) -> None:
    tested = versions(name)
    for requirement in requirements(PROJECT["dependencies"], LINUX):
        version = tested[requirement.name.replace("_", "-")]
        assert requirement.specifier.contains(version), f"{name} has {requirement.name} {version}"


def test_the_optimum_extra_is_pinned_to_its_set() -> None:
    tested = versions("constraints-optimum.txt")
    for requirement in requirements(PROJECT["optional-dependencies"]["optimum"], LINUX):
        name = requirement.name.replace("_", "-")
        assert str(requirement.specifier) == f"=={tested[name]}", name


@pytest.mark.parametrize(("platform", "machine"), MACHINES)
def test_one_onnxruntime_a_machine(platform: str, machine: str) -> None:
    """Two packages hold the module onnxruntime; installed together, one overwrites files of the other."""
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["optimum"]
    wanted = requirements(lines, {"sys_platform": platform, "platform_machine": machine})
    names = {each.name for each in wanted if each.name.startswith("onnxruntime")}
    names |= {extra for each in wanted if each.name == "optimum-onnx" for extra in each.extras}
    assert names == {"onnxruntime-gpu" if machine in ("x86_64", "AMD64") else "onnxruntime"}
