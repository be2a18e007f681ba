"""One family of exceptions; the command line prints each as one line and exits with its code."""

from __future__ import annotations

import re

__all__ = [
    "AdapterError",
    "BaseError",
    "ConfigError",
    "DataError",
    "DbadapterError",
    "ExportError",
    "OutputError",
    "TrainingError",
    "UsageError",
    "is_out_of_memory",
    "reason",
]


class DbadapterError(Exception):
    """Base of every error that dbadapter raises on purpose.

    The message is one line: what was expected, what was got, the file or key, and the cure.
    """

    exit_code = 1


class UsageError(DbadapterError):
    """The call itself is wrong: an impossible number, flags that exclude each other."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration has faults; the message lists all of them."""


class DataError(DbadapterError):
    """A photograph, a folder of photographs or a prompt cannot be used."""


class BaseError(DbadapterError):
    """A base model is missing, broken, or of an unsupported kind."""


class AdapterError(DbadapterError):
    """An adapter file is broken or does not fit the base."""


class ExportError(DbadapterError):
    """An ONNX export failed or differs from torch by more than the tolerance."""


class OutputError(DbadapterError):
    """An output exists already or cannot be written."""


class TrainingError(DbadapterError):
    """Training cannot go on, e.g. the loss is not finite."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a machine or a GPU had no memory left."""
    # By name and words: importing torch only to know its class would cost seconds on a usage error.
    words = ("DefaultCPUAllocator: can't allocate memory", "STATUS_ALLOC_FAILED", "out of memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(each in str(error) for each in words))


def reason(error: BaseException) -> str:
    """Return why a library failed: its error's first sentence, or the error's kind if it has no words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A full stop before what begins a sentence, but not that of an abbreviation.
    ends = r"(?<!e\.g)(?<!i\.e)(?<!\betc)(?<!\bvs)\.\s+(?=[A-Z(`'\"])"
    return re.split(ends, lines[0])[0].rstrip(".") if lines else type(error).__name__
