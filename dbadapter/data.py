"""Photographs in: find them, crop them, cache their latents; and what each training sample draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dbadapter.errors import BaseError, DataError

__all__ = [
    "Draws",
    "LatentCache",
    "draw",
    "find_photographs",
    "load_photograph",
    "mirrored",
    "picture_indices",
]

# A file with one of these suffixes that cannot be read is an error; any other file is passed over. HEIC is
# here although Pillow cannot read it: phones write it, and skipping a user's photographs silently is worse.
_HEIC = (".heic", ".heif")
_JPEG = (".jfif", ".jpe", ".jpeg", ".jpg")
PICTURE_SUFFIXES = frozenset(
    (*_HEIC, *_JPEG, ".avif", ".bmp", ".gif", ".jp2", ".png", ".tif", ".tiff", ".webp")
)


class Draws(NamedTuple):
    """The random numbers of some samples of one step, each from its own stream."""

    timesteps: Tensor  # (batch,), int64
    noise: Tensor  # (batch, channels, height, width), standard normal
    posterior_noise: Tensor  # the same shape: which point of the VAE's posterior


@dataclass(frozen=True)
class LatentCache:
    """The VAE's posterior of each picture, in the UNet's scale; redrawn at every use.

    A cache of one sample per picture would freeze the posterior's noise into the subject.

    Args:
        mean: (pictures, channels, height, width).
        std: the same shape; zeros for latents that were sampled, not encoded.
    """

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, indices: Sequence[int], noise: Tensor) -> Tensor:
        """Return latents of the pictures: mean + std * noise, shape (len(indices), ...)."""
        chosen = torch.as_tensor(indices, device=self.mean.device)
        return self.mean[chosen] + self.std[chosen] * noise.to(self.mean.device)

    @classmethod
    def encode(cls, vae: Any, pictures: Sequence[Tensor], batch_size: int = 4) -> LatentCache:
        """Encode pictures (3, height, width) in [-1, 1], all of one size; BaseError if it cannot."""
        means, stds = [], []
        for start in range(0, len(pictures), batch_size):
            batch = torch.stack(list(pictures[start : start + batch_size])).to(vae.device, vae.dtype)
            # Never under autocast: some VAEs overflow in fp16, and all caches shall be of one precision.
            with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
                posterior = vae.encode(batch).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
        # Read from the config: 0.18215 is SD1's scale, not everyone's.
        scale, shift = float(vae.config.scaling_factor), float(vae.config.get("shift_factor") or 0)
        cache = cls(mean=(torch.cat(means) - shift) * scale, std=torch.cat(stds) * scale)
        if not (torch.isfinite(cache.mean).all() and torch.isfinite(cache.std).all()):
            raise BaseError("the base's VAE gave latents that are not finite: its weights are broken")
        return cache

    @classmethod
    def of_latents(cls, latents: Tensor) -> LatentCache:
        """Hold latents in the UNet's scale as they are."""
        return cls(mean=latents, std=torch.zeros_like(latents))


def find_photographs(folder: str | Path) -> list[Path]:
    """Return the photographs of a folder, by name; each was decoded once, so each can be read.

    Sub-folders, hidden files and files without a picture's suffix (.DS_Store, Thumbs.db, captions, sidecars)
    are passed over.

    Raises:
        DataError: no such folder, no photograph in it, or a picture that cannot be read (named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"the folder of photographs {folder} {kind}; pass a folder with 3 to 6 photographs")
    try:
        files = sorted(path for path in folder.iterdir() if _is_picture(path))
    except OSError as error:
        raise DataError(f"the folder of photographs {folder} cannot be read: {error.strerror}") from error
    if not files:
        raise DataError(
            f"no photographs in {folder}: expected files such as .jpg, .png or .webp directly in it; "
            "put 3 to 6 photographs of the subject there"
        )
    for path in files:
        _open_rgb(path)
    return files


def load_photograph(path: str | Path, resolution: int) -> Tensor:
    """Return a photograph, upright, on white where transparent, scaled and cropped around its centre.

    Args:
        resolution: side of the square in pixels.
    Returns:
        Shape (3, resolution, resolution), float32 in [-1, 1].
    Raises:
        DataError: it cannot be read; the message names it.
    """
    image = _open_rgb(Path(path), draft=2 * resolution)
    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def mirrored(pictures: Sequence[Tensor]) -> list[Tensor]:
    """Return the pictures, then their mirror images."""
    return [*pictures, *(picture.flip(-1) for picture in pictures)]


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


def picture_indices(stream: str, seed: int, first: int, count: int, pictures: int) -> list[int]:
    """Return which pictures the samples first ... first + count - 1 of a run use.

    Every pass over the pictures is a new shuffle, keyed by (stream, seed, pass), so that nothing is to be
    saved for a resumed run to go on in the same order.
    """
    indices = []
    for number in range(first, first + count):
        turn, place = divmod(number, pictures)
        order = torch.randperm(pictures, generator=_generator(f"{stream} order", seed, turn))
        indices.append(int(order[place]))
    return indices


def _generator(*key_parts: str | int) -> torch.Generator:
    # Hashed, so that no two keys share a seed: seed + step + sample would repeat noise across steps.
    key = hashlib.blake2b(repr(key_parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def _is_picture(path: Path) -> bool:
    # Hidden files: macOS writes "._IMG_1.jpg" sidecars that are no pictures.
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _open_rgb(path: Path, draft: int | None = None) -> Image.Image:
    """Return the decoded, upright picture; `draft` lets JPEG decode at no fewer pixels a side than that."""
    try:
        with Image.open(path) as image:
            if draft is not None:
                image.draft("RGB", (draft, draft))
            return _flattened(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, struct.error
        cure = "save it as JPEG or PNG" if path.suffix.lower() in _HEIC else "replace or remove it"
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({_first_line(error)})"
        raise DataError(f"{path} cannot be read as a picture{reason}; {cure}") from error


def _flattened(image: Image.Image) -> Image.Image:
    """Return the picture as 8-bit RGB, transparency on white."""
    if image.mode.startswith(("I", "F")):
        # 16-bit grey: convert() would clip everything above 255 to white.
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
