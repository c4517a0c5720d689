"""Training transforms: two views of one crop, a crop for fine-tuning, RandAugment, erasing, mixing.

Randomness comes from a generator given per sample; that of a whole batch from one given per step.
Work on one picture stays uint8 and small: the box is drawn first, a large JPEG is decoded no larger
than the crop needs, torch resizes. What can be done to a batch is done to the batch, on its device.

Against Pillow: crops, flips, brightness, saturation and RandAugment are equal byte for byte; resized
pixels differ by 2 levels at most (torch's fixed-point weights); the grey that contrast moves away
from is measured on every nth pixel of large pictures. docs/log.md has the numbers.

Shapes: an image is uint8 (height, width, 3) RGB; a batch of them becomes float (B, 3, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps, ImageStat
from torch import Tensor

from beit.image import FILTERS, ImageSpec, OpenImage, open_image

Box = tuple[int, int, int, int]  # left, top, right, bottom
Filter = Literal["bilinear", "bicubic", "lanczos"]
Jitter = list[tuple[str, float]]  # (what, factor), in order

# --- One picture ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoViews:
    """Pre-training's transform: one crop, drawn at two sizes (§5.1 and §5.2 of the published recipe).

    As it stands, that of BEiT v1 with DALL-E's tokenizer; `V2_VIEWS` is that of v2.
    """

    img_size: int = 224  # pixels of the patch view
    token_size: int = 112  # pixels of the token view
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the picture's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    hflip: float = 0.5  # probability
    color_jitter: float = 0.4  # of brightness, contrast and saturation; 0 turns it off
    patch_filter: Filter = "bicubic"
    token_filter: Filter = "lanczos"

    def __call__(
        self, image: np.ndarray | OpenImage, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """One picture -> (patch view, token view), which share jitter, flip and crop box."""
        opened = image if isinstance(image, OpenImage) else open_image(image)
        jitter = sample_jitter(self.color_jitter, rng)
        flip = rng.random() < self.hflip
        box = sample_crop_box(opened.size, self.crop_scale, self.crop_ratio, rng)
        crop = crop_and_flip(opened, box, max(self.img_size, self.token_size), flip, jitter)
        return (
            resize(crop, self.img_size, self.patch_filter),
            resize(crop, self.token_size, self.token_filter),
        )


V2_VIEWS = TwoViews(token_size=224, crop_scale=(0.2, 1.0), token_filter="bicubic")


@dataclass(frozen=True)
class CropAndFlip:
    """Fine-tuning's and the tokenizer's transform: a random crop at one size, perhaps mirrored, and
    two operations of RandAugment where asked for (§5.3)."""

    img_size: int | tuple[int, int] = 224  # of a square, or (height, width)
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # of the view's own shape
    hflip: float = 0.5
    rand_augment: float = 0.0  # magnitude, up to 10; the recipe's is 9; 0 turns it off
    fill: tuple[int, int, int] = (128, 128, 128)  # what RandAugment moves in: 255 * mean

    def __call__(self, image: np.ndarray | OpenImage, rng: np.random.Generator) -> np.ndarray:
        """One picture -> uint8 (height, width, 3)."""
        opened = image if isinstance(image, OpenImage) else open_image(image)
        flip = rng.random() < self.hflip
        height, width = pair(self.img_size)
        least, most = (ratio * (width / height) for ratio in self.crop_ratio)
        box = sample_crop_box(opened.size, self.crop_scale, (least, most), rng)
        crop = crop_and_flip(opened, box, max(height, width), flip)
        view = resize(crop, (height, width), "bicubic")
        if not self.rand_augment:
            return view
        return np.array(rand_augment(Image.fromarray(view), self.rand_augment, self.fill, rng))


def sample_crop_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """A random box of a picture of (width, height): area share uniform in `scale`, shape log-uniform
    in `ratio`. After ten boxes that do not fit, the largest centred one of an allowed shape."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a view; one number is both."""
    return (size, size) if isinstance(size, int) else size


def crop_and_flip(
    image: OpenImage, box: Box, wanted: int, flip: bool, jitter: Jitter | None = None
) -> np.ndarray:
    """What stands in `box` of the jittered and perhaps mirrored picture: uint8 (h, w, 3).

    A JPEG is decoded at 1/2, 1/4 or 1/8 where the crop then still has `wanted` pixels each way; its
    box is then widened to whole pixels of that scale.
    """
    left, top, right, bottom = box
    scale = next((s for s in (8, 4, 2) if min(right - left, bottom - top) // s >= wanted), 1)
    picture = image.picture(scale)
    if flip:  # the box is one of the mirrored picture; mirroring the crop is cheaper, and the same
        left, right = image.size[0] - right, image.size[0] - left
    if picture.size != image.size:
        left, top = left // scale, top // scale
        right, bottom = -(-right // scale), -(-bottom // scale)
    crop = apply_jitter(picture, jitter or [], (left, top, right, bottom))
    return np.array(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)


def resize(image: np.ndarray, size: int | tuple[int, int], filter_name: Filter) -> np.ndarray:
    """uint8 (h, w, 3) -> uint8 (height, width, 3): Pillow's filters, rows before columns, at four times
    the speed. (Newer Pillows begin with the columns where that is less work.)

    size: of a square, or (height, width).
    """
    height, width = pair(size)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    try:
        resized = F.interpolate(batch, size=(height, width), mode=filter_name, antialias=True)
    except ValueError:  # older torch has no lanczos
        return np.array(Image.fromarray(image).resize((width, height), FILTERS[filter_name]))
    view = np.empty((height, width, 3), np.uint8)
    for channel, plane in enumerate(resized[0].numpy()):  # four times as fast as a transposed copy
        view[:, :, channel] = plane
    return view


# --- Colours -------------------------------------------------------------------------------------

MEAN_SAMPLE = 128  # of a picture of twice this size, contrast looks at every second pixel, and so on


def sample_jitter(amount: float, rng: np.random.Generator) -> Jitter:
    """Brightness, contrast and saturation, each times U(1 - amount, 1 + amount), in random order."""
    if amount == 0:
        return []
    names = ("brightness", "contrast", "saturation")
    factors = rng.uniform(max(0.0, 1 - amount), 1 + amount, size=3)
    return [(names[i], float(factors[i])) for i in rng.permutation(3)]


def apply_jitter(picture: Image.Image, jitter: Jitter, box: Box) -> Image.Image:
    """Jitter a picture and cut out a box, the cheap way round.

    Brightness and saturation look at one pixel at a time, so the crop alone is enough. Contrast moves
    pixels away from the whole picture's mean grey, as it is after the changes before.
    """
    crop = picture.crop(box)
    for number, (what, factor) in enumerate(jitter):
        grey = _mean_grey(picture, jitter[:number]) if what == "contrast" else 0
        crop = _enhance(crop, what, factor, grey)
    return crop


_RAMP = Image.frombytes("L", (256, 1), bytes(range(256)))


def _enhance(picture: Image.Image, what: str, factor: float, grey: int = 0) -> Image.Image:
    if what == "saturation":
        return ImageEnhance.Color(picture).enhance(factor)
    # away from black, or from the mean grey: a table of what Pillow makes of the 256 levels
    levels = Image.blend(Image.new("L", (256, 1), grey), _RAMP, factor).tobytes()
    return picture.point(list(levels) * 3)


def _mean_grey(picture: Image.Image, before: Jitter) -> int:
    step = max(1, min(picture.size) // MEAN_SAMPLE)
    if step > 1:
        size = -(-picture.width // step), -(-picture.height // step)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    for what, factor in before:
        picture = _enhance(picture, what, factor)
    return int(ImageStat.Stat(picture.convert("L")).mean[0] + 0.5)


# --- RandAugment ---------------------------------------------------------------------------------

Fill = tuple[int, int, int]

_BICUBIC = Image.Resampling.BICUBIC


def _moved(picture: Image.Image, affine: tuple[float, ...], fill: Fill) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, affine, _BICUBIC, fillcolor=fill)


def _posterize(picture: Image.Image, bits: int) -> Image.Image:
    """Pillow's own refuses 0 bits, black, which is what the strongest magnitude asks for."""
    return picture.point([i & (0xFF00 >> bits) for i in range(256)] * 3)


def _solarize_add(picture: Image.Image, amount: int) -> Image.Image:
    return picture.point([min(255, i + amount) if i < 128 else i for i in range(256)] * 3)


# name -> what it does to (picture, strength, fill); strength is 0 to 1, or -1 to 1 where it has a
# direction, and more is always more
OPERATIONS: dict[str, Callable[[Image.Image, float, Fill], Image.Image]] = {
    "AutoContrast": lambda p, v, f: ImageOps.autocontrast(p),
    "Equalize": lambda p, v, f: ImageOps.equalize(p),
    "Invert": lambda p, v, f: ImageOps.invert(p),
    "Rotate": lambda p, v, f: p.rotate(v * 30, _BICUBIC, fillcolor=f),
    "Posterize": lambda p, v, f: _posterize(p, 4 - int(abs(v) * 4)),
    "Solarize": lambda p, v, f: ImageOps.solarize(p, 256 - int(abs(v) * 256)),
    "SolarizeAdd": lambda p, v, f: _solarize_add(p, int(abs(v) * 110)),
    "Color": lambda p, v, f: ImageEnhance.Color(p).enhance(1 + v * 0.9),
    "Contrast": lambda p, v, f: ImageEnhance.Contrast(p).enhance(1 + v * 0.9),
    "Brightness": lambda p, v, f: ImageEnhance.Brightness(p).enhance(1 + v * 0.9),
    "Sharpness": lambda p, v, f: ImageEnhance.Sharpness(p).enhance(1 + v * 0.9),
    "ShearX": lambda p, v, f: _moved(p, (1, v * 0.3, 0, 0, 1, 0), f),
    "ShearY": lambda p, v, f: _moved(p, (1, 0, 0, v * 0.3, 1, 0), f),
    "TranslateX": lambda p, v, f: _moved(p, (1, 0, v * 0.45 * p.width, 0, 1, 0), f),
    "TranslateY": lambda p, v, f: _moved(p, (1, 0, 0, 0, 1, v * 0.45 * p.height), f),
}


def rand_augment(
    picture: Image.Image, magnitude: float, fill: Fill, rng: np.random.Generator
) -> Image.Image:
    """RandAugment as BEiT was fine-tuned with, `rand-m9-mstd0.5-inc1`: two of 15 operations, each done
    half of the time, with strength N(magnitude, 0.5) / 10 in either direction."""
    operations = list(OPERATIONS.values())
    for number in rng.integers(len(operations), size=2):
        if rng.random() < 0.5:
            strength = min(max(rng.normal(magnitude, 0.5), 0.0), 10.0) / 10
            sign = 1 if rng.random() < 0.5 else -1
            picture = operations[number](picture, sign * strength, fill)
    return picture


# --- Batches -------------------------------------------------------------------------------------


def to_unit(images: list[np.ndarray], device: torch.device) -> Tensor:
    """uint8 pictures of one size -> float32 (B, 3, H, W) in [0, 1], on the device."""
    batch = torch.from_numpy(np.ascontiguousarray(np.stack(images))).to(device, non_blocking=True)
    return batch.float().div_(255).permute(0, 3, 1, 2)


def normalise(images: Tensor, spec: ImageSpec) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> normalised with the spec's mean and standard deviation; what `to_unit`
    made is changed in place, as new memory for each batch cost more than the arithmetic."""
    rows = images.permute(0, 2, 3, 1).flatten(2)  # (B, H, 3 W)
    mean, std = (
        torch.tensor(values, device=images.device).repeat(images.shape[3])
        for values in (spec.mean, spec.std)
    )
    rows = rows.sub_(mean).div_(std)  # whole rows: far faster than three values at a time
    return rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class EraseAndMix:
    """What is done to a normalised batch of pictures on its device; 0 turns a part off."""

    reprob: float
    mixup: float
    cutmix: float

    @property
    def does_something(self) -> bool:
        """Whether a batch comes out other than it went in; what it does depends on the whole batch."""
        return bool(self.reprob or self.mixup or self.cutmix)

    def __call__(
        self, images: Tensor, labels: Tensor, num_classes: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) and what they then show: labels (B,), or shares (B, C) where mixed.

        labels: int64 (B,), or bool (B, C).
        """
        wanted = labels.float() if labels.ndim == 2 else labels
        if self.reprob:
            images = erase(images, self.reprob, rng)
        if self.mixup or self.cutmix:
            height, width = images.shape[2:]
            mix = sample_mix(height, width, self.mixup, self.cutmix, rng)
            images = mix_images(images, mix)
            if labels.ndim == 2:
                wanted = torch.lerp(wanted.flip(0), wanted, mix.share)
            else:
                wanted = mix_targets(labels, num_classes, mix)
        return images, wanted


def erase(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Random erasing, in place: a box of some pictures of a normalised batch becomes noise, N(0, 1).

    The box covers 2 % to a third of a picture and is 0.3 to 3.3 times as high as wide.
    """
    noise = torch.Generator(images.device)
    noise.manual_seed(int(rng.integers(2**63)))
    for image in images:
        box = sample_erase_box(image.shape[1], image.shape[2], probability, rng)
        if box is not None:
            left, top, right, bottom = box
            image[:, top:bottom, left:right].normal_(generator=noise)
    return images


def sample_erase_box(
    height: int, width: int, probability: float, rng: np.random.Generator
) -> Box | None:
    """Where to erase; None where not, which is always so after ten boxes that do not fit."""
    if rng.random() > probability:
        return None
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        shape = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))  # height / width
        h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    return None


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed with itself in reverse order: all over, or where a box is given, there."""

    share: float  # of a picture's own class in its target; the rest is its partner's
    box: Box | None = None


def sample_mix(height: int, width: int, mixup: float, cutmix: float, rng: np.random.Generator) -> Mix:
    """Mixup or cutmix, half of the time each where both are given.

    mixup, cutmix: the two equal parameters of the Beta distribution of the share; 0 turns one off. The
    recipe's are 0.8 and 1. A box that reaches over the edge leaves the picture a larger share.
    """
    if cutmix and (not mixup or rng.random() < 0.5):
        return sample_cutmix(height, width, float(rng.beta(cutmix, cutmix)), rng)
    return Mix(float(rng.beta(mixup, mixup)))


def sample_cutmix(height: int, width: int, share: float, rng: np.random.Generator) -> Mix:
    """A box of 1 - share of the picture around any pixel, cut off at the edges, and what that leaves."""
    side = math.sqrt(1 - share)
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - half_h, 0), min(y + half_h, height)
    left, right = max(x - half_w, 0), min(x + half_w, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (left, top, right, bottom))


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Each picture of (B, 3, H, W) with its partner, the one as far from the batch's other end."""
    if mix.box is None:
        return torch.lerp(images.flip(0), images, mix.share)
    left, top, right, bottom = mix.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed


def mix_targets(labels: Tensor, num_classes: int, mix: Mix) -> Tensor:
    """Class numbers (B,) -> shares (B, C) float32. The loss smooths them: `cross_entropy` does."""
    own = F.one_hot(labels, num_classes).float()
    return torch.lerp(own.flip(0), own, mix.share)
