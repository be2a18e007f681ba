"""`class_noun = "auto"`: what the subject is, by a vote over its photographs.

DreamBooth's class label may be "obtained using a classifier" (Ruiz et al. 2022, section 3.2). An unsure vote
stops: a wrong label is worse than none, for the prior would keep a class that the subject is not of.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dbadapter.base_folder import is_toybox_on_disk
from dbadapter.config import AUTO, TrainConfig, indefinite, read_toml
from dbadapter.encoders import DEFAULT_ENCODER, efficientnet_lite2, load_text_image_encoder, toybox_nouns
from dbadapter.errors import ConfigError, DataError, UsageError
from dbadapter.photographs import Photograph, load_crop

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "SURE",
    "Classifier",
    "Vote",
    "ballots",
    "classify",
    "count",
    "decided",
    "imagenet_nouns",
    "load_classifier",
    "views",
]

# Share of the vote from which a noun is taken; measured, see docs/class-noun.md.
SURE = 0.6
SURE_ON_TOYBOX = 0.8  # its classifier was never shown that a picture can be of something else
PLAUSIBLE = 0.3  # from which it is worth proposing
TEMPERATURE = 0.6  # EfficientNet-Lite2 spreads a tenth and more over all its classes; measured with SURE
CLIP_SCALE = 100.0  # of the cosine; training stops it there (Radford et al. 2021, section 2.5)
ZOOM = 4 / 3
SIDE = 336  # pixels of a view; no published CLIP or EfficientNet-Lite reads more

_TABLE = Path(__file__).parent / "class_nouns.tsv"


@dataclass(frozen=True)
class Classifier:
    """Gives each of its classes a probability.

    Attributes:
        name: for the user.
        nouns: the plain noun of each class; None for a class that gets no vote.
        classes: the own name of each class.
        probabilities: (pictures) -> shape (n, classes).
        several_views: pictures are shown whole and closer too, not as the centre square alone.
        sure: share of the vote from which its noun is taken.
    """

    name: str
    nouns: tuple[str | None, ...]
    classes: tuple[str, ...]
    probabilities: Callable[[Sequence[Image]], Tensor]
    several_views: bool = True
    sure: float = SURE


@dataclass(frozen=True)
class Vote:
    """The outcome: nouns with their shares of the vote.

    Attributes:
        candidates: (noun, share in [0, 1]), best first, at most three.
        finer: the likeliest class behind the first, e.g. "Pembroke"; None where it is the noun itself.
        photographs: how many voted.
        classifier: its name.
        sure: share of the vote from which the noun is taken.
    """

    candidates: tuple[tuple[str, float], ...]
    finer: str | None
    photographs: int
    classifier: str
    sure: float = SURE

    @property
    def noun(self) -> str:
        """The noun with the largest share."""
        return self.candidates[0][0]

    @property
    def share(self) -> float:
        """Its share."""
        return self.candidates[0][1]

    def __str__(self) -> str:
        voters = "1 photograph" if self.photographs == 1 else f"{self.photographs} photographs"
        like = f"; most like {indefinite(self.finer)}" if self.finer else ""
        return f"{_percent(self.share)} of the vote over {voters} by {self.classifier}{like}"


def decided(config: TrainConfig, photographs: Sequence[Photograph]) -> TrainConfig:
    """Return the configuration with the noun that `auto` stands for; any other comes back as it is.

    A resumed run takes the noun that it began with from its config.toml, if that names the same photographs.

    Raises:
        UsageError: the classifier is not installed or cannot be loaded.
        DataError: no noun has a clear majority; the message has the candidates.
    """
    if config.class_noun != AUTO:
        return config
    noun, told = _earlier(config) if config.resume else ("", None)
    if not noun:
        vote = classify(photographs, load_classifier(config))
        noun, told = _sure(vote, config), str(vote)
    return dataclasses.replace(
        config, class_noun=noun, class_noun_vote=told, class_noun_classifier=None, class_nouns=None
    )


def load_classifier(config: TrainConfig) -> Classifier:
    """Return a run's classifier: the CLIP that it names; toybox's own on toybox; else EfficientNet-Lite2.

    Raises:
        UsageError: it is not installed or cannot be loaded.
    """
    if config.class_noun_classifier is not None:
        return _clip(config.class_noun_classifier, config.class_nouns)
    if is_toybox_on_disk(config.base):  # it knows no other nouns
        nouns, probabilities = toybox_nouns()
        return Classifier(
            "toybox's classifier", nouns, nouns, probabilities, several_views=False, sure=SURE_ON_TOYBOX
        )
    return _efficientnet()


def classify(photographs: Sequence[Photograph], classifier: Classifier) -> Vote:
    """Return the vote over photographs."""
    candidates, finer = count(ballots(photographs, classifier), classifier.nouns, classifier.classes)
    return Vote(candidates, finer, len(photographs), classifier.name, classifier.sure)


def ballots(photographs: Sequence[Photograph], classifier: Classifier) -> Tensor:
    """Return each photograph's probabilities, the mean over its views, shape (photographs, classes)."""
    rows = []
    for photograph in photographs:
        pictures = views(photograph) if classifier.several_views else [_square(photograph, SIDE)]
        with torch.inference_mode():
            rows.append(classifier.probabilities(pictures).float().mean(0))
    return torch.stack(rows)


def count(
    probabilities: Tensor, nouns: Sequence[str | None], classes: Sequence[str]
) -> tuple[tuple[tuple[str, float], ...], str | None]:
    """Return the three nouns with the largest shares, and the likeliest class of the first.

        share(noun) = mean over photographs of the sum of p(class) over the noun's classes

    What classes without a noun got is lost, not shared out: it speaks against every noun.

    Args:
        probabilities: shape (photographs, classes), each row a distribution.
        nouns: of each class; None gets no vote.
        classes: the own name of each class.
    """
    pooled = probabilities.mean(0).tolist()
    shares: dict[str, float] = {}
    for noun, probability in zip(nouns, pooled, strict=True):
        if noun is not None:
            shares[noun] = shares.get(noun, 0.0) + probability
    ranked = sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:3]
    best = ranked[0][0]
    finer = classes[max((i for i, noun in enumerate(nouns) if noun == best), key=lambda i: pooled[i])]
    return tuple(ranked), None if finer == best else finer


def views(photograph: Photograph) -> list[Image]:
    """Return the centre square, the middle of it larger, and, if it is no square, all of it on grey.

    The first two are worth more than either alone on square photographs; the third sees what the centre
    square of a wide one has lost.
    """
    from PIL import Image

    larger = _square(photograph, round(SIDE * ZOOM))
    edge = (larger.width - SIDE) // 2
    shown = [_square(photograph, SIDE), larger.crop((edge, edge, edge + SIDE, edge + SIDE))]
    width, height = photograph.size
    inner = tuple(max(1, round(SIDE * each / max(width, height))) for each in (width, height))
    if inner != (SIDE, SIDE):
        whole = Image.new("RGB", (SIDE, SIDE), (127, 127, 127))
        whole.paste(
            _picture(photograph, (inner[0], inner[1])), ((SIDE - inner[0]) // 2, (SIDE - inner[1]) // 2)
        )
        shown.append(whole)
    return shown


@cache
def imagenet_nouns() -> tuple[tuple[str | None, str], ...]:
    """Return (plain noun, own name) of ImageNet's 1000 classes; None for places and surfaces."""
    lines = _TABLE.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return tuple((None if noun == "-" else noun, name) for noun, name in rows)


def _efficientnet() -> Classifier:
    try:
        model, prepare = efficientnet_lite2()
    except UsageError:
        raise UsageError(
            "class_noun auto needs a classifier, which is not installed: pip install 'dbadapter[metrics]', "
            "or pass --class-noun with what the subject is, e.g. dog"
        ) from None
    nouns, classes = zip(*imagenet_nouns(), strict=True)

    def probabilities(pictures: Sequence[Image]) -> Tensor:
        logits: Tensor = model(prepare(pictures))
        return (logits / TEMPERATURE).softmax(1)

    return Classifier(DEFAULT_ENCODER, nouns, classes, probabilities)


def _clip(spec: str, wanted: Sequence[str] | None) -> Classifier:
    """Return a zero-shot classifier (Radford et al. 2021, section 3.1); by default of ImageNet's nouns."""
    encoder = load_text_image_encoder(spec)
    assert encoder.embed_text is not None
    nouns = tuple(wanted or sorted({noun for noun, _ in imagenet_nouns() if noun is not None}))
    said = encoder.embed_text([f"a photo of {indefinite(noun)}" for noun in nouns])
    texts = torch.nn.functional.normalize(said, dim=1)

    def probabilities(pictures: Sequence[Image]) -> Tensor:
        shown = torch.nn.functional.normalize(encoder.embed(pictures), dim=1)
        return (CLIP_SCALE * shown @ texts.T).softmax(1)

    return Classifier(encoder.name, nouns, nouns, probabilities)


def _earlier(config: TrainConfig) -> tuple[str, str | None]:
    """Return noun and vote of the run in the output folder; no noun where it tells none for this one."""
    with suppress(ConfigError):
        values = read_toml(config.output_dir / "config.toml")
        noun, folder = values.get("class_noun", AUTO), values.get("instance_data_dir")
        if noun != AUTO and folder is not None and folder.resolve() == config.instance_data_dir.resolve():
            return noun, values.get("class_noun_vote")
    return "", None


def _sure(vote: Vote, config: TrainConfig) -> str:
    if vote.share >= vote.sure:
        return vote.noun
    shares = ", ".join(f"{noun} {_percent(share)}" for noun, share in vote.candidates)
    cure = "--class-noun with what they show, e.g. dog"
    if is_toybox_on_disk(config.base) and config.class_noun_classifier is None:
        # Of anything else its classifier knows nothing, however sure it is.
        cure += f"; toybox knows only its toys ({', '.join(toybox_nouns()[0])}): real things need --base"
    elif vote.share >= PLAUSIBLE:
        cure = f"--class-noun {shlex.quote(vote.noun)} or what they show"
        if len(vote.candidates) > 1 and vote.candidates[1][1] >= PLAUSIBLE:  # two subjects
            cure += ", and take out photographs of anything else"
    folder = config.instance_data_dir
    raise DataError(f"the photographs in {folder} are not clearly one class: {shares}: pass {cure}")


def _square(photograph: Photograph, side: int) -> Image:
    return _picture(photograph, (side, side))


def _picture(photograph: Photograph, size: tuple[int, int]) -> Image:
    from PIL import Image

    pixels = (load_crop(photograph, size).pixels + 1) * 127.5
    return Image.fromarray(pixels.permute(1, 2, 0).round().byte().numpy())


def _percent(share: float) -> str:
    # Down, so that nothing below the threshold reads as if it reached it, nor anything short of all as all.
    return f"{int(share * 100)} %"
