"""Does it know the subject, and what did it forget? DreamBooth's protocol over adapters and tuned models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dbadapter import lora, metrics
from dbadapter.adapter import Adapter
from dbadapter.base import Base, load_base
from dbadapter.encoders import Encoder
from dbadapter.errors import DataError, UsageError
from dbadapter.evaluation_prompts import Prompts
from dbadapter.photographs import find_photographs, load_crop
from dbadapter.sampling import Picture, generate_pictures

__all__ = ["Candidate", "Settings", "evaluate", "load_candidate", "load_photographs", "trigger_of"]

Progress = Callable[[str, int, int], None]
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Settings:
    """How much is drawn, and how.

    Attributes:
        num_images_per_prompt: seeds of every prompt; the paper takes 4.
        num_class_images: of the class prompt, for prior preservation and diversity.
        num_inference_steps, guidance_scale: as in `generate_pictures`.
        seed: of the first picture; all candidates share their seeds.
        batch_size: pictures denoised together.
    """

    num_images_per_prompt: int = 4
    num_class_images: int = 24
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    seed: int = 1000
    batch_size: int = 8


@dataclass(frozen=True)
class Candidate:
    """What is scored: an adapter on the base, or a fully tuned model.

    Attributes:
        name: for the report.
        path: where it came from.
        subject: its words for the subject, e.g. "sks dog".
        adapter: None for a tuned model, whose folder is `path`.
        bytes: on disk.
    """

    name: str
    path: Path
    subject: str
    adapter: Adapter | None
    bytes: int


def load_candidate(path: str | Path, class_noun: str, identifier: str | None = None) -> Candidate:
    """Return an adapter's file or a tuned model's folder as a candidate.

    Raises:
        UsageError: its words for the subject are not known; the message has the cure.
        AdapterError: the file is broken.
    """
    path = Path(path)
    if path.is_dir():
        if identifier is None:
            raise UsageError(f"{path} does not say its word for the subject: pass --identifier, e.g. sks")
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return Candidate(path.name, path, f"{identifier} {class_noun}", None, size)
    adapter = lora.load_adapter(path)
    subject = f"{identifier} {class_noun}" if identifier else trigger_of(adapter)
    if not subject:
        raise UsageError(
            f"{path} does not say its words for the subject (modelspec.trigger_phrase): pass --identifier"
        )
    return Candidate(path.stem, path, subject, adapter, path.stat().st_size)


def trigger_of(adapter: Adapter) -> str:
    """Return the words for the subject that an adapter's file tells, or nothing."""
    return adapter.metadata.get("modelspec.trigger_phrase", "").strip()


def load_photographs(folder: str | Path, side: int) -> list[Image.Image]:
    """Return the subject's photographs, cropped square at `side` pixels as training crops them.

    Raises:
        DataError: there are fewer than two, or one cannot be read.
    """
    found = find_photographs(folder)
    if len(found) < 2:
        raise DataError(
            f"{folder} holds {len(found)} photograph; two are needed to say what a likeness is worth"
        )
    shown = []
    for photograph in found:
        pixels = (load_crop(photograph, (side, side)).pixels + 1) * 127.5
        shown.append(Image.fromarray(pixels.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()))
    return shown


def evaluate(
    base: Base,
    candidates: Sequence[Candidate],
    photographs: Sequence[Image.Image],
    prompts: Prompts,
    *,
    class_noun: str,
    encoder: Encoder,
    text_image_encoder: Encoder | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the figures of the base and of every candidate, over the same prompts and seeds.

    Every figure is {"value", "low", "high", "count"}, low and high its interval of 95 % (bootstrap over
    prompts and seeds, `metrics`):

    - subject_fidelity: mean cosine of pictures of the subject and its photographs. The ceiling is the
      photographs' own, the floor what the base draws for the class noun in the same prompts.
    - prompt_fidelity: mean cosine of picture and prompt, the identifier left out of it.
    - prior_preservation: mean cosine of pictures of the class and the photographs; less is better.
    - diversity: mean 1 - cosine over pairs of pictures of the class; more is better.
    - drift: mean 1 - cosine to the base's picture for the same unrelated prompt and seed.
    - nearest_photograph: the largest cosine of a picture and a photograph; near 1, it was memorised.

    Args:
        base: whose adapters these are; it is as it was afterwards.
        candidates: with names that differ.
        photographs: of the subject, at least two.
        prompts: see `choose_prompts`.
        class_noun: e.g. "dog".
        encoder: of pictures; its name goes with the figures.
        text_image_encoder: for prompt fidelity; without one it is not measured.
        settings: None means the defaults.
        progress: called with (stage, pictures done, of how many).
    """
    settings = settings or Settings()
    judge = _Judge(encoder, text_image_encoder, encoder.embed(photographs), prompts, class_noun)
    drawn = _draw(base.pipeline, prompts, class_noun, settings, _stage(progress, "base"))
    before = encoder.embed(drawn["unrelated"])
    seeds = settings.num_images_per_prompt
    found: dict[str, Any] = {"base": judge.score(drawn, before, seeds)[0]}
    tables: dict[str, dict[str, Tensor]] = {}
    for candidate in candidates:
        with _pipeline_of(base, candidate) as pipeline:
            drawn = _draw(pipeline, prompts, candidate.subject, settings, _stage(progress, candidate.name))
        figures, tables[candidate.name] = judge.score(drawn, before, seeds)
        found[candidate.name] = figures | {"bytes": candidate.bytes}
    return {
        "class_noun": class_noun,
        "image_encoder": encoder.name,
        "text_image_encoder": text_image_encoder.name if text_image_encoder else NOT_MEASURED,
        "settings": asdict(settings)
        | {"prompts": list(prompts.subject), "class_prompt": prompts.class_prompt},
        "subject_ceiling": metrics.subject_ceiling(judge.photographs),
        "figures": found,
        "differences": _differences(tables),
    }


@dataclass(frozen=True)
class _Judge:
    encoder: Encoder
    text_image_encoder: Encoder | None
    photographs: Tensor
    prompts: Prompts
    class_noun: str

    def score(
        self, drawn: Mapping[str, list[Image.Image]], before: Tensor, seeds: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the figures, and those tables of (prompts, seeds) that can be paired with another's."""
        subject, of_class = self.encoder.embed(drawn["subject"]), self.encoder.embed(drawn["class"])
        tables = {
            "subject_fidelity": metrics.similarity(subject, self.photographs).view(-1, seeds),
            "drift": metrics.drift(self.encoder.embed(drawn["unrelated"]), before).view(-1, seeds),
        }
        text = self.text_image_encoder
        if text is not None and text.embed_text is not None:
            said = [each.format(self.class_noun) for each in self.prompts.subject for _ in range(seeds)]
            cosines = metrics.prompt_similarity(text.embed(drawn["subject"]), text.embed_text(said))
            tables["prompt_fidelity"] = cosines.view(-1, seeds)
        shown: dict[str, Any] = {"prompt_fidelity": NOT_MEASURED}
        shown |= {name: asdict(metrics.estimate(table)) for name, table in tables.items()}
        of_photographs = metrics.similarity(of_class, self.photographs).view(1, -1)
        shown["prior_preservation"] = asdict(metrics.estimate(of_photographs))
        shown["diversity"] = asdict(metrics.pair_estimate(metrics.distances(of_class)))
        shown["nearest_photograph"] = float(metrics.nearest(subject, self.photographs)[1].max())
        return shown, tables


def _draw(
    pipeline: Any,
    prompts: Prompts,
    subject: str,
    settings: Settings,
    progress: Callable[[int, int], None] | None,
) -> dict[str, list[Image.Image]]:
    """Return pictures of the subject's prompts, of the class and of unrelated prompts, in their order."""
    seeds = settings.num_images_per_prompt
    parts = {
        "subject": ([template.format(subject) for template in prompts.subject], seeds),
        "class": ([prompts.class_prompt], settings.num_class_images),
        "unrelated": (list(prompts.unrelated), seeds),
    }
    total = sum(len(texts) * each for texts, each in parts.values())
    done = 0
    found = {}
    for name, (texts, each) in parts.items():
        pictures: list[Picture] = generate_pictures(
            pipeline,
            texts,
            num_images_per_prompt=each,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            # The same seeds for every prompt, so that the bootstrap over seeds means something.
            seeds=[settings.seed + i for _ in texts for i in range(each)],
            batch_size=settings.batch_size,
        )
        found[name] = [picture.image for picture in pictures]
        done += len(pictures)
        if progress is not None:
            progress(done, total)
    return found


@contextmanager
def _pipeline_of(base: Base, candidate: Candidate) -> Iterator[Any]:
    """Give the candidate's pipeline; the base is as it was afterwards."""
    if candidate.adapter is None:
        yield load_base(str(candidate.path)).pipeline
        return
    lora.apply(base.pipeline, {candidate.adapter: 1.0})
    try:
        yield base.pipeline
    finally:
        lora.apply(base.pipeline, {})


def _differences(tables: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Return each candidate against the first, paired by prompt and seed."""
    names = list(tables)
    return [
        {
            "of": name,
            "minus": names[0],
            "figure": key,
            **asdict(metrics.difference(table, tables[names[0]][key])),
        }
        for name in names[1:]
        for key, table in tables[name].items()
    ]


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(f"drawing, {name}", done, total)
