"""Inputs that fuzzing found or began with: every one is an adapter or one error of one line."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from fuzz_adapter import BUILT, EDIT, FRAMED, PEFT, RAW, one_input, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = (RAW, FRAMED, PEFT, EDIT, BUILT)
SEEDS = seeds()
# One input a line, each of which reached code that none before it did; what breaks is added to them.
CASES = [base64.b64decode(line) for line in Path(__file__).with_name("corpus.txt").read_text().split()]


def test_what_fuzzing_found(tmp_path: Path) -> None:
    outcomes = set()
    for case in CASES:
        try:
            one_input(case, tmp_path)
        except Exception as error:
            raise AssertionError(f"input {base64.b64encode(case).decode()}") from error
        outcomes.add(case[0] % len(KINDS) if case else RAW)
    assert outcomes == set(KINDS)


def test_seeds(tmp_path: Path) -> None:
    for seed in SEEDS:
        one_input(seed, tmp_path)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_changed_seeds(tmp_path_factory: Any, data: st.DataObject) -> None:
    seed = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(1, len(seed) - 1))
        change = data.draw(st.sampled_from(["set", "insert", "delete"]))
        if change == "delete" and len(seed) > 20:
            del seed[place : place + data.draw(st.integers(1, 8))]
        elif change == "insert":
            seed[place:place] = data.draw(
                st.sampled_from([b"[", b"{", b'"', b"9" * 30, b"NaN", b"null", b"-", b"\\ud800"])
            )
        else:
            seed[place] = data.draw(st.integers(0, 255))
    one_input(bytes(seed), tmp_path_factory.mktemp("changed"))


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=300)
def test_built_files(tmp_path_factory: Any, choices: bytes) -> None:
    one_input(bytes([BUILT]) + choices, tmp_path_factory.mktemp("built"))
