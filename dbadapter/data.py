"""Latents in, samples out: the cache of the photographs' latents, and what each training sample draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dbadapter.errors import BaseError
from dbadapter.photographs import Crop

__all__ = ["Draws", "LatentCache", "draw", "encoded_at_once", "picture_indices"]


ENCODED_PIXELS = 4 * 256**2  # at once, in no more than four pictures


class Draws(NamedTuple):
    """The random numbers of some samples of one step, each from its own stream."""

    timesteps: Tensor  # (batch,), int64
    noise: Tensor  # (batch, channels, height, width), standard normal
    posterior_noise: Tensor  # the same shape: which point of the VAE's posterior


@dataclass(frozen=True)
class LatentCache:
    """The VAE's posterior of each picture, in the UNet's scale; redrawn at every use.

    A cache of one sample per picture would freeze the posterior's noise into the subject; one keyed by the
    step would pair it with another picture's prompt (diffusers#14430). Here the key is the picture and crop:
    entry i is crop i, mirror images are crops of their own.

    Args:
        mean: of each picture, (channels, height, width); sizes may differ.
        std: the same shapes; zeros for latents that were sampled, not encoded.
        time_ids: SDXL's micro-conditioning, (pictures, 6), see `conditioning.predict`.
        masks: of each picture, (height, width) of the latents, weights of the loss with mean 1, or None.
    """

    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]
    time_ids: Tensor
    masks: tuple[Tensor | None, ...]

    def __len__(self) -> int:
        return len(self.mean)

    def shape(self, index: int) -> tuple[int, ...]:
        """Return (channels, height, width) of a picture's latents."""
        return tuple(self.mean[index].shape)

    def of_shape(self, shape: tuple[int, ...]) -> list[int]:
        """Return the indices of the pictures with this shape."""
        return [index for index in range(len(self)) if self.shape(index) == shape]

    def sample(self, indices: Sequence[int], noise: Tensor) -> Tensor:
        """Return latents of pictures of one shape: mean + std * noise, (len(indices), ...)."""
        mean = torch.stack([self.mean[index] for index in indices])
        std = torch.stack([self.std[index] for index in indices])
        return mean + std * noise

    def weights(self, indices: Sequence[int]) -> Tensor | None:
        """Return the weights of the squared errors, (len(indices), 1, height, width); None if all are 1."""
        masks = [self.masks[index] for index in indices]
        if all(mask is None for mask in masks):
            return None
        shape, device = self.mean[indices[0]].shape[1:], self.mean[indices[0]].device
        ones = torch.ones(shape, device=device)
        return torch.stack([ones if mask is None else mask for mask in masks])[:, None]

    @classmethod
    def encode(cls, vae: Any, crops: Sequence[Crop], batch_size: int | None = None) -> LatentCache:
        """Encode pictures, those of one size in batches; BaseError if the VAE gives no finite numbers.

        Args:
            batch_size: at most; None is 4 pictures of 256 pixels a side, or one that is larger: four of
                SDXL's would take more memory than all of training.
        """
        means: dict[int, Tensor] = {}
        stds: dict[int, Tensor] = {}
        for indices in _batches_of_one_size(crops, batch_size):
            batch = torch.stack([crops[index].pixels for index in indices]).to(vae.device, vae.dtype)
            # Never under autocast: some VAEs overflow in fp16, and all caches shall be of one precision.
            with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
                posterior = vae.encode(batch).latent_dist
            means |= zip(indices, posterior.mean.float(), strict=True)
            stds |= zip(indices, posterior.std.float(), strict=True)
        # Read from the config: 0.18215 is SD1's scale, not everyone's.
        scale, shift = float(vae.config.scaling_factor), float(vae.config.get("shift_factor") or 0)
        places = range(len(crops))
        cache = cls(
            mean=tuple((means[index] - shift) * scale for index in places),
            std=tuple(stds[index] * scale for index in places),
            time_ids=torch.tensor([_time_ids(crop) for crop in crops], device=vae.device),
            masks=tuple(_latent_mask(crops[index], means[index]) for index in places),
        )
        if not all(torch.isfinite(values).all() for values in (*cache.mean, *cache.std)):
            raise BaseError("the base's VAE gave latents that are not finite: its weights are broken")
        return cache

    @classmethod
    def of_latents(cls, latents: Sequence[Tensor], vae_scale_factor: int) -> LatentCache:
        """Hold latents in the UNet's scale as they are, as of whole pictures without a crop."""
        sizes = [[side * vae_scale_factor for side in picture.shape[1:]] for picture in latents]
        return cls(
            mean=tuple(latents),
            std=tuple(torch.zeros_like(picture) for picture in latents),
            time_ids=torch.tensor([[*size, 0, 0, *size] for size in sizes], device=latents[0].device).float(),
            masks=(None,) * len(latents),
        )

    def without_masks(self) -> LatentCache:
        """Return the same latents with every weight 1: what the prior compares on."""
        return LatentCache(self.mean, self.std, self.time_ids, (None,) * len(self))


def draw(
    stream: str, seed: int, step: int, samples: Sequence[int], shape: Sequence[int], num_timesteps: int
) -> Draws:
    """Return timesteps and noise keyed by (seed, step, sample), whatever the batch or number of processes.

    Args:
        stream: "instance" or "prior", so that the two never share a noise.
        samples: numbers of the samples within the step, over all batches and processes.
        shape: of one latent, (channels, height, width).
        num_timesteps: timesteps are uniform in 0 ... num_timesteps - 1.
    """
    timesteps, noise, posterior_noise = [], [], []
    for sample in samples:
        generator = _generator(stream, seed, step, sample)
        timesteps.append(torch.randint(num_timesteps, (1,), generator=generator))
        noise.append(torch.randn(*shape, generator=generator))
        posterior_noise.append(torch.randn(*shape, generator=generator))
    return Draws(torch.cat(timesteps), torch.stack(noise), torch.stack(posterior_noise))


def picture_indices(stream: str, seed: int, numbers: Sequence[int], pictures: int) -> list[int]:
    """Return which pictures the samples of a run with these numbers use.

    Every pass over the pictures is a new shuffle, keyed by (stream, seed, pass), so that nothing is to be
    saved for a resumed run to go on in the same order.
    """
    indices = []
    for number in numbers:
        turn, place = divmod(number, pictures)
        order = torch.randperm(pictures, generator=_generator(f"{stream} order", seed, turn))
        indices.append(int(order[place]))
    return indices


def _generator(*key_parts: str | int) -> torch.Generator:
    # Hashed, so that no two keys share a seed: seed + step + sample would repeat noise across steps.
    key = hashlib.blake2b(repr(key_parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def _batches_of_one_size(crops: Sequence[Crop], batch_size: int | None) -> list[list[int]]:
    of_size: dict[torch.Size, list[int]] = {}
    for index, crop in enumerate(crops):
        of_size.setdefault(crop.pixels.shape, []).append(index)
    batches = []
    for size, indices in of_size.items():
        most = batch_size or encoded_at_once(size[1] * size[2])
        batches += [indices[start : start + most] for start in range(0, len(indices), most)]
    return batches


def encoded_at_once(pixels: int) -> int:
    """Return how many pictures of a size the VAE encodes together."""
    return min(4, max(1, ENCODED_PIXELS // pixels))


def _time_ids(crop: Crop) -> list[float]:
    """Return original size, corner of the crop and target size (Podell et al. 2023, section 2.2)."""
    return [float(value) for value in (*crop.original_size, *crop.top_left, *crop.pixels.shape[1:])]


def _latent_mask(crop: Crop, latents: Tensor) -> Tensor | None:
    """Return the mask on the latents' grid with mean 1, so that a small subject does not learn slower."""
    if crop.mask is None:
        return None
    mask = nn.functional.interpolate(crop.mask[None, None], size=latents.shape[1:], mode="area")[0, 0]
    return (mask / mask.mean()).to(latents.device)
