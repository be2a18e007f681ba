"""Does an adapter learn its subject and keep its class? `python -m benchmarks.subject --json OUT [--quick]`.

Trains the defaults on held-out instances (five renders each, in five contexts), with and without
the prior, and scores pictures in six other contexts: similarity to the subject's own renders in an
instance encoder, between floor (other instances of the noun) and ceiling (the subject's renders
through the autoencoder); what judges find in them; and what became of "a photo of a NOUN".
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import report
from benchmarks.toybox_runs import IDENTIFIER, attempt, check_renderer, complain, train
from dbadapter import lora
from dbadapter.base import Base, load_base
from dbadapter.cli.group import Command
from dbadapter.presets import PRESETS
from dbadapter.sampling import generate_pictures, grid
from dbadapter.toybox import captions, names, world
from dbadapter.toybox.judges import Judges, load_judges, tensor_of, to_tensor
from dbadapter.toybox.subjects import SUBJECTS, TEST_CONTEXTS, Subject, photographs, views

#: Extra `dbadapter train` options of each variant; the first is the default.
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "no_prior": ["--prior", "none"],
    "no_photo_tokens": ["--no-photo-tokens"],
    "generated": ["--prior", "generated"],
    "distill_instance": ["--prior", "distill", "--prior-source", "instance"],
    "distill_sampled": ["--prior", "distill", "--prior-source", "sampled"],
}


def similarity(vectors: Tensor, references: Tensor) -> float:
    """Return the mean cosine between unit vectors (n, d) and references (m, d), over all pairs."""
    return float((vectors @ references.T).mean())


def diversity(vectors: Tensor) -> float:
    """Return the mean of 1 - cosine over all pairs of different unit vectors, shape (n, d)."""
    cosine = vectors @ vectors.T
    return float(1 - (cosine.sum() - len(vectors)) / (len(vectors) * (len(vectors) - 1)))


def references(judge: Judges, base: Base, subject: Subject, each: int) -> tuple[Tensor, float, float]:
    """Return the subject's own vectors, the ceiling and the floor."""
    from dbadapter.toybox.render import render

    own = judge.embed(to_tensor(render(views(subject, TEST_CONTEXTS, each, stream=1))[0]))
    again = to_tensor(render(views(subject, TEST_CONTEXTS, each, stream=2))[0])
    with torch.no_grad():
        back = base.vae.decode(base.vae.encode(again).latent_dist.mode()).sample.clamp(-1, 1)
    rng = np.random.default_rng((909, subject.number))
    strangers = [
        world.Scene(
            world.sample_instance(rng, subject.noun), world.sample_view(rng, names.CONTEXTS.index(context))
        )
        for context in TEST_CONTEXTS
        for _ in range(each)
    ]
    floor = similarity(judge.embed(to_tensor(render(strangers)[0])), own)
    return own, similarity(judge.embed(back), own), floor


def pictures(
    base: Base, prompts: list[str], each: int, steps: int, guidance: float | None = None, seed: int = 1000
) -> list[Image.Image]:
    """Return `each` pictures of every prompt; guidance None is the base's preset."""
    made = generate_pictures(
        base.pipeline,
        prompts,
        num_images_per_prompt=each,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=seed,
        batch_size=12,
    )
    return [picture.image for picture in made]


def score(
    judge: Judges, subject: Subject, own: Tensor, shown: list[Image.Image], each: int
) -> dict[str, float]:
    """Return similarity, noun and context agreement of pictures in the test contexts."""
    tensors = tensor_of(shown)
    found = judge.classify(tensors)
    wanted = torch.tensor([names.CONTEXTS.index(c) for c in TEST_CONTEXTS for _ in range(each)])
    return {
        "similarity": similarity(judge.embed(tensors), own),
        "context": float((found["context"] == wanted).float().mean()),
        "noun": float((found["noun"] == names.NOUNS.index(subject.noun)).float().mean()),
    }


def measure(
    base: Base,
    judge: Judges,
    subject: Subject,
    variants: list[str],
    work: Path,
    options: list[str],
    guidance: float | None,
    quick: bool,
) -> dict[str, Any]:
    """Train one subject in every variant; return its figures, and keep a sheet of pictures beside them."""
    from dbadapter.toybox.render import render

    each, steps, class_count = (1, 8, 6) if quick else (4, 25, 24)
    folder = work / subject.name
    photos = photographs(subject, folder / "photographs")
    own, ceiling, floor = references(judge, base, subject, each)
    noun = f"{IDENTIFIER} {subject.noun}"
    prompts = [captions.prompt(noun, context) for context in TEST_CONTEXTS]
    class_prompts = [captions.prompt(captions.article(subject.noun))]

    def drawn() -> tuple[list[Image.Image], list[Image.Image]]:
        return (
            pictures(base, prompts, each, steps, guidance),
            pictures(base, class_prompts, class_count, steps, guidance),
        )

    before, class_before = drawn()
    spread = diversity(judge.embed(tensor_of(class_before)))
    start = score(judge, subject, own, before, each)
    truth = [Image.fromarray(p) for p in render(views(subject, TEST_CONTEXTS, stream=1))[0]]
    rows = [[Image.open(p) for p in photos], truth, before[::each]]
    notes = ["photographs", "true renders", "base"]
    results: dict[str, Any] = {}
    for variant in variants:
        output = folder / variant
        cost = train(folder / "photographs", output, subject.noun, [*options, *VARIANTS[variant]])
        file = output / "subject.safetensors"
        try:
            lora.apply(base.pipeline, {file: 1.0})
            after, class_after = drawn()
        finally:  # the next subject begins with the base
            lora.apply(base.pipeline, {})
        reached, vectors = score(judge, subject, own, after, each), judge.embed(tensor_of(class_after))
        results[variant] = {
            "similarity_after": reached["similarity"],
            "context_agreement": reached["context"],
            "noun_agreement": reached["noun"],
            "class_diversity_ratio": diversity(vectors) / spread,
            "class_similarity": similarity(vectors, own),
            "seconds": cost.seconds,
            "peak_memory_mb": cost.peak_memory_mb,
            "adapter_bytes": file.stat().st_size,
        }
        rows += [after[::each], after[1::each] or after, class_before[:6], class_after[:6]]
        notes += [variant, "", "class before", "class after"]
    grid(rows, notes, list(TEST_CONTEXTS)).save(folder / "sheet.png")
    return {
        "similarity_before": start["similarity"],
        "similarity_ceiling": ceiling,
        "similarity_floor": floor,
        "variants": results,
    }


def summary(subjects: dict[str, Any], variants: list[str]) -> dict[str, Any]:
    """Return means over subjects; those of variants other than the default under the variant's name."""

    def mean(values: list[float]) -> float:
        return round(float(np.mean(values)), 4)

    rows = list(subjects.values())
    shared: dict[str, Any] = {
        key: mean([row[key] for row in rows])
        for key in ("similarity_before", "similarity_ceiling", "similarity_floor")
    }
    out = dict(shared)
    for variant in variants:
        figures = {
            key: mean([row["variants"][variant][key] for row in rows]) for key in rows[0]["variants"][variant]
        }
        out.update(figures if variant == "default" else {variant: shared | figures})
    return out


@click.command(cls=Command)
@click.option("--json", "json_path", type=report.A_JSON, help="Where the figures go.")
@click.option("--work-dir", type=report.A_FOLDER, help="Keeps adapters and sheets; default: a temporary one.")
@click.option("--variants", default="default,no_prior", show_default=True, help=f"Of {', '.join(VARIANTS)}.")
@click.option(
    "--subjects",
    default=len(SUBJECTS),
    type=click.IntRange(1),
    show_default=True,
    help="How many of the held-out subjects.",
)
@click.option(
    "--option", "options", multiple=True, help="A further `dbadapter train` option, as --option=--rank=4."
)
@click.option(
    "--guidance-scale", "guidance", type=float, help="Of the pictures.  [default: the base's preset]"
)
@click.option("--quick", is_flag=True, help="One subject, few steps: checks the machinery, measures nothing.")
def main(
    json_path: Path | None,
    work_dir: Path | None,
    variants: str,
    subjects: int,
    options: tuple[str, ...],
    guidance: float | None,
    quick: bool,
) -> None:
    """Measure `dbadapter train` on held-out subjects and print JSON."""
    chosen = report.chosen(variants, VARIANTS, "variants")
    extra = [word for option in options for word in option.split("=", 1)]
    if quick:
        extra += ["--max-train-steps", "10"]
    check_renderer()
    base = load_base("toybox")
    judge = load_judges()
    work = report.work_folder(work_dir, "subject")
    measured: dict[str, Any] = {}
    failed: list[str] = []
    for subject in SUBJECTS[: 1 if quick else subjects]:
        job = functools.partial(measure, base, judge, subject, chosen, work, extra, guidance, quick)
        if (found := attempt(subject.name, job)) is None:
            failed.append(subject.name)
            continue
        measured[subject.name] = found
        click.echo(f"{subject.name}: {found}", err=True)
    cure = "see what each said above; all are measured again by the same command"
    if not measured:
        complain(failed, cure=cure)
    report.write(
        {
            "benchmark": "subject",
            "quick": quick,
            "options": list(options),
            "guidance_scale": PRESETS["toybox"].guidance_scale if guidance is None else guidance,
            **summary(measured, chosen),
            "subjects": measured,
        },
        json_path,
    )
    complain(failed, cure=cure)


if __name__ == "__main__":
    main()
