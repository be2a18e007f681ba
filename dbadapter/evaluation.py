"""Does it know the subject, and what did it forget? DreamBooth's protocol over adapters and tuned models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dbadapter import metrics
from dbadapter.base import Base, check_prompt
from dbadapter.candidates import Candidate, check_candidates, pipeline_of
from dbadapter.encoders import Encoder, PromptJudge
from dbadapter.errors import BaseError, DataError, DbadapterError, UsageError, is_out_of_memory
from dbadapter.evaluation_prompts import Prompts
from dbadapter.photographs import Photograph, find_photographs, load_crop
from dbadapter.sampling import MOST_IMAGES, MOST_STEPS, Picture, default_guidance, generate_pictures

__all__ = [
    "Evaluator",
    "Scores",
    "Settings",
    "evaluate",
    "find_references",
    "load_references",
]

Progress = Callable[[str, int, int], None]
Drawn = dict[str, list[Image.Image]]
NOT_MEASURED = "not measured"
NOT_REACHED = "not scored yet, or the evaluation was cut before it was"
_NO_MEMORY = "out of memory: close other programs, or use a machine with more memory"
# Cosines, which may all be 0; of a judge's figures each is a share where all values are right or wrong.
_COSINES = ("subject_fidelity", "prior_preservation", "drift")


@dataclass(frozen=True)
class Settings:
    """How much is drawn, and how.

    Attributes:
        num_images_per_prompt: seeds of every prompt; the paper takes 4.
        num_class_images: of the class prompt, for prior preservation and diversity.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; None is the base's family's, for tuned models too.
        seed: of the first picture; all candidates share their seeds.
        batch_size: pictures denoised together.
        resolution: pixels a side; None is the base's own.
    """

    num_images_per_prompt: int = 4
    num_class_images: int = 24
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    seed: int = 1000
    batch_size: int = 8
    resolution: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_images_per_prompt", 1), ("num_class_images", 2)):
            if not least <= getattr(self, name) <= MOST_IMAGES:
                raise UsageError(f"{name} must be from {least} to {MOST_IMAGES}, got {getattr(self, name)}")
        if not 1 <= self.num_inference_steps <= MOST_STEPS:
            raise UsageError(
                f"num_inference_steps must be from 1 to {MOST_STEPS}, got {self.num_inference_steps}"
            )
        if self.guidance_scale is not None and not (
            math.isfinite(self.guidance_scale) and self.guidance_scale >= 0
        ):
            raise UsageError(f"guidance_scale must be 0 or more, got {self.guidance_scale:g}")


def find_references(folder: str | Path) -> list[Photograph]:
    """Return the subject's photographs, undecoded.

    Raises:
        DataError: there are fewer than two, or one cannot be read.
    """
    found = find_photographs(folder)
    if len(found) < 2:
        raise DataError(
            f"{folder} holds one photograph, and what a likeness is worth is seen between two: add another"
        )
    return found


def load_references(photographs: Sequence[Photograph], side: int) -> list[Image.Image]:
    """Return photographs cropped square at `side` pixels as training crops them."""
    shown = []
    for photograph in photographs:
        pixels = (load_crop(photograph, (side, side)).pixels + 1) * 127.5
        shown.append(Image.fromarray(pixels.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()))
    return shown


@dataclass(frozen=True)
class Scores:
    """What one candidate reached.

    Attributes:
        figures: as `evaluate` gives them.
        tables: figure -> shape (prompts, seeds), to be paired with another candidate's.
        pairs: figure -> of every pair of pictures, shape (pictures, pictures), to be paired in the same way.
        drawn: "subject", "class", "unrelated" -> pictures, prompts x seeds, the seed running fastest.
    """

    figures: dict[str, Any]
    tables: dict[str, Tensor]
    pairs: dict[str, Tensor]
    drawn: Drawn


@dataclass
class Evaluator:
    """Scores pipelines of one base on one subject, all on the same prompts and seeds.

    Args:
        photographs: of the subject, at least two.
        prompts: see `choose_prompts`.
        class_noun: e.g. "dog".
        encoder: of pictures; its name goes with the figures.
        prompt_judge: for prompt fidelity; without one it is not measured.
        settings: how much is drawn.
    """

    photographs: Sequence[Image.Image]
    prompts: Prompts
    class_noun: str
    encoder: Encoder
    prompt_judge: PromptJudge | None = None
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self.references = self.encoder.embed(self.photographs)
        self._before: Tensor | None = None

    def ceiling(self) -> float:
        """Return what the photographs score among themselves."""
        return metrics.subject_ceiling(self.references)

    def score_base(self, pipeline: Any, progress: Callable[[int, int], None] | None = None) -> Scores:
        """Score the base itself, asked for the class in place of the subject; `score` needs it first."""
        if self.settings.guidance_scale is None:
            # A tuned model's own could be another, and the two would not compare.
            self.settings = replace(self.settings, guidance_scale=default_guidance(pipeline))
        drawn = self._draw(pipeline, self.class_noun, progress)
        self._before = self.encoder.embed(drawn["unrelated"]) if drawn["unrelated"] else torch.zeros(0, 1)
        return self._scores(drawn, self._before)

    def score(
        self, pipeline: Any, subject: str, progress: Callable[[int, int], None] | None = None
    ) -> Scores:
        """Score a pipeline that was taught the subject.

        Args:
            subject: its words for it, e.g. "sks dog".
        Raises:
            RuntimeError: the base was not scored before.
        """
        if self._before is None:
            raise RuntimeError("score_base comes first: drift is measured from the base's pictures")
        return self._scores(self._draw(pipeline, subject, progress), self._before)

    def _scores(self, drawn: Drawn, before: Tensor) -> Scores:
        seeds = self.settings.num_images_per_prompt
        subject, of_class = self.encoder.embed(drawn["subject"]), self.encoder.embed(drawn["class"])
        tables = {
            "subject_fidelity": metrics.similarity(subject, self.references).view(-1, seeds),
        }
        if len(before):
            tables["drift"] = metrics.drift(self.encoder.embed(drawn["unrelated"]), before).view(-1, seeds)
            # Drift says how far they moved; this, whether they are still of what was asked for.
            judged = self._judged(drawn["unrelated"], self.prompts.unrelated)
            if "prompt_fidelity" in judged:
                tables["unrelated_fidelity"] = judged["prompt_fidelity"]
        tables |= self._judged(
            drawn["subject"], [each.format(self.class_noun) for each in self.prompts.subject]
        )
        of_photographs = metrics.similarity(of_class, self.references)
        tables["prior_preservation"] = of_photographs.view(1, -1)
        if self.prompt_judge is not None:
            # Broken pictures are neither like the subject nor like each other: only this tells them.
            asked = [self.prompts.class_prompt] * len(drawn["class"])
            values = self.prompt_judge.score(drawn["class"], asked)["prompt_fidelity"]
            if not values.isnan().any():
                tables["class_fidelity"] = values.view(1, -1)
        figures: dict[str, Any] = dict.fromkeys(
            ("prompt_fidelity", "class_fidelity", "unrelated_fidelity", "drift"), NOT_MEASURED
        )
        figures |= {
            name: asdict(metrics.estimate(table, shares=_shares(name))) for name, table in tables.items()
        }
        pairs = {"diversity": metrics.distances(of_class)}
        figures |= {name: asdict(metrics.pair_estimate(table)) for name, table in pairs.items()}
        for name, figure in figures.items():
            if isinstance(figure, dict):
                _clamp(figure, *((0.0, 2.0) if name in ("drift", "diversity") else (-1.0, 1.0)))
        which, cosines = metrics.nearest(subject, self.references)
        figures["nearest_photograph"] = float(cosines.max())
        figures["nearest"] = [
            {"picture": number, "photograph": photograph, "cosine": cosine}
            for number, (photograph, cosine) in enumerate(zip(which.tolist(), cosines.tolist(), strict=True))
        ]
        rows = len(self.prompts.subject)
        figures["per_prompt"] = {
            name: table.mean(1).tolist()
            for name, table in tables.items()
            if name in ("subject_fidelity", "prompt_fidelity") and len(table) == rows
        }
        return Scores(figures, tables, pairs, drawn)

    def _judged(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the prompt judge's figures, shape (prompts, seeds), without prompts that give it nothing."""
        if self.prompt_judge is None:
            return {}
        seeds = self.settings.num_images_per_prompt
        found = self.prompt_judge.score(pictures, [prompt for prompt in prompts for _ in range(seeds)])
        tables = {name: values.view(-1, seeds) for name, values in found.items()}
        tables = {name: table[~table.isnan().any(1)] for name, table in tables.items()}
        return {name: table for name, table in tables.items() if len(table)}

    def _draw(self, pipeline: Any, subject: str, progress: Callable[[int, int], None] | None) -> Drawn:
        """Return pictures of the subject's prompts, of the class and of unrelated prompts, in their order."""
        settings, prompts = self.settings, self.prompts
        seeds = settings.num_images_per_prompt
        parts = {
            "subject": ([template.format(subject) for template in prompts.subject], seeds),
            "class": ([prompts.class_prompt], settings.num_class_images),
            "unrelated": (list(prompts.unrelated), seeds),
        }
        total = sum(len(texts) * each for texts, each in parts.values())
        done = 0
        found: Drawn = {}
        for name, (texts, each) in parts.items():
            found[name] = []
            if not texts:
                continue
            count = len(texts) * each

            def drawing(step: int, steps: int, before: int = done, count: int = count) -> None:
                if progress is not None:
                    progress(before + count * step // steps, total)

            pictures: list[Picture] = generate_pictures(
                pipeline,
                texts,
                height=settings.resolution,
                width=settings.resolution,
                num_images_per_prompt=each,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                # The same seeds for every prompt, so that the bootstrap over seeds means something.
                seeds=[settings.seed + i for _ in texts for i in range(each)],
                batch_size=settings.batch_size,
                progress=drawing,
            )
            found[name] = [picture.image for picture in pictures]
            done += count
        return found


def evaluate(
    base: Base,
    candidates: Sequence[Candidate],
    photographs: Sequence[Image.Image],
    prompts: Prompts,
    *,
    class_noun: str,
    encoder: Encoder,
    prompt_judge: PromptJudge | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    on_pictures: Callable[[str, Drawn], None] | None = None,
    on_report: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Return the figures of the base and of every candidate, over the same prompts and seeds.

    Every figure is {"value", "low", "high", "count"}, low and high its interval of 95 % over prompts
    and seeds (`metrics.estimate`):

    - subject_fidelity: mean cosine of pictures of the subject and its photographs. The ceiling is the
      photographs' own, the floor what the base draws for the class noun in the same prompts.
    - prompt_fidelity: mean score of picture and prompt, the identifier left out of it; on toybox the share
      that shows what the prompt names, and noun_agreement and context_agreement apart.
    - prior_preservation: mean cosine of pictures of the class and the photographs; less is better.
    - class_fidelity: prompt_fidelity of the pictures of the class: are they still pictures of it?
    - diversity: mean 1 - cosine over pairs of pictures of the class; more is better.
    - drift: mean 1 - cosine to the base's picture for the same unrelated prompt and seed.
    - unrelated_fidelity: prompt_fidelity of those pictures: do they still show what was asked for?
    - nearest_photograph: the largest cosine of a picture and a photograph. Well above what two photographs
      have at most ("photographs_nearest"), one was memorised.

    Beside them "nearest" (each picture of the subject: its nearest photograph, their cosine) and "per_prompt"
    (means over the seeds, in the prompts' order).

    Args:
        base: whose adapters these are; it is as it was afterwards.
        candidates: with names that differ.
        photographs, prompts, class_noun, encoder, prompt_judge, settings: as for `Evaluator`.
        progress: called with (stage, pictures done, of how many).
        on_pictures: called with "base", then each candidate's name, and its pictures (`Scores.drawn`).
        on_report: called after every candidate but the last, once one is scored, with what is returned as far
            as it is known: "complete" is False in it, and the others are "left_out".
    Raises:
        BaseError: no candidate could be scored (its pictures are not finite, memory is too small); one of
            several is "left_out", with a warning.
        DataError: a prompt is too long for the base with a candidate's words, or with the class noun.
    """
    check_candidates(base, candidates)
    for subject in (class_noun, *(candidate.subject for candidate in candidates)):
        for template in prompts.subject:
            check_prompt(base.tokenizer, template.format(subject))
    for prompt in (prompts.class_prompt, *prompts.unrelated):
        check_prompt(base.tokenizer, prompt)
    _warn_of_twins(photographs)
    chosen = settings or Settings()
    if chosen.resolution is None:
        chosen = replace(chosen, resolution=base.resolution)
    evaluator = Evaluator(photographs, prompts, class_noun, encoder, prompt_judge, chosen)
    scores = evaluator.score_base(base.pipeline, _stage(progress, "base"))
    if on_pictures is not None:
        on_pictures("base", scores.drawn)
    scores = replace(scores, drawn={})  # no candidate's pictures are kept while the next one draws
    found: dict[str, Any] = {"base": scores.figures}
    compared: dict[str, Scores] = {}
    left_out: dict[str, str] = {}
    accuracy = {**(encoder.accuracy or {}), **((prompt_judge.accuracy or {}) if prompt_judge else {})}

    def report() -> dict[str, Any]:
        missing = [name for name in (each.name for each in candidates) if name not in {*found, *left_out}]
        left = left_out | dict.fromkeys(missing, NOT_REACHED)
        return {
            "class_noun": class_noun,
            "words_for_the_subject": {candidate.name: candidate.subject for candidate in candidates},
            "image_encoder": encoder.name,
            "text_image_encoder": prompt_judge.name if prompt_judge else NOT_MEASURED,
            "settings": asdict(evaluator.settings)
            | {
                "prompts": list(prompts.subject),
                "class_prompt": prompts.class_prompt,
                "unrelated_prompts": list(prompts.unrelated),
            },
            "subject_ceiling": evaluator.ceiling(),
            "photographs_nearest": metrics.closest(evaluator.references),
            "complete": not missing,
            "figures": dict(found),
            "differences": _differences(compared),
            **({"left_out": left} if left else {}),
            **({"encoder_accuracy": accuracy} if accuracy else {}),
        }

    def tell(candidate: Candidate) -> None:
        if on_report is not None and compared and candidate is not candidates[-1]:
            on_report(report())

    for candidate in candidates:
        try:
            scores = _scores_of(candidate, base, evaluator, progress)
        except (DbadapterError, MemoryError, RuntimeError) as error:
            # What hours have drawn of the others must not be lost with it.
            if not isinstance(error, DbadapterError) and not is_out_of_memory(error):
                raise
            left_out[candidate.name] = str(error) if isinstance(error, DbadapterError) else _NO_MEMORY
            reason = left_out[candidate.name]
            warnings.warn(f"{candidate.path} is left out: {reason}", UserWarning, stacklevel=2)
            tell(candidate)
            continue
        found[candidate.name] = scores.figures | {"bytes": candidate.bytes}
        if on_pictures is not None:
            on_pictures(candidate.name, scores.drawn)
        compared[candidate.name] = scores = replace(scores, drawn={})
        tell(candidate)
    if left_out and not compared:
        raise BaseError("; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    return report()


def _scores_of(candidate: Candidate, base: Base, evaluator: Evaluator, progress: Progress | None) -> Scores:
    """Score one candidate; its model is gone when this returns, before the next one is loaded."""
    with pipeline_of(base, candidate) as pipeline:
        return evaluator.score(pipeline, candidate.subject, _stage(progress, candidate.name))


def _warn_of_twins(photographs: Sequence[Image.Image]) -> None:
    if len({picture.tobytes() for picture in photographs}) < len(photographs):
        warnings.warn(
            "two of the photographs are the same picture: the likeness among them is too high by that",
            UserWarning,
            stacklevel=3,
        )


def _differences(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Return each candidate against the first, paired by prompt and seed."""
    if not scores:
        return []
    first, *others = scores
    against = scores[first]
    found = []
    for name in others:
        each = scores[name]
        figures = {
            key: metrics.difference(table, against.tables[key], shares=_shares(key))
            for key, table in each.tables.items()
        } | {key: metrics.pair_difference(table, against.pairs[key]) for key, table in each.pairs.items()}
        found += [
            {"of": name, "minus": first, "figure": key, **_clamp(asdict(figure), -2.0, 2.0)}
            for key, figure in figures.items()
        ]
    return found


def _clamp(figure: dict[str, Any], least: float, most: float) -> dict[str, Any]:
    """Cut a known interval, in place, to what the figure can be; two seeds may give a much wider one."""
    if metrics.is_known(figure["low"], figure["high"]):
        figure |= {"low": max(figure["low"], least), "high": min(figure["high"], most)}
    return figure


def _shares(figure: str) -> bool | None:
    return False if figure in _COSINES else None


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(f"drawing, {name}", done, total)
