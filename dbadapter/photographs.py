"""Photographs as files: find them with their captions and masks, and load crops of them as tensors."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from dbadapter.errors import DataError

__all__ = ["Crop", "Photograph", "find_photographs", "load_crop"]

# A file with one of these suffixes that cannot be read is an error; any other file is passed over. HEIC is
# here although Pillow alone cannot read it: phones write it, and skipping a user's photographs is worse.
_HEIC = (".heic", ".heif", ".hif")
_JPEG = (".jfif", ".jpe", ".jpeg", ".jpg")
PICTURE_SUFFIXES = frozenset(
    (*_HEIC, *_JPEG, ".avif", ".bmp", ".gif", ".jp2", ".png", ".tif", ".tiff", ".webp")
)
MASK_ENDING = ".mask.png"
MASK_RATIO_TOLERANCE = 0.01  # an editor that scales a mask rounds its sides
MAX_PIXELS = 1_000_000_000  # Pillow's own limit, 178 million, is less than some cameras' panoramas have
_MAX_PIXELS_LOCK = threading.RLock()


@dataclass(frozen=True)
class Photograph:
    """A picture file that can be read, and what lies beside it.

    Args:
        path: the file.
        size: (width, height) in pixels, upright (after EXIF rotation).
        caption: text of NAME.txt beside it, on one line; None without such a file.
        mask: NAME.mask.png beside it, else "alpha" if any pixel is transparent, else None.
    """

    path: Path
    size: tuple[int, int]
    caption: str | None = None
    mask: Path | Literal["alpha"] | None = None


@dataclass(frozen=True)
class Crop:
    """A photograph scaled and cropped, and where it was cropped (SDXL's micro-conditioning).

    Args:
        pixels: shape (3, height, width), float32 in [-1, 1].
        mask: shape (height, width), float32 in [0, 1], 1 where the subject is; None where no mask was asked
            for or there is none.
        original_size: (height, width) of the upright photograph in pixels.
        top_left: (top, left) of the crop in the scaled photograph, in the scaled photograph's pixels.
    """

    pixels: Tensor
    mask: Tensor | None
    original_size: tuple[int, int]
    top_left: tuple[int, int]


class _Picture(NamedTuple):
    image: Image.Image  # upright; of mode L, RGB, RGBA, CMYK or LAB; JPEG perhaps at a fraction of its size
    size: tuple[int, int]  # (width, height) at its full size, upright
    icc_profile: bytes | None


def find_photographs(folder: str | Path) -> list[Photograph]:
    """Return the photographs of a folder, by name; each was decoded once, so each can be read.

    Sub-folders, hidden files and files without a picture's suffix (.DS_Store, Thumbs.db, captions, sidecars)
    are passed over. NAME.mask.png is a mask where there is a picture NAME, and a picture of its own where
    there is none. Pictures of one stem (a.jpg, a.png) share a caption and a mask.

    Raises:
        DataError: no such folder, no photograph in it, a picture or a mask that cannot be read, a caption
            that is empty or not UTF-8, a mask that is black or of another shape. The message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"the folder of photographs {folder} {kind}; pass a folder with 3 to 6 photographs")
    try:
        # Hidden files: macOS writes "._IMG_1.jpg" sidecars that are no pictures.
        files = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and not p.is_dir())
    except OSError as error:
        raise DataError(f"the folder of photographs {folder} cannot be read: {error.strerror}") from error
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    stems = {path.stem for path in pictures}
    masks = {_masked_stem(path): path for path in pictures if _masked_stem(path) in stems}
    captions = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    photographs = [
        _photograph(path, captions.get(path.stem), masks.get(path.stem))
        for path in pictures
        if path not in masks.values()
    ]
    if not photographs:
        raise DataError(
            f"no photographs in {folder}: expected files such as .jpg, .png or .webp directly in it; "
            "put 3 to 6 photographs of the subject there"
        )
    return photographs


def load_crop(
    photograph: Photograph, size: tuple[int, int], *, masked: bool = False, flip: bool = False
) -> Crop:
    """Return a photograph in sRGB, on white where transparent, scaled to cover `size`, cropped at its centre.

        scale = max(width / photograph width, height / photograph height)

    Args:
        size: (width, height) of the crop in pixels.
        masked: load its mask too: white counts, black does not. A mask file with transparency is taken on
            black; where all that is visible in it has one brightness, its alpha channel alone is the mask.
        flip: mirror pixels and mask; the left offset is then that in the mirrored photograph.
    Raises:
        DataError: a file cannot be read or is another picture than when it was found, or the mask is black
            in all of the crop; the message names the file.
    """
    picture = _open(photograph.path, draft=2 * max(size))
    if picture.size != photograph.size:
        raise DataError(
            f"{photograph.path} was {_by(photograph.size)} pixels when it was found, and is "
            f"{_by(picture.size)} now; do not change photographs while a command runs, and start it again"
        )
    scale = max(new / old for new, old in zip(size, photograph.size, strict=True))
    scaled = [round(old * scale) for old in photograph.size]
    left, top = ((old - new) // 2 for new, old in zip(size, scaled, strict=True))
    # In parts of the whole, since a mask, and a JPEG decoded small, have other sizes than the photograph.
    box = (
        left / scaled[0],
        top / scaled[1],
        (left + size[0]) / scaled[0],
        (top + size[1]) / scaled[1],
    )
    # Colours are converted after scaling: a few hundred thousand pixels in place of tens of millions.
    rgb = _srgb_on_white(_scaled(picture.image, box, size, Image.Resampling.LANCZOS), picture.icc_profile)
    pixels = torch.from_numpy(np.array(rgb, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    mask = None
    if masked and photograph.mask is not None:
        if photograph.mask == "alpha":
            whole = picture.image.getchannel("A")
        else:
            whole = _open_mask(photograph.mask, photograph)
        # Bilinear has no overshoot: what is black around stays 0.
        grey = np.array(_scaled(whole, box, size, Image.Resampling.BILINEAR), dtype=np.float32)
        if not grey.any():
            file = photograph.path if photograph.mask == "alpha" else photograph.mask
            what = "transparent" if photograph.mask == "alpha" else "black"
            raise DataError(
                f"{file} is {what} in all of the {_by(size)} crop at the centre of {photograph.path.name}; "
                "crop both around the subject"
            )
        mask = torch.from_numpy(grey) / 255
    if flip:
        left = scaled[0] - size[0] - left
        pixels, mask = pixels.flip(-1), None if mask is None else mask.flip(-1)
    return Crop(pixels.contiguous(), mask, (photograph.size[1], photograph.size[0]), (top, left))


def _masked_stem(path: Path) -> str | None:
    return path.name[: -len(MASK_ENDING)] if path.name.lower().endswith(MASK_ENDING) else None


def _photograph(path: Path, caption: Path | None, mask: Path | None) -> Photograph:
    # JPEG at an eighth: all of its data is still read, so a file that is cut short is still found.
    image, size, _ = _open(path, draft=1)
    transparent = image.mode == "RGBA" and _range(image.getchannel("A"))[0] < 255
    photograph = Photograph(
        path,
        size,
        None if caption is None else _read_caption(caption),
        mask or ("alpha" if transparent else None),
    )
    if mask is not None:
        _open_mask(mask, photograph)
    return photograph


def _read_caption(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"the caption {path} cannot be read ({_reason(error)}); replace or remove it"
        ) from error
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a byte order mark can pass for UTF-8, with NULs between the letters
        raise DataError(f"the caption {path} is not UTF-8 text; save it as UTF-8")
    caption = " ".join(line.strip() for line in text.splitlines() if line.strip())
    if not caption:
        raise DataError(f"the caption {path} is empty; write what the photograph shows, or remove the file")
    return caption


def _open_mask(path: Path, photograph: Photograph) -> Image.Image:
    """Return the upright mask, mode L, of the photograph's shape; DataError if it is of another, or black."""
    image, size, _ = _open(path)
    ratio = size[0] * photograph.size[1] / (size[1] * photograph.size[0])
    if abs(ratio - 1) > MASK_RATIO_TOLERANCE:
        raise DataError(
            f"the mask {path} is {_by(size)} pixels, but {photograph.path.name} is {_by(photograph.size)}, "
            "upright; give the mask the size of the photograph"
        )
    mask = _srgb(image.convert("RGB") if image.mode == "RGBA" else image, None).convert("L")
    if image.mode == "RGBA":
        grey, alpha = np.asarray(mask), np.asarray(image.getchannel("A"))
        visible = grey[alpha > 0]
        if visible.size and alpha.min() < 255 and visible.min() == visible.max():
            mask = image.getchannel("A")  # a shape cut out in one colour, be it black
        else:
            mask = Image.composite(mask, Image.new("L", size), image.getchannel("A"))
    if _range(mask)[1] == 0:
        raise DataError(f"the mask {path} is black; paint the subject white, or remove the file")
    return mask


def _open(path: Path, draft: int | None = None) -> _Picture:
    """Return the decoded, upright picture; `draft` lets JPEG decode at no fewer pixels a side than that."""
    try:
        if _is_heic(path):
            _register_heic(path)
        with _large_pictures_allowed(), Image.open(path) as image:
            size = None
            # Of JPEG alone: for HEIC a draft is the thumbnail in the file, which may be another picture.
            if draft is not None and image.format in ("JPEG", "MPO"):
                turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                size = image.size[::-1] if turned else image.size
                image.draft("RGB", (draft, draft))
            ImageOps.exif_transpose(image, in_place=True)
            return _Picture(_plain(image), size or image.size, image.info.get("icc_profile"))
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} has more than {MAX_PIXELS // 1_000_000} million pixels; scale it down"
        ) from error
    except Exception as error:  # Pillow raises whatever its decoders do: OSError, SyntaxError, struct.error
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({_reason(error)})"
        raise DataError(f"{path} cannot be read as a picture{reason}; replace or remove it") from error


@contextmanager
def _large_pictures_allowed() -> Iterator[None]:
    """Raise Pillow's limit against decompression bombs to MAX_PIXELS; above it, opening raises."""
    # Limit and filters belong to the whole process, so threads take turns.
    with _MAX_PIXELS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken metadata in pictures that can be read all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _is_heic(path: Path) -> bool:
    # By content: phones' pictures are renamed to .jpg, and pictures converted to JPEG keep .heic.
    with path.open("rb") as file:
        start = file.read(64)
    brands = start[8:]  # AVIF shares the container, and Pillow reads it
    return (
        start[4:8] == b"ftyp"
        and any(brand in brands for brand in (b"hei", b"hev", b"mif1", b"msf1"))
        and not any(brand in brands for brand in (b"avif", b"avis"))
    )


def _register_heic(path: Path) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise DataError(
            f"{path} is a HEIC picture, which needs another package: pip install 'dbadapter[heic]', "
            "or save it as JPEG or PNG"
        ) from error
    register_heif_opener()


def _plain(image: Image.Image) -> Image.Image:
    """Return the picture in 8 bits, without a palette: mode L, RGB, RGBA, CMYK or LAB."""
    if image.mode.startswith(("I", "F")):
        # convert() would clip 16-bit grey: everything above 255 to white.
        values = np.asarray(image, dtype=np.float32)
        highest = values.max(initial=0)
        top = 65535.0 if highest > 255 else 1.0 if image.mode == "F" and highest <= 1 else 255.0
        return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode in ("L", "1"):
        return image.convert("L")
    return image if image.mode in ("RGB", "CMYK", "LAB") else image.convert("RGB")


def _srgb_on_white(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    if image.mode != "RGBA":
        return _srgb(image, icc_profile)
    rgb = _srgb(image.convert("RGB"), icc_profile)
    return Image.composite(rgb, Image.new("RGB", image.size, (255, 255, 255)), image.getchannel("A"))


def _srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    """Return the picture, mode L, RGB, CMYK or LAB, as RGB in sRGB; a broken profile is as good as none."""
    if image.mode == "LAB":
        return _converted(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    if icc_profile is not None:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
            if profile.profile.xcolor_space.strip() == "RGB" and image.mode == "L":
                image = image.convert("RGB")
            return _converted(image, profile)
        except (ImageCms.PyCMSError, OSError):
            pass  # broken, or of other colours than the picture's: viewers ignore it too
    return image.convert("RGB")


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    result = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert result is not None  # it is None only in place
    return result


def _scaled(
    image: Image.Image,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    filter_: Image.Resampling,
) -> Image.Image:
    """Return the box, in parts of the whole, at a size; no more than the box is ever scaled."""
    width, height = image.size
    left, top, right, bottom = box
    return image.resize(size, filter_, (left * width, top * height, right * width, bottom * height))


def _range(image: Image.Image) -> tuple[int, int]:
    values = np.asarray(image)
    return int(values.min()), int(values.max())


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # str() would repeat the path
    return str(error).strip().split("\n")[0] or type(error).__name__
