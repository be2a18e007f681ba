"""Is the embedded base any good? `python -m benchmarks.toybox --json OUT [--grid OUT.png] [--quick]`.

The autoencoder's PSNR on held-out renders, and how often judges trained on renders find in generated
pictures (guidance 5) what the prompt named: every noun in every context, once without and once with
a colour. Beside it the judges' own accuracy on renders that they never saw.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from benchmarks import report
from benchmarks.toybox_runs import check_renderer
from dbadapter.base import Base, load_base
from dbadapter.cli.group import Command
from dbadapter.sampling import generate_pictures, grid
from dbadapter.toybox import captions, names, world
from dbadapter.toybox.judges import Judges, load_judges, tensor_of, to_tensor

_HELD_OUT = 90_001


def vae_psnr(base: Base, count: int) -> float:
    """Return the mean PSNR in dB of `count` held-out renders through the autoencoder, 8 bits, peak 255."""
    from dbadapter.toybox.render import render

    scenes = [world.sample_scene(np.random.default_rng((_HELD_OUT, i))) for i in range(count)]
    pictures = to_tensor(render(scenes)[0])
    with torch.no_grad():
        back = torch.cat(
            [base.vae.decode(base.vae.encode(p).latent_dist.mode()).sample for p in pictures.split(64)]
        )
    error = (back.clamp(-1, 1) - pictures).square().mean((1, 2, 3)) / 4
    return float((-10 * torch.log10(error)).mean())


def agreement(
    base: Base, judge: Judges, contexts: tuple[str, ...], steps: int
) -> tuple[dict[str, object], list[Image.Image]]:
    """Return agreement of generated pictures with their prompts, and the pictures without a colour word."""
    colors = list(names.COLORS)
    pairs = [(noun, context) for noun in names.NOUNS for context in contexts]
    plain = [captions.prompt(captions.article(noun), context) for noun, context in pairs]
    colored = [
        captions.prompt(captions.article(f"{colors[i % len(colors)]} {noun}"), context)
        for i, (noun, context) in enumerate(pairs)
    ]
    pictures = generate_pictures(
        base.pipeline, plain + colored, num_inference_steps=steps, guidance_scale=5.0, seed=0, batch_size=16
    )
    images = [picture.image for picture in pictures]
    found = judge.classify(tensor_of(images))
    nouns = torch.tensor([names.NOUNS.index(noun) for noun, _ in pairs] * 2)
    places = torch.tensor([names.CONTEXTS.index(context) for _, context in pairs] * 2)
    shades = torch.tensor([i % len(colors) for i in range(len(pairs))])
    by_noun, by_context = defaultdict(list), defaultdict(list)
    for i, (noun, context) in enumerate(pairs * 2):
        by_noun[noun].append(float(found["noun"][i] == nouns[i]))
        by_context[context].append(float(found["context"][i] == places[i]))
    each = {noun: round(float(np.mean(hits)), 3) for noun, hits in by_noun.items()}
    worst = min(each, key=lambda noun: each[noun])
    return {
        "noun_agreement": float((found["noun"] == nouns).float().mean()),
        "worst_noun": each[worst],
        "worst_noun_name": worst,
        "context_agreement": float((found["context"] == places).float().mean()),
        "color_agreement": float((found["color"][len(pairs) :] == shades).float().mean()),
        "by_noun": each,
        "by_context": {context: round(float(np.mean(hits)), 3) for context, hits in by_context.items()},
        "pictures": len(images),
    }, images[: len(pairs)]


@click.command(cls=Command)
@click.option("--base", "spec", default="toybox", show_default=True, help="A folder of the same world.")
@click.option("--json", "json_path", type=report.A_JSON, help="Where the figures go.")
@click.option("--grid", "grid_path", type=report.AN_IMAGE, help="A picture of every noun in every context.")
@click.option("--quick", is_flag=True, help="Three contexts: checks the machinery, measures nothing.")
def main(spec: str, json_path: Path | None, grid_path: Path | None, quick: bool) -> None:
    """Measure the embedded base and print JSON."""
    check_renderer()
    torch.manual_seed(0)
    base = load_base(spec)
    judge = load_judges()
    contexts = tuple(context for context in names.CONTEXTS if context)[: 3 if quick else None]
    figures, images = agreement(base, judge, contexts, 10 if quick else 25)
    report.write(
        {
            "benchmark": "toybox",
            "quick": quick,
            "vae_psnr": round(vae_psnr(base, 64 if quick else 512), 2),
            **{k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()},
            "classifier_accuracy": {k: round(v, 3) for k, v in judge.accuracy.items()},
            "parameters": {
                name: sum(p.numel() for p in getattr(base, name).parameters())
                for name in ("unet", "text_encoder", "vae")
            },
        },
        json_path,
    )
    if grid_path is not None:
        rows = [images[i : i + len(contexts)] for i in range(0, len(images), len(contexts))]
        sheet = grid(rows, list(names.NOUNS), list(contexts), scale=1 if len(contexts) > 6 else 2)
        report.save_image(sheet, grid_path)


if __name__ == "__main__":
    main()
