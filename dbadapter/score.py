"""One number to choose by: checkpoints of a run, and a benchmark's learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["ROOM", "overall"]

ROOM = 0.05  # of cosine, between the base and the photographs: less cannot be told from chance


def overall(figures: Mapping[str, Any], before: Mapping[str, Any], ceiling: float) -> dict[str, float]:
    """Return one number between 0 and 1 to choose by, and its parts.

        score = (likeness * obedience * class_kept * class_spread * class_obedience) ^ (1/5)

    likeness: the way from the base's subject fidelity to the ceiling; obedience: prompt fidelity beside the
    base's; class_kept: what is left of the way from the base's prior preservation to the ceiling;
    class_spread: diversity beside the base's; class_obedience: class fidelity beside the base's. All within
    0 and 1; a figure that is not measured is left out of the mean. A way is at least `ROOM` long: where the
    base's pictures are as near the photographs as these to each other, chance would decide. Our own: no
    paper's.

    Args:
        figures: a candidate's, as `evaluate` gives them.
        before: the base's.
        ceiling: `subject_ceiling`.
    """

    def of(found: Mapping[str, Any], name: str) -> float:
        return float(found[name]["value"])

    def way(value: float, start: float) -> float:
        return min(max((value - start) / max(ceiling - start, ROOM), 0.0), 1.0)

    def share(name: str) -> float:
        return min(max(of(figures, name), 0.0) / max(of(before, name), 1e-6), 1.0)

    parts = {
        "likeness": way(of(figures, "subject_fidelity"), of(before, "subject_fidelity")),
        "class_kept": 1 - way(of(figures, "prior_preservation"), of(before, "prior_preservation")),
        "class_spread": share("diversity"),
    }
    if isinstance(figures["prompt_fidelity"], Mapping):
        parts["obedience"] = share("prompt_fidelity")
    if isinstance(figures["class_fidelity"], Mapping):
        parts["class_obedience"] = share("class_fidelity")
    return {"score": math.prod(parts.values()) ** (1 / len(parts)), **parts}
