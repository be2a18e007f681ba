"""How often is `--class-noun auto` right? `python -m benchmarks.class_noun --data DIR --json OUT [--quick]`.

DIR holds a folder of photographs a subject and `prompts_and_classes.txt`, as DreamBooth's data set does
(https://github.com/google/dreambooth, folder `dataset`; its pictures are not part of this project). Every
subject is put to EfficientNet-Lite2 with all of its photographs and with sets of three of them, and to
toybox's classifier, which knows few of them and should say so. Renders of new instances show that it answers
where it can (they need the extra `pretrain`).
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks import report
from benchmarks.toybox_runs import check_renderer
from dbadapter.class_noun import Classifier, ballots, count, load_classifier
from dbadapter.cli.group import Command
from dbadapter.config import TrainConfig
from dbadapter.photographs import find_photographs

THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RENDERED = 240  # instances, twenty of every noun, five views each
STREAM = 88_001  # of random numbers, which nothing else draws from
SETS = 10  # of three photographs, at most, a subject
# Besides the paper's own noun: words that a prompt could use in its place. Written down before the first run.
ALSO = {
    "backpack": ("bag",),
    "boot": ("shoe",),
    "cartoon": ("comic book",),
    "glasses": ("sunglasses",),
    "sneaker": ("shoe",),
    "stuffed animal": ("toy",),
}
ALSO_OF = {"rc_car": ("car",)}


def read_nouns(path: Path) -> dict[str, str]:
    """Return subject -> class noun of DreamBooth's table: the lines "subject,class" under its header.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no such header.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    start = lines.index("subject_name,class") + 1
    rows = itertools.takewhile(lambda line: "," in line, lines[start:])
    return {name: noun.strip() for name, noun in (row.split(",", 1) for row in rows)}


def accepted(subject: str, noun: str) -> set[str]:
    """Return the nouns that count as right for a subject."""
    return {noun, *ALSO.get(noun, ()), *ALSO_OF.get(subject, ())}


def row(votes: Tensor, classifier: Classifier, right: set[str]) -> dict[str, Any]:
    """Return what a vote found; `votes` of shape (photographs, classes)."""
    ranked, finer = count(votes, classifier.nouns, classifier.classes)
    return {
        "found": ranked[0][0],
        "share": round(ranked[0][1], 4),
        "right": ranked[0][0] in right,
        "finer": finer,
        "next": [[noun, round(share, 4)] for noun, share in ranked[1:]],
        "photographs": len(votes),
    }


def sets_of_three(votes: Tensor, seed: int) -> list[Tensor]:
    """Return up to ten different sets of three photographs' votes."""
    found = list(itertools.combinations(range(len(votes)), 3))
    random.Random(seed).shuffle(found)
    return [votes[list(each)] for each in found[:SETS]]


def summary(groups: list[list[dict[str, Any]]], thresholds: tuple[float, ...] = THRESHOLDS) -> dict[str, Any]:
    """Return, for each threshold, the subjects answered right, answered wrong and refused.

    Args:
        groups: the rows of each subject; a subject counts once, shared among its rows.
    """
    out = {}
    for threshold in thresholds:
        sums = {"right": 0.0, "wrong": 0.0, "refused": 0.0}
        for rows in groups:
            for each in rows:
                told = "refused" if each["share"] < threshold else "right" if each["right"] else "wrong"
                sums[told] += 1 / len(rows)
        out[str(threshold)] = {name: round(value, 1) for name, value in sums.items()}
    return out


def measure(data: Path, subjects: dict[str, str], base: str, *, seed: int) -> dict[str, Any]:
    """Return the figures of the classifier that a base gets."""
    classifier = load_classifier(TrainConfig(data, "auto", data / "out", base=base))
    rows, threes = {}, []
    for name, noun in subjects.items():
        votes = ballots(find_photographs(data / name), classifier)
        right = accepted(name, noun)
        rows[name] = {"noun": noun, **row(votes, classifier, right)}
        threes.append([row(each, classifier, right) for each in sets_of_three(votes, seed)])
        click.echo(f"{name}: {rows[name]['found']} {rows[name]['share']:.2f}", err=True)
    return {
        "classifier": classifier.name,
        "threshold": classifier.sure,
        "subjects": rows,
        "all_photographs": summary([[each] for each in rows.values()]),
        "three_photographs": summary(threes),
    }


def renders(instances: int, seed: int) -> dict[str, Any]:
    """Return toybox's figures on renders of instances that nothing was trained on."""
    from dbadapter.toybox import names, world
    from dbadapter.toybox.render import render

    classifier = load_classifier(TrainConfig(Path("renders"), "auto", Path("out"), base=TrainConfig.base))
    rows = []
    for number in range(instances):
        rng = np.random.default_rng((STREAM, seed, number))
        noun = names.NOUNS[number % len(names.NOUNS)]
        one = world.sample_instance(rng, noun)
        drawn = render([world.Scene(one, world.sample_view(rng)) for _ in range(5)])[0]
        votes = classifier.probabilities([Image.fromarray(picture) for picture in drawn])
        rows.append(row(votes, classifier, {noun}))
    shares = [each["share"] for each in rows]
    return {"instances": instances, "least_share": min(shares), **summary([[each] for each in rows])}


@click.command(cls=Command)
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="DreamBooth's data set.")  # fmt: skip
@click.option("--json", "json_path", required=True, type=report.A_JSON, help="Where the figures go.")
@click.option("--quick", is_flag=True, help="Two subjects; measures nothing.")
@click.option(
    "--seed", default=0, type=click.IntRange(0), show_default=True, help="Of the sets of three photographs."
)
def main(data: Path, json_path: Path, quick: bool, seed: int) -> None:
    """Measure how often `--class-noun auto` is right, wrong, or does not answer."""
    check_renderer()
    try:
        nouns = read_nouns(data / "prompts_and_classes.txt")
    except (OSError, ValueError) as error:
        raise click.ClickException(
            f"{data}/prompts_and_classes.txt is not the data set's table ({error}): give --data the folder "
            "`dataset` of google/dreambooth"
        ) from None
    present = {name: noun for name, noun in nouns.items() if (data / name).is_dir()}
    if not present:
        raise click.ClickException(f"{data} holds none of the data set's subjects")
    if quick:
        present = dict(itertools.islice(present.items(), 2))
    found = {
        "real": measure(data, present, "any", seed=seed),
        "toybox": measure(data, present, TrainConfig.base, seed=seed),
        "toybox_renders": renders(12 if quick else RENDERED, seed),
    }
    report.write({"benchmark": "class_noun", "seed": seed, "quick": quick, **found}, json_path)


if __name__ == "__main__":
    main()
