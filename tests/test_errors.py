"""What a library's failure is told as."""

from __future__ import annotations

import pytest

from dbadapter.errors import reason


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "Cannot find it in the cache. To look online, pass 'x=False' as input.",
            "Cannot find it in the cache",
        ),
        ("Cannot read model.safetensors at 1.5.\nMore of it.", "Cannot read model.safetensors at 1.5"),
        ("Got: ConnectError: [Errno -2] Name or service not known", None),
        (" \n", "ValueError"),
        (
            "Weights e.g. the UNet are missing at no. 5. More",
            "Weights e.g. the UNet are missing at no. 5",
        ),
        ("\n  It is gone. Ask others.", "It is gone"),
        ("404 Client Error. (Request ID: Root=1-2)", "404 Client Error"),
        ("It is locked (os error 2). Try again.", "It is locked (os error 2)"),
    ],
)
def test_a_reason_is_one_sentence(said: str, expected: str | None) -> None:
    assert reason(ValueError(said)) == (expected or said)
