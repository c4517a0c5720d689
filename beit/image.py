"""One door for pictures: file or bytes -> RGB array, and RGB array -> what a network takes.

`preprocess` is the only code that prepares a picture for evaluation, so that the same picture gives
the same numbers in training, evaluation, the command line and a server. No torch here.

| the file's mode | becomes RGB by |
|---|---|
| RGB; 16 bits a channel | as it is; the upper 8 bits, as Pillow opens them |
| 1, L, P, CMYK (also Adobe's inverted), YCbCr, LAB | Pillow's `convert`, as trained models saw them |
| LA, RGBA, P with transparency | the same: the colours stay, transparency is dropped |
| RGBa, La (premultiplied) | divided by their transparency first, then the same |
| I;16, and I within 0 to 65535 | value / 257, rounded |
| F within 0 to 1 | value * 255, rounded |
| other I and F | from their own lowest and highest, to 0 and 255; what is not a number is black |

Shapes: an image is uint8 (height, width, 3) RGB; a prepared one float32 (3, height, width).
"""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import math
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Literal, ParamSpec, TypeVar, get_args

import numpy as np
from PIL import ExifTags, Image, _imaging

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
    ".avif",
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # nothing else is even tried

MAX_PIXELS = 50_000_000  # the environment variable BEIT_MAX_PIXELS sets another
MAX_FILE_BYTES = 100_000_000
MAX_HEADER_BYTES = 32_000_000  # what a file may say besides its pixels
HELD_AT_ONCE = 4 << 20  # bytes; the header of a larger file is read before the file is held
# Of a disk or a network, which may answer the next time.
PASSING = {
    getattr(errno, name, None)
    for name in (
        "EIO", "EREMOTEIO", "ESTALE", "EAGAIN", "EBUSY", "ETIMEDOUT", "ENOTCONN", "ECONNRESET",
        "ECONNREFUSED", "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH",
    )
} - {None}  # fmt: skip
PAUSES_S = (0.2, 1.0)  # before it is asked again
THIN = 100  # times as much as is kept; what would be that large is resized in its middle alone
READ_COST = 4096  # bytes that a read counts at least, so that a header of single bytes ends as well

P = ParamSpec("P")
T = TypeVar("T")
Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

Resize = Literal["short_side", "squash"]
Preset = Literal["unilm", "timm", "transformers"]
USUAL_CROPS = (0.875, 0.9, 0.95)  # unilm's, timm's, and timm's of its large v2, below 384 pixels

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BadImage(ValueError):
    """A picture that cannot be used: `code` for machines, `path` and `reason` for people."""

    def __init__(self, code: str, path: str, reason: str) -> None:
        super().__init__(code, path, reason)  # all of them, so that it travels between processes
        self.code, self.path, self.reason = code, path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def has_no_answer(error: BaseException) -> bool:
    """Whether it was the disk or the network that failed, which says nothing of the picture."""
    cause = error.__cause__ if isinstance(error, BadImage) else error
    gone = isinstance(cause, (ConnectionError, TimeoutError))
    return gone or getattr(cause, "errno", None) in PASSING


def patiently(ask: Callable[P, T]) -> Callable[P, T]:
    """What reads a file, asking twice more where the disk or the network did not answer.

    That says nothing of the picture: in a training another would take its place, in a table of results
    its error would stand.
    """

    @wraps(ask)
    def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        for pause in PAUSES_S:
            try:
                return ask(*args, **kwargs)
            except (BadImage, OSError) as error:
                if not has_no_answer(error):
                    raise
            time.sleep(pause)
        return ask(*args, **kwargs)

    return asked


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


def unilm_spec(
    img_size: int,
    mean: tuple[float, float, float] = HALF,
    std: tuple[float, float, float] = HALF,
) -> ImageSpec:
    """The original evaluation rule: crop 0.875 below 384 pixels, the whole short side from there on.

    Statistics: HALF for v1 on ImageNet-22k, IMAGENET_MEAN and IMAGENET_STD for v1 on 1k and all v2.
    """
    return ImageSpec((img_size, img_size), "short_side", "bicubic", _crop(img_size, 0.875), mean, std)


def timm_spec(
    img_size: int,
    mean: tuple[float, float, float] = HALF,
    std: tuple[float, float, float] = HALF,
    large_v2: bool = False,
) -> ImageSpec:
    """timm's evaluation rule: crop 0.9 below 384 pixels, 0.95 for its v2 large models, 1 from 384 on."""
    ratio = _crop(img_size, 0.95 if large_v2 else 0.9)
    return ImageSpec((img_size, img_size), "short_side", "bicubic", ratio, mean, std)


def transformers_spec(
    img_size: int,
    mean: tuple[float, float, float] = HALF,
    std: tuple[float, float, float] = HALF,
) -> ImageSpec:
    """The rule of the published transformers checkpoints: squashed to a square, bilinear, all shown."""
    return ImageSpec((img_size, img_size), "squash", "bilinear", 1.0, mean, std)


def preset_spec(spec: ImageSpec, preset: Preset, embed_dim: int) -> ImageSpec:
    """How another code prepares pictures for a model of this size and width; mean and std stay."""
    side, mean, std = max(spec.size), spec.mean, spec.std
    if preset == "unilm":
        other = unilm_spec(side, mean, std)
    elif preset == "timm":  # its large v2 models have a ratio of their own; v1's large have other means
        other = timm_spec(side, mean, std, large_v2=embed_dim == 1024 and mean == IMAGENET_MEAN)
    else:
        other = transformers_spec(side, mean, std)
    return replace(other, size=spec.size)


def cropped_spec(spec: ImageSpec, crop_ratio: float) -> ImageSpec:
    """The same with another centre to look at; what was squashed to its size no longer is."""
    return replace(spec, resize="short_side", crop_ratio=crop_ratio)


def resized_spec(spec: ImageSpec, size: tuple[int, int]) -> ImageSpec:
    """The same at another size in pixels; from 384 on the whole short side is seen, as is usual."""
    was_small, is_small = max(spec.size) < 384, max(size) < 384
    usual = USUAL_CROPS if was_small else (1.0,)  # else somebody chose it
    if spec.resize == "short_side" and was_small != is_small and spec.crop_ratio in usual:
        return replace(spec, size=size, crop_ratio=_crop(max(size), 0.875))
    return replace(spec, size=size)


def _crop(img_size: int, ratio: float) -> float:
    return ratio if img_size < 384 else 1.0


def read_image(source: Source) -> np.ndarray:
    """Read one picture as uint8 (height, width, 3) RGB, upright, by the table above.

    Raises BadImage for anything that is not a readable picture within the limits.
    """
    return open_image(source).read()


def open_image(source: Source, name: str | None = None, max_pixels: int | None = None) -> OpenImage:
    """Read a picture's header and check it against the limits; nothing is decoded.

    source: a path, a file's bytes, a Pillow image, or an array, which is only looked at.
    name: what errors call it; the path, or "picture".
    max_pixels: instead of BEIT_MAX_PIXELS or 50 million; Pillow's own limit of 179 million stays.
    Raises BadImage.
    """
    return OpenImage(source, name, max_pixels)


class OpenImage:
    """One frame of a picture whose header is read and whose pixels are not yet.

    size: (width, height) as the header declares them, upright. name: what errors call it.
    """

    def __init__(self, source: Source, name: str | None = None, max_pixels: int | None = None) -> None:
        self.name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "picture")
        self._max_pixels = _pixel_limit() if max_pixels is None else max_pixels
        self._source: bytes | Image.Image | np.ndarray
        if isinstance(source, np.ndarray):
            self._source = _checked(source, self.name)
            self.size = source.shape[1], source.shape[0]
            return
        with _only_bad_images(self.name):
            if isinstance(source, Image.Image):
                self._source = source
            elif isinstance(source, bytes):
                check_file_size(len(source), self.name)
                self._source = source
            else:
                self._source = self._content(source)
            self._unread: Image.Image | None = self._open()
            width, height = self._unread.size
            self.size = (height, width) if self._is_turned(self._unread) else (width, height)

    def read(self, scale: int = 1) -> np.ndarray:
        """The pixels, uint8 (height, width, 3).

        scale: a JPEG is decoded at 1/scale of its size where that is 2, 4 or 8, its sides rounded up;
        others at their own. For training: the pixels are not exactly those of a resize.
        """
        if isinstance(self._source, np.ndarray):
            return self._source
        with _only_bad_images(self.name):
            return _to_array(self.picture(scale))

    def picture(self, scale: int = 1) -> Image.Image:
        """As `read`, as a Pillow image of mode RGB: one copy less."""
        if scale not in (1, 2, 4, 8):
            raise ValueError(f"scale {scale} is not one of 1, 2, 4, 8")
        if isinstance(self._source, np.ndarray):
            return Image.fromarray(self._source)
        with _only_bad_images(self.name):
            image, self._unread = self._unread or self._open(), None
            if scale > 1 and not isinstance(self._source, Image.Image):
                image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))
            return _to_rgb(image)

    def _is_turned(self, image: Image.Image) -> bool:
        if image.format == "TIFF":
            return False  # Pillow turns it, and says so in its size
        if image.format == "PNG" and "exif" not in image.info and isinstance(self._source, bytes):
            # Pillow would decode it all to look behind the pixels; do so only where something is there
            anywhere = b"eXIf" in self._source or b"XML:com.adobe.xmp" in self._source
            return anywhere and _orientation(image) >= 5
        return _orientation(image) >= 5

    @patiently
    def _content(self, path: str | os.PathLike[str]) -> bytes:
        """A file, if there may be a picture in it: what is refused takes no memory of its own size."""
        with open_file(path, self.name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > HELD_AT_ONCE:
                with _FileHeader(file.fileno(), size, self.name) as header:
                    self._check(_open_header(header))
                file.seek(0)
            return file.read(size)

    def _open(self) -> Image.Image:
        if isinstance(self._source, Image.Image):
            return self._check(self._source)
        assert isinstance(self._source, bytes)
        header = _Header(self._source, self.name)
        image = self._check(_open_header(header))
        header.budget = math.inf
        return image

    def _check(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width * height == 0:
            raise BadImage("empty", self.name, "a picture without pixels")
        if width * height > self._max_pixels:
            reason = f"{width} x {height} pixels; the limit is {self._max_pixels:,}"
            raise BadImage("too_large", self.name, reason)
        return image


class _Limited:
    """A file whose header ends: more reading than any real header takes is refused, before it is done."""

    called: str
    length: int
    budget: float

    def __repr__(self) -> str:  # in Pillow's errors, which are to be the same each time
        return repr(os.path.basename(self.called))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size >= 0:  # formats that are read whole say so with -1
            self.take(max(READ_COST, min(size, self.length - self.tell())))  # type: ignore[attr-defined]
        return super().read(size)  # type: ignore[misc]

    def take(self, size: int) -> None:
        """Count bytes of a header. Raises BadImage."""
        self.budget -= size
        if self.budget < 0:
            reason = f"its header is longer than {MAX_HEADER_BYTES:,} bytes"
            raise BadImage("too_large", self.called, reason)


class _Header(_Limited, io.BytesIO):
    """Of a file in memory."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.called, self.length, self.budget = name, len(content), MAX_HEADER_BYTES


class _FileHeader(_Limited, io.BufferedReader):
    """Of an open file, which stays open."""

    def __init__(self, number: int, length: int, name: str) -> None:
        super().__init__(io.FileIO(number, closefd=False))
        self.called, self.length, self.budget = name, length, MAX_HEADER_BYTES


_PIXEL_CHUNKS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANMF")


def _open_header(header: _Header | _FileHeader) -> Image.Image:
    """Pillow's picture of a file whose header is not too long.

    A WebP or an AVIF Pillow reads whole, so what they hold besides pixels is measured first.
    """
    head = header.read(READ_COST)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        place = 12
        while place + 8 <= header.length:
            header.seek(place)
            chunk = header.read(8)
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] not in _PIXEL_CHUNKS:
                header.take(min(size, header.length - place))
            place += 8 + size + size % 2
    elif head[4:12] == b"ftypavif":
        sides = re.findall(rb"ispe....(....)(....)", head, re.DOTALL)
        pixels = max((int.from_bytes(w, "big") * int.from_bytes(h, "big") for w, h in sides), default=0)
        header.take(max(0, header.length - 8 * pixels))
    header.seek(0)
    return Image.open(header, formats=FORMATS)


def _pixel_limit() -> int:
    text = os.environ.get("BEIT_MAX_PIXELS", str(MAX_PIXELS))
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"BEIT_MAX_PIXELS {text!r} is not a number of pixels; {MAX_PIXELS} is usual")
    return int(text)


# Pillow logs some of what it raises; without a handler that ends on the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())

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


@contextmanager
def _only_bad_images(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is a BadImage, and nothing is said about it."""
    try:
        with _without_warnings():
            yield
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("memory", name, "there is not enough memory to decode it") from None
    except FileNotFoundError:
        raise BadImage("missing", name, "no such file") from None
    except Image.DecompressionBombError as error:  # far above our limit
        raise BadImage("too_large", name, str(error)) from None
    except OSError as error:  # the system's have a number, Pillow's none
        what = "not a readable picture" if error.errno is None else "cannot be read"
        raise BadImage("unreadable", name, f"{what} ({error.strerror or error})") from error
    except Exception as error:  # Pillow raises six kinds for broken files, SyntaxError among them
        raise BadImage("unreadable", name, f"not a readable picture ({error})") from error


def is_upright_rgb_jpeg(content: bytes) -> bool:
    """Whether a file that can be read is a JPEG whose pixels are as they are shown."""
    with _without_warnings(), Image.open(io.BytesIO(content)) as stored:
        return stored.format == "JPEG" and stored.mode == "RGB" and _orientation(stored) == 1


def open_file(path: str | os.PathLike[str], name: str) -> io.BufferedReader:
    """A file to read, if it is one: a pipe would wait for its writer. Raises BadImage, OSError."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError:  # a zero byte
        raise BadImage("missing", name, "no such file") from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("unreadable", name, "not a file")
        check_file_size(status.st_size, name)
        return open(file, "rb")
    except BaseException:
        os.close(file)
        raise


def check_file_size(size: int, name: str) -> None:
    """Refuse more than a picture may have. Raises BadImage."""
    if size > MAX_FILE_BYTES:
        raise BadImage("too_large", name, f"{size:,} bytes; the limit is {MAX_FILE_BYTES:,}")


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        came = f"{array.dtype} {array.shape}"
        raise BadImage("unreadable", name, f"an array is uint8 (height, width, 3) RGB, not {came}")
    return array


_UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where the file says nothing, or nothing that can be read: its pixels still can."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises what it raises for broken files
        return 1
    return value if value in _UPRIGHT else 1


@cache
def _quiet_libtiff() -> None:
    """libtiff writes its errors on the terminal, besides what Pillow raises; ask Pillow's copy not to."""
    with suppress(AttributeError, OSError):  # where Pillow hides its libtiff, only the quiet is lost
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.format == "TIFF":
        _quiet_libtiff()
    image.load()
    orientation = _orientation(image)  # only now: a TIFF has been turned by Pillow
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_scale_to_bytes(np.asarray(image)))
    elif image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.transpose(_UPRIGHT[orientation]) if orientation != 1 else image


def _to_array(picture: Image.Image) -> np.ndarray:
    """As `np.array(picture)`; in parts where that, for a moment, would hold a large picture thrice."""
    width, height = picture.size
    rows = max(1, (1 << 20) // width)
    if rows >= height:
        return np.array(picture)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(picture.crop((0, top, width, bottom)))
    return pixels


_SIXTEEN_TO_EIGHT = np.round(np.arange(65536) / 257).astype(np.uint8)


def _scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Integers of 16 bits or more, or floats -> uint8 of the same shape, by the table above."""
    whole = values.dtype.kind in "iu"
    finite = values if whole else values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low >= 0 and high <= (65535 if whole else 1):
        if whole:
            return _SIXTEEN_TO_EIGHT[values]
        low, high = 0.0, 1.0
    span = max(high - low, 1e-12)
    scaled = np.empty(values.shape, np.uint8)
    for start in range(0, values.size, 1 << 20):  # in parts: doubles of 50 million pixels are 400 MB
        part = slice(start, start + (1 << 20))
        levels = (values.ravel()[part].astype(np.float64) - low) / span * 255
        scaled.ravel()[part] = np.round(np.nan_to_num(levels, nan=0, posinf=255, neginf=0))
    return scaled


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
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    if resized[0] * resized[1] > THIN * width * height:
        # The same but for rounding, and a line of 1 x 40,000,000 pixels takes no terabytes.
        across, down = picture.width / resized[0], picture.height / resized[1]
        box = np.array([left * across, top * down, (left + width) * across, (top + height) * down])
        reach = 1 + 3 * max(across, down, 1)  # of a filter
        x, y = np.maximum(np.floor(box[:2] - reach), 0).astype(int).tolist()
        right, bottom = np.minimum(np.ceil(box[2:] + reach), picture.size).astype(int).tolist()
        middle = picture.crop((x, y, right, bottom))
        return np.asarray(middle.resize((width, height), filter_, tuple(box - [x, y, x, y])))
    picture = picture.resize(resized, filter_)
    return np.asarray(picture.crop((left, top, left + width, top + height)))


def preprocess(image: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Prepare one RGB picture for evaluation: uint8 (H, W, 3) -> float32 (3, height, width)."""
    pixels = resize_and_crop(image, spec)
    prepared = np.empty((3, *spec.size), np.float32)
    for channel, values in enumerate(_normalised(spec.mean, spec.std)):
        np.take(values, pixels[:, :, channel], out=prepared[channel], mode="clip")  # others copy first
    return prepared


@cache
def _normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """What each of the 256 values of a pixel becomes: float32 (3, 256)."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    columns = [np.array(each, np.float32)[:, None] for each in (mean, std)]
    return (values - columns[0]) / columns[1]
