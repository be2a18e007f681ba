"""What `benchmarks.quality` runs: methods, subjects, seeds, the search for each method's rate, the order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product

import click

from dbadapter.base import Precision
from dbadapter.config import TrainConfig
from dbadapter.evaluation import Settings
from dbadapter.presets import PRESETS
from dbadapter.toybox.subjects import TEST_CONTEXTS, Subject

__all__ = [
    "METHODS",
    "PRECISIONS",
    "QUICK",
    "SEARCHED",
    "SEARCH_SUBJECTS",
    "SEEDS",
    "SETTINGS",
    "SUBJECTS",
    "Method",
    "Work",
    "part_of",
    "recipe",
    "share",
    "works",
]


@dataclass(frozen=True)
class Method:
    """One way to teach a subject.

    Attributes:
        about: for the table.
        options: of `dbadapter train`, beside the defaults.
        main: it is run with all its seeds first.
        full: it trains the models whole.
    """

    about: str
    options: tuple[str, ...] = ()
    main: bool = False
    full: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "full", "--full" in self.options)


def _rank(rank: int) -> Method:
    return Method(f"adapter, rank {rank}", ("--rank", str(rank)))


#: One factor at a time around the defaults; the `main` ones get all their seeds first.
METHODS: Mapping[str, Method] = {
    "adapter": Method("the defaults: rank 8, distilled prior", main=True),
    "full": Method("full fine-tuning, UNet and text encoder", ("--full",), main=True),
    "adapter-no-prior": Method("adapter without a prior", ("--prior", "none"), main=True),
    "full-no-prior": Method("full, without a prior", ("--full", "--prior", "none"), main=True),
    "rank-1": _rank(1),
    "rank-4": _rank(4),
    "full-unet": Method("full, UNet alone", ("--full", "--no-train-text-encoder")),
    "no-text-encoder": Method("adapter, UNet alone", ("--no-train-text-encoder",)),
    "adapter-generated": Method("adapter, generated prior", ("--prior", "generated")),
    "adapter-distill-instance": Method(
        "adapter, distilled on the photographs' latents", ("--prior-source", "instance")
    ),
    "rank-16": _rank(16),
    "rank-2": _rank(2),
    "attention": Method("adapter, attention only", ("--targets", "attention")),
    "all-targets": Method("adapter, every layer", ("--targets", "attention,feed-forward,proj,conv")),
    "full-generated": Method("full, generated prior", ("--full", "--prior", "generated")),
    "full-distill-instance": Method(
        "full, distilled on the photographs' latents", ("--full", "--prior-source", "instance")
    ),
}
#: Held out of everything before: no default was chosen on them. Numbers are the first of the hundred.
SUBJECTS = tuple(
    Subject(noun, 100 + i)
    for i, noun in enumerate(("mug", "teapot", "house", "robot", "rocket", "boat", "bottle", "dog"))
)
#: Far apart: a run draws its class pictures with its seed and the ones after it.
SEEDS = (0, 100, 200)
#: Rates are searched on other subjects, of other nouns.
SEARCH_SUBJECTS = (Subject("car", 200), Subject("fish", 201))
SEARCHED: Mapping[str, tuple[float, ...]] = {
    "adapter": (1e-3, 2e-3, 4e-3),
    "full": (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4),
    "adapter-no-prior": (1.5e-5, 3e-5, 6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "full-no-prior": (1.5e-6, 3e-6, 6e-6, 1.25e-5, 2.5e-5, 5e-5, 1e-4, 2e-4),
    "rank-1": (2e-3, 4e-3, 8e-3),
    "rank-4": (1e-3, 2e-3, 4e-3),
    "full-unet": (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4),
    "no-text-encoder": (1e-3, 2e-3, 4e-3),
    "adapter-generated": (5e-4, 1e-3, 2e-3, 4e-3),
    "adapter-distill-instance": (1e-3, 2e-3, 4e-3),
    "rank-16": (5e-4, 1e-3, 2e-3, 4e-3),
    "rank-2": (1e-3, 2e-3, 4e-3, 8e-3),
    "attention": (5e-4, 1e-3, 2e-3, 4e-3),
    "all-targets": (1e-3, 2e-3, 4e-3),
    "full-generated": (5e-5, 1e-4, 2e-4, 4e-4),
    "full-distill-instance": (5e-5, 1e-4, 2e-4, 4e-4),
}
#: How a run is scored: 18 pictures of the subject (six places), 18 of the class, 18 of other things.
SETTINGS = Settings(num_images_per_prompt=3, num_class_images=18, num_inference_steps=20, batch_size=9)
QUICK = Settings(num_images_per_prompt=1, num_class_images=2, num_inference_steps=2, batch_size=9)
#: What `--mixed-precision` takes -> its name in a run. "auto" depends on the machine, so it is no run's.
PRECISIONS: Mapping[Precision, str] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
#: What a search sets itself; the rest of the preset is part of a run's recipe.
_RATES = (
    "learning_rate",
    "text_encoder_learning_rate",
    "full_learning_rate",
    "full_text_encoder_learning_rate",
)
#: What else a run takes from `train`'s defaults -> what it was for the first runs.
_FIRST: Mapping[str, object] = {
    "prior": "distill",
    "alpha": None,
    "text_encoder_rank": None,
    "lr_warmup_steps": 0,
    "optimizer": "adamw",
    "snr_gamma": None,
    "masked_loss": False,
    "random_flip": False,
}


def recipe(method: str, *, quick: bool = False) -> str:
    """Return a short hash of what a method's runs have in common: options, defaults, scoring.

    A run of another recipe, from before a default was changed, is made again and counts no more. Of the
    defaults outside the preset those count that are no more what they were for the first runs.
    """
    defaults = {
        name: value for name, value in asdict(PRESETS["toybox"]).items() if name not in ("sources", *_RATES)
    }
    told = [METHODS[method].options, defaults, asdict(QUICK if quick else SETTINGS), TEST_CONTEXTS]
    of_train = {field.name: field.default for field in fields(TrainConfig)}
    if changed := {name: of_train.get(name) for name in _FIRST if of_train.get(name) != _FIRST[name]}:
        told.append(changed)
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=list).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Work:
    """One training run and its scores.

    Attributes:
        stage: "search" or "compare".
        rate: of the UNet and of the text encoder.
        precision: that training runs in, as `--mixed-precision` takes it.
        quick: it measures nothing.
    """

    stage: str
    method: str
    subject: Subject
    seed: int
    rate: float
    precision: Precision
    quick: bool = False

    @property
    def key(self) -> str:
        """What tells it apart in the file of runs."""
        of_subject = f"{'quick/' if self.quick else ''}{self.stage}/{self.method}/{self.subject.name}"
        return f"{of_subject}/seed-{self.seed}/rate-{self.rate:g}/{PRECISIONS[self.precision]}"


def part_of(text: str) -> tuple[int, int]:
    """Read `--part`, like 1/2.

    Raises:
        UsageError: it is not a number from 1 to the second one, a slash, and that.
    """
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise click.UsageError(f"--part must be like 1/2, got {text!r}")
    return int(number), int(parts)


def share(subjects: Sequence[Subject], part: tuple[int, int]) -> list[Subject]:
    """Return the subjects of one process: they are shared whole, so that each one's base is scored once."""
    number, parts = part
    return list(subjects[number - 1 :: parts])


def works(
    stage: str, rates: Mapping[str, float], precision: Precision, methods: Collection[str] = METHODS
) -> Iterator[Work]:
    """Yield the runs of a stage in the order of their worth.

    Args:
        stage: "search", or "compare": the main methods with the first seed, the others with it, then the main
            ones' other seeds, then the rest; one subject after the other, so that methods stay comparable.
        rates: method -> its best rate; a method that has none is not compared.
        precision: of all of them.
        methods: only these.
    """
    if stage == "search":
        for name, tried in SEARCHED.items():
            if name not in methods:
                continue
            for rate in tried:
                yield from (Work(stage, name, subject, 0, rate, precision) for subject in SEARCH_SUBJECTS)
        return
    first, others = SEEDS[0], SEEDS[1:]
    main = [name for name, method in METHODS.items() if method.main]
    rest = [name for name in METHODS if name not in main]
    for names, seeds in ((main, (first,)), (rest, (first,)), (main, others), (rest, others)):
        for seed in seeds:
            searched = [name for name in names if name in methods and name in rates]
            for subject, name in product(SUBJECTS, searched):
                yield Work(stage, name, subject, seed, rates[name], precision)
