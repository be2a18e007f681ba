"""Judges of toybox pictures: what is in them (classifiers) and which object it is (instance encoder).

Trained on renders, seeded, from scenes of their own stream, so that neither the base's pretraining nor a
benchmark's subjects leak into them. Their weights come with the package; `python -m dbadapter.toybox.judges`
trains them again (six minutes on one core, needs numba).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dbadapter.toybox import names, world

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Judges", "load_judges", "named", "tensor_of", "to_tensor", "train_judges"]

SIDE = 64
_WEIGHTS = Path(__file__).parent / "judges.safetensors"

_SEED = 555_001
_HEADS = {"noun": len(names.NOUNS), "context": len(names.CONTEXTS), "color": len(names.COLORS)}
_INSTANCE_WIDTH = 64
_TEMPERATURE = 0.15


@dataclass
class Judges:
    """Trained judges and their own accuracy on renders that they never saw."""

    classifier: nn.Module
    encoder: nn.Module
    accuracy: dict[str, float]

    @torch.no_grad()
    def nouns(self, pictures: Tensor) -> Tensor:
        """Return the probability of each of `names.NOUNS`, shape (n, 12); pictures as in `classify`."""
        return self._logits(pictures)[0].softmax(1)

    @torch.no_grad()
    def classify(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return predicted indices for "noun", "context" and "color", each shape (n,).

        Args:
            pictures: shape (n, 3, 64, 64), in [-1, 1].
        """
        return {name: part.argmax(1) for name, part in zip(_HEADS, self._logits(pictures), strict=True)}

    def _logits(self, pictures: Tensor) -> tuple[Tensor, ...]:
        logits = torch.cat([self.classifier(part) for part in pictures.split(256)])
        parts: tuple[Tensor, ...] = logits.split(list(_HEADS.values()), 1)
        return parts

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """Return unit vectors, shape (n, 64); the cosine of two is how much they show one instance."""
        return torch.cat([F.normalize(self.encoder(part), dim=1) for part in pictures.split(256)])


def to_tensor(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """Return uint8 pictures (n, height, width, 3) as floats (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def tensor_of(pictures: Sequence[Image]) -> Tensor:
    """Return pictures of any size as floats, shape (n, 3, 64, 64), in [-1, 1]."""
    from PIL.Image import Resampling

    shown = [picture.convert("RGB") for picture in pictures]
    small = [p if p.size == (SIDE, SIDE) else p.resize((SIDE, SIDE), Resampling.LANCZOS) for p in shown]
    return to_tensor(np.stack([np.asarray(picture) for picture in small]))


def named(prompt: str) -> tuple[str | None, str | None]:
    """Return the first noun and the context that a prompt names, None for what it does not name.

    A prompt without any context's words leaves the place open: the plain studio goes unnamed.
    """
    words = re.sub(r"[^\w\s-]", " ", prompt.lower()).split()
    noun = next((word for word in words if word in names.NOUNS), None)
    said = f" {' '.join(words)} "
    return noun, next((context for context in names.CONTEXTS if context and f" {context} " in said), None)


def _network(outputs: int) -> nn.Module:
    def stage(before: int, after: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, 2, 1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *stage(3, 16),
        *stage(16, 48),
        *stage(48, 96),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(96 * 16, outputs),
    )


def _blemish(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """Return the pictures shifted, some blurred and noisy, as a small base's pictures are."""
    n = len(pictures)
    dx, dy = (int(v) for v in torch.randint(-4, 5, (2,), generator=rng))
    moved = F.pad(pictures, (4, 4, 4, 4), mode="replicate")[:, :, 4 + dy : 68 + dy, 4 + dx : 68 + dx]
    small = F.interpolate(
        F.interpolate(moved, scale_factor=0.5, mode="area"), scale_factor=2, mode="bilinear"
    )
    keep = torch.rand(n, 1, 1, 1, generator=rng).clamp(0.2, 1)
    noise = 0.12 * torch.rand(n, 1, 1, 1, generator=rng) * torch.randn(moved.shape, generator=rng)
    return keep * moved + (1 - keep) * small + noise


def _fit(model: nn.Module, steps: int, loss_of: object, rate: float = 2e-3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    model.train()
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss_of(step).backward()  # type: ignore[operator]
        optimizer.step()
        schedule.step()
    model.eval()


def _train_classifier(scenes: int, steps: int) -> tuple[nn.Module, dict[str, float]]:
    from dbadapter.toybox.render import render

    made = [world.sample_scene(np.random.default_rng((_SEED, 0, i))) for i in range(scenes + 1024)]
    pictures = to_tensor(render(made)[0])
    labels = torch.tensor([world.labels(scene)[:3] for scene in made])
    rng = torch.Generator().manual_seed(_SEED)
    torch.manual_seed(_SEED)
    model = _network(sum(_HEADS.values()))

    def loss_of(step: int) -> Tensor:
        pick = torch.randint(0, scenes, (64,), generator=rng)
        parts = model(_blemish(pictures[pick], rng)).split(list(_HEADS.values()), 1)
        return sum((F.cross_entropy(p, labels[pick, i]) for i, p in enumerate(parts)), torch.zeros(()))

    _fit(model, steps, loss_of)
    with torch.no_grad():
        parts = model(pictures[scenes:]).split(list(_HEADS.values()), 1)
    right = [float((p.argmax(1) == labels[scenes:, i]).float().mean()) for i, p in enumerate(parts)]
    return model, dict(zip(_HEADS, right, strict=True))


def _train_encoder(instances: int, steps: int) -> tuple[nn.Module, float]:
    """Return the encoder and how often it finds an instance's second view among 256 of the same noun."""
    from dbadapter.toybox.render import render

    def pairs(count: int, stream: int, noun: str | None = None) -> Tensor:
        scenes = []
        for i in range(count):
            rng = np.random.default_rng((_SEED, stream, i))
            one = world.sample_instance(rng, noun or names.NOUNS[i // 32 % len(names.NOUNS)])
            scenes += [world.Scene(one, world.sample_view(rng)) for _ in range(3)]
        pictures = to_tensor(render(scenes)[0])
        return pictures.reshape(count, 3, *pictures.shape[1:])

    views = pairs(instances, 1)
    rng = torch.Generator().manual_seed(_SEED + 1)
    torch.manual_seed(_SEED + 1)
    model = _network(_INSTANCE_WIDTH)

    def loss_of(step: int) -> Tensor:
        # two groups of one noun each (the hard negatives) and a mixed one
        groups = torch.randint(0, instances // 32, (2,), generator=rng)
        pick = torch.cat([32 * groups[0] + torch.arange(32), 32 * groups[1] + torch.arange(32)])
        pick = torch.cat([pick, torch.randint(0, instances, (16,), generator=rng)]).unique()
        which = torch.stack([torch.randperm(3, generator=rng)[:2] for _ in pick])
        a = F.normalize(model(_blemish(views[pick, which[:, 0]], rng)), dim=1)
        b = F.normalize(model(_blemish(views[pick, which[:, 1]], rng)), dim=1)
        logits, wanted = a @ b.T / _TEMPERATURE, torch.arange(len(pick))
        return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2

    _fit(model, steps, loss_of)
    right = []
    with torch.no_grad():
        for i, noun in enumerate(names.NOUNS[:4]):
            held = pairs(256, 100 + i, noun)
            a, b = (F.normalize(model(held[:, j]), dim=1) for j in (0, 1))
            right.append(float(((a @ b.T).argmax(1) == torch.arange(256)).float().mean()))
    return model, float(np.mean(right))


def train_judges(*, quick: bool = False) -> Judges:
    """Return judges trained on fresh renders.

    Args:
        quick: a tenth of the training, for tests of the machinery.
    """
    size = 1 if quick else 10
    classifier, accuracy = _train_classifier(1000 * size, 90 * size)
    encoder, accuracy["instance"] = _train_encoder(384 * size, 45 * size)
    return Judges(classifier, encoder, accuracy)


def load_judges() -> Judges:
    """Return the judges whose weights come with the package.

    `accuracy` is theirs on renders that they never saw: "noun", "context", "color" of 1,024 pictures, and
    "instance", how often the encoder finds an instance's second view among 256 instances of its noun.
    """
    models = {"classifier": _network(sum(_HEADS.values())), "encoder": _network(_INSTANCE_WIDTH)}
    with safe_open(_WEIGHTS, "pt") as file:
        accuracy = json.loads(file.metadata()["accuracy"])
        for name, model in models.items():
            model.load_state_dict({key: file.get_tensor(f"{name}.{key}") for key in model.state_dict()})
            model.eval().requires_grad_(False)
    return Judges(models["classifier"], models["encoder"], accuracy)


def save_judges(judges: Judges, path: Path) -> None:
    """Write judges as float16 safetensors, their accuracy in the metadata."""
    states = {"classifier": judges.classifier.state_dict(), "encoder": judges.encoder.state_dict()}
    tensors = {
        f"{name}.{key}": value.half() if value.is_floating_point() else value
        for name, state in states.items()
        for key, value in state.items()
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(save(tensors, {"accuracy": json.dumps(judges.accuracy)}))
    temporary.replace(path)


if __name__ == "__main__":
    save_judges(train_judges(), _WEIGHTS)
