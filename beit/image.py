"""One door for pictures: file or bytes -> RGB array, and RGB array -> what a network takes.

`preprocess` is the only code that prepares a picture for evaluation, so that the same picture gives
the same numbers in training, evaluation, the command line and a server. No torch here.

Shapes: an image is uint8 (height, width, 3) RGB; a prepared one float32 (3, height, width).
"""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif",
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # nothing else is even tried

MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 100_000_000

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

Resize = Literal["short_side", "squash"]

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BadImage(ValueError):
    """A picture that cannot be used: `code` for machines, `path` and `reason` for people."""

    def __init__(self, code: str, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.code, self.path, self.reason = code, path, reason


@dataclass(frozen=True)
class ImageSpec:
    """How a network wants its pictures. Saved with the weights."""

    size: tuple[int, int] = (224, 224)  # (height, width) in pixels
    resize: Resize = "short_side"  # squash ignores the picture's shape
    filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_ratio: float = 0.875  # short side is resized to size / crop_ratio, then the centre is cut
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size {self.size} is not (height, width) in pixels")
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize {self.resize!r} is not one of {', '.join(get_args(Resize))}")
        if self.filter not in FILTERS:
            raise ValueError(f"filter {self.filter!r} is not one of {', '.join(FILTERS)}")
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(
                f"crop_ratio {self.crop_ratio} is not in (0, 1]; 0.875 is usual, 1 shows all"
            )


def unilm_spec(img_size: int) -> ImageSpec:
    """The original evaluation rule: crop 0.875 below 384 pixels, the whole short side from there on."""
    return ImageSpec(size=(img_size, img_size), crop_ratio=0.875 if img_size < 384 else 1.0)


def read_image(source: str | os.PathLike[str] | bytes | Image.Image | np.ndarray) -> np.ndarray:
    """Read one picture as uint8 (height, width, 3) RGB, upright, whatever its file's mode.

    EXIF orientation is applied; other modes become RGB by Pillow's `convert`, 16-bit ones scaled
    first. An array is only looked at. Raises BadImage for anything that is not a readable picture
    within the limits.
    """
    if isinstance(source, np.ndarray):
        return _checked(source)
    name = "picture" if isinstance(source, (bytes, Image.Image)) else os.fspath(source)
    try:
        with _without_warnings():
            if isinstance(source, Image.Image):
                return _to_rgb(source, name)
            content = source if isinstance(source, bytes) else _file_bytes(Path(source))
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return _to_rgb(image, name)
    except BadImage:
        raise
    except MemoryError:
        raise
    except FileNotFoundError:
        raise BadImage("missing", name, "no such file") from None
    except Image.DecompressionBombError as error:  # Pillow's own, far larger, limit is met first
        raise BadImage("too_large", name, str(error)) from None
    except Exception as error:  # Pillow raises six kinds for broken files, SyntaxError among them
        raise BadImage("unreadable", name, f"not a readable picture ({error})") from error


_readers = 0
_readers_lock = threading.Lock()
_silence = ExitStack()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Pillow about damaged files. The filters belong to the process, so the first of the
    threads that read sets them and the last puts them back."""
    global _readers
    with _readers_lock:
        if _readers == 0:
            _silence.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _readers += 1
    try:
        yield
    finally:
        with _readers_lock:
            _readers -= 1
            if _readers == 0:
                _silence.close()


def _file_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise BadImage("too_large", str(path), f"{size:,} bytes; the limit is {MAX_FILE_BYTES:,}")
    return path.read_bytes()


def _checked(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        came = f"{array.dtype} {array.shape}"
        raise BadImage("unreadable", "picture", f"an array is uint8 (height, width, 3) RGB, not {came}")
    return array


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise BadImage(
            "too_large", name, f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,}"
        )
    if pixels == 0:
        raise BadImage("empty", name, "a picture without pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_scale_to_bytes(np.asarray(image)))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """16-bit integers by 1/257; floats from [0, 1], or from their own range where they leave it."""
    whole, values = values.dtype.kind in "iu", values.astype(np.float64)
    if values.min() >= 0 and values.max() <= (65535 if whole else 1):
        return np.round(values / 257 if whole else values * 255).astype(np.uint8)
    span = max(float(values.max() - values.min()), 1e-12)
    return np.round((values - values.min()) / span * 255).astype(np.uint8)


def resize_and_crop(image: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """The geometry of evaluation: uint8 (H, W, 3) -> uint8 (height, width, 3) of the spec."""
    height, width = spec.size
    picture = Image.fromarray(image)
    filter_ = FILTERS[spec.filter]
    if spec.resize == "squash":
        return np.asarray(picture.resize((width, height), filter_))
    scale = max(
        math.floor(height / spec.crop_ratio) / picture.height,
        math.floor(width / spec.crop_ratio) / picture.width,
    )
    resized = (
        max(width, int(picture.width * scale + 1e-6)),
        max(height, int(picture.height * scale + 1e-6)),
    )
    picture = picture.resize(resized, filter_)
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    return np.asarray(picture.crop((left, top, left + width, top + height)))


def preprocess(image: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Prepare one RGB picture for evaluation: uint8 (H, W, 3) -> float32 (3, height, width)."""
    pixels = resize_and_crop(image, spec).astype(np.float32) / np.float32(255)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))
