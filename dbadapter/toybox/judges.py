"""Judges of toybox pictures: what is in them (classifiers) and which object it is (instance encoder).

Trained on renders in a few minutes on two cores, seeded, from scenes of their own stream, so that
neither the base's pretraining nor a benchmark's subjects leak into them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbadapter.toybox import names, world

__all__ = ["Judges", "judges", "to_tensor"]

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
    def classify(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return predicted indices for "noun", "context" and "color", each shape (n,).

        Args:
            pictures: shape (n, 3, 64, 64), in [-1, 1].
        """
        logits = torch.cat([self.classifier(part) for part in pictures.split(256)])
        parts = logits.split(list(_HEADS.values()), 1)
        return {name: part.argmax(1) for name, part in zip(_HEADS, parts, strict=True)}

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """Return unit vectors, shape (n, 64); the cosine of two is how much they show one instance."""
        return torch.cat([F.normalize(self.encoder(part), dim=1) for part in pictures.split(256)])


def to_tensor(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """Return uint8 pictures (n, height, width, 3) as floats (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


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


def judges(cache: Path | None = None, *, quick: bool = False) -> Judges:
    """Return trained judges, from `cache` if it holds them (and kept there if not).

    Args:
        cache: a file of ours; None trains afresh.
        quick: a tenth of the training, for tests of the machinery.
    """
    classifier, encoder = _network(sum(_HEADS.values())).eval(), _network(_INSTANCE_WIDTH).eval()
    if cache is not None and cache.exists():
        state = torch.load(cache, weights_only=True)
        classifier.load_state_dict(state["classifier"])
        encoder.load_state_dict(state["encoder"])
        return Judges(classifier, encoder, state["accuracy"])
    size = 1 if quick else 10
    classifier, accuracy = _train_classifier(1000 * size, 90 * size)
    encoder, accuracy["instance"] = _train_encoder(384 * size, 45 * size)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        state = {"classifier": classifier.state_dict(), "encoder": encoder.state_dict(), "accuracy": accuracy}
        torch.save(state, cache.with_suffix(".tmp"))
        cache.with_suffix(".tmp").replace(cache)
    return Judges(classifier, encoder, accuracy)
