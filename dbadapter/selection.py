"""`--select best`: checkpoints scored while training, the best one kept, an end when none gets better.

A checkpoint's score is `score.overall` of a few pictures, always of the same prompts and seeds: is the
subject there, does it obey the prompt, and is the class what it was?
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from dbadapter.checkpoint import Best
from dbadapter.config import TrainConfig
from dbadapter.curve import draw_curve
from dbadapter.encoders import (
    Encoder,
    PromptJudge,
    default_encoder,
    default_prompt_judge,
    load_encoder,
    load_prompt_judge,
)
from dbadapter.errors import BaseError, DataError
from dbadapter.evaluation import (
    Evaluator,
    Scores,
    Settings,
    find_references,
    load_references,
)
from dbadapter.evaluation_prompts import selection_prompts
from dbadapter.photographs import find_photographs
from dbadapter.preparation import Run
from dbadapter.score import ROOM, overall

__all__ = [
    "FIRST",
    "GIVEN",
    "PARTS",
    "PATIENCE",
    "Selection",
    "best_of",
    "check_selection",
    "chosen_step",
    "curve",
    "exhausted",
    "remembered",
    "scored_from",
]

PARTS = ("score", "likeness", "obedience", "class_kept", "class_spread", "class_obedience")
GIVEN = "max_train_steps"  # of a line with a score: what the run was given then
PATIENCE = 3  # scores without a better one, then the run ends
FIRST = 0.3  # of the run's steps: nothing is worth choosing before
_SEED = 7000  # far from those of `evaluate` and of the samples
_CLASS_IMAGES = 8
_INFERENCE_STEPS = 15

Progress = Callable[[str, int, int], None]


@dataclass
class Selection:
    """The scores of one run's checkpoints.

    Args:
        evaluator: on the run's photographs.
        subject: the words for it, e.g. "sks dog".
        base: the base's scores, by the run's own model before its first step.
        history: (step, score and parts), those before a resume included.
        broken: the model gave pictures that are not finite.
    """

    evaluator: Evaluator
    subject: str
    base: Scores
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    broken: bool = False

    @classmethod
    def start(
        cls, run: Run, metrics: Sequence[Mapping[str, Any]], progress: Progress | None = None
    ) -> Selection:
        """Score the base, by a run whose adapters still do nothing.

        Args:
            run: prepared, nothing restored yet, VAE and text encoders kept.
            metrics: the lines of an earlier part of the run.
        Raises:
            UsageError: an encoder is not installed or cannot be loaded.
            DataError: fewer than two photographs.
        """
        config, family = run.config, run.base.family
        encoder, judge = _judges(config, family, run.base.device.type)
        evaluator = Evaluator(
            load_references(find_references(config.instance_data_dir), max(run.base.resolution, 64)),
            selection_prompts(family, config.class_noun),
            config.class_noun,
            encoder,
            judge,
            Settings(
                num_images_per_prompt=1,
                num_class_images=_CLASS_IMAGES,
                num_inference_steps=_INFERENCE_STEPS,
                resolution=config.resolution,
                seed=_SEED,
            ),
        )
        with run.autocast():
            base = evaluator.score_base(run.base.pipeline, _stage(progress))
        _warn_of_little_room(evaluator, base)
        earlier = remembered(metrics, int(config.max_train_steps or 0))
        # Figures alone: pictures would stay in memory for the whole run.
        subject = f"{config.identifier} {config.class_noun}"
        return cls(evaluator, subject, replace(base, drawn={}), earlier)

    def score(self, run: Run) -> dict[str, float]:
        """Score the model in training as it is at this step; return the score and its parts.

        Nothing comes back where it gives pictures that are not finite.
        """
        with run.autocast():
            try:
                scores = self.evaluator.score(run.base.pipeline, self.subject)
            except BaseError:
                return {}
        return overall(scores.figures, self.base.figures, self.evaluator.ceiling())

    def note(self, step: int, parts: Mapping[str, float]) -> None:
        """Remember a step's score; of several processes all remember their mean."""
        self.history.append((step, dict(parts)))

    def exhausted(self) -> bool:
        """Return whether the last `PATIENCE` scores all fell short of an earlier one, or it is broken."""
        return self.broken or exhausted([parts["score"] for _, parts in self.history])


def check_selection(config: TrainConfig, family: str) -> None:
    """Pass if checkpoints can be scored.

    Raises:
        UsageError: an encoder is not installed or cannot be loaded.
        DataError: there are fewer than two photographs.
    """
    count = len(find_photographs(config.instance_data_dir))
    if count < 2:
        raise DataError(
            f"{config.instance_data_dir} holds {count} photograph, and --select best needs two to know "
            "what a likeness is worth: add one, or leave it out"
        )
    _judges(config, family, "cpu")


def _warn_of_little_room(evaluator: Evaluator, base: Scores) -> None:
    """Warn of what the encoder cannot tell apart before anything is learned."""
    ceiling, name = evaluator.ceiling(), evaluator.encoder.name
    room = ceiling - float(base.figures["subject_fidelity"]["value"])
    if room < ROOM:
        warnings.warn(
            f"by {name} the photographs are hardly more like each other than the base's pictures are like "
            f"them (by {room:.2f}): are all of one subject? A finer --image-encoder may tell",
            UserWarning,
            stacklevel=1,
        )
    room = ceiling - float(base.figures["prior_preservation"]["value"])
    if room < ROOM:
        warnings.warn(
            f"by {name} the base's pictures of the class are as near the photographs as these to each other "
            f"({room:.2f} is between them), so whether the class becomes the subject is hardly seen: a finer "
            "--image-encoder may tell",
            UserWarning,
            stacklevel=1,
        )


def _judges(config: TrainConfig, family: str, device: str) -> tuple[Encoder, PromptJudge | None]:
    encoder = load_encoder(config.image_encoder or default_encoder(family), device)
    of_prompts = config.text_image_encoder or default_prompt_judge(family)
    return encoder, load_prompt_judge(of_prompts, device) if of_prompts else None


def exhausted(scores: Sequence[float]) -> bool:
    """Return whether the last `PATIENCE` of some scores all fell short of an earlier one.

    Equal scores do not: all are 0 while a subject is not there yet.
    """
    earlier, last = scores[:-PATIENCE], scores[-PATIENCE:]
    return bool(earlier) and max(last) < max(earlier)


def remembered(metrics: Sequence[Mapping[str, Any]], total: int) -> list[tuple[int, dict[str, float]]]:
    """Return (step, score and parts) of what counts of a run's lines when it goes on.

    A run that had ended and is given another number of steps has new patience, however often it was cut since
    then; one that had ended and was cut before its file was whole has not.

    Args:
        metrics: lines of metrics.jsonl; a score's has the steps that the run was given then.
        total: steps that it is given now.
    """
    found: list[tuple[int, dict[str, float]]] = []
    before = None
    for line in [*_scored(metrics), {GIVEN: total}]:
        given = line.get(GIVEN)  # runs of earlier versions did not note it
        if given != before and exhausted([parts["score"] for _, parts in found]):
            found = []
        before = given
        if "score" in line:
            found.append((int(line["step"]), _parts(line)))
    return found


def scored_from(config: TrainConfig) -> int:
    """Return the first step that is scored."""
    return int(FIRST * int(config.max_train_steps or 0))


def chosen_step(metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the step with the best score in a run's lines, of equal ones the last; None without a score."""
    best = best_of(metrics, None)
    return best.step if best is not None else None


def best_of(metrics: Sequence[Mapping[str, Any]], steps: Collection[int] | None) -> Best | None:
    """Return the best score in a run's lines, as `checkpoint.Best`; None without a score.

    Args:
        metrics: lines of metrics.jsonl.
        steps: only these; None for all.
    """
    scored = [line for line in _scored(metrics) if steps is None or line["step"] in steps]
    # In the very numbers that training compares, of equal ones the last.
    found = [Best(int(line["step"]), 1 - float(line["score"])) for line in scored]
    return min(found, key=lambda best: (best.loss, -best.step), default=None)


def _parts(line: Mapping[str, Any]) -> dict[str, float]:
    return {part: float(line[part]) for part in PARTS if line.get(part) is not None}


def _scored(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in metrics if line.get("score") is not None]


def curve(metrics: Sequence[Mapping[str, Any]], chosen: int | None) -> Image.Image | None:
    """Return the picture of a run's scores, None where there are none.

    Args:
        metrics: lines of metrics.jsonl.
        chosen: the step that became the file.
    """
    scored = _scored(metrics)
    if not scored:
        return None
    points = [(int(line["step"]), _parts(line)) for line in scored]
    lines = {
        part.replace("_", " "): [(step, parts[part]) for step, parts in points if part in parts]
        for part in PARTS
    }
    return draw_curve({name: line for name, line in lines.items() if line}, chosen)


def _stage(progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress("scoring the base", done, total)
