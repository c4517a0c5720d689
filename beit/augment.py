"""Training transforms: the two-view crop of pre-training, the crop and flip of fine-tuning.

All randomness comes from a generator given per sample. Work on one picture stays uint8 and small;
what can be done to a whole batch (to float, normalise) is done to the batch, on its device.

Shapes: an image is uint8 (height, width, 3) RGB; a batch of them becomes float (B, 3, H, W).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from beit.image import FILTERS, ImageSpec

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class TwoViews:
    """Pre-training's transform (§5.1 of the published recipe): one crop, drawn at two sizes."""

    img_size: int = 224  # pixels of the patch view
    token_size: int = 112  # pixels of the token view
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the picture's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    hflip: float = 0.5  # probability
    color_jitter: float = 0.4  # of brightness, contrast and saturation; 0 turns it off
    patch_filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    token_filter: Literal["bilinear", "bicubic", "lanczos"] = "lanczos"

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One picture -> (patch view, token view), which share jitter, flip and crop box."""
        picture = jitter_color(Image.fromarray(image), self.color_jitter, rng)
        if rng.random() < self.hflip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = sample_crop_box(picture.size, self.crop_scale, self.crop_ratio, rng)
        return (
            _crop(picture, box, self.img_size, self.patch_filter),
            _crop(picture, box, self.token_size, self.token_filter),
        )


@dataclass(frozen=True)
class CropAndFlip:
    """Fine-tuning's and the tokenizer's transform: a random crop at one size, perhaps mirrored."""

    img_size: int = 224
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (img_size, img_size, 3)."""
        picture = Image.fromarray(image)
        if rng.random() < self.hflip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = sample_crop_box(picture.size, self.crop_scale, self.crop_ratio, rng)
        return _crop(picture, box, self.img_size, "bicubic")


def _crop(picture: Image.Image, box: Box, size: int, filter_name: str) -> np.ndarray:
    return np.asarray(picture.crop(box).resize((size, size), FILTERS[filter_name]))


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
    w, h = min(width, round(height * shape)), min(height, round(width / shape))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def jitter_color(picture: Image.Image, amount: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each times U(1 - amount, 1 + amount), in random order."""
    if amount == 0:
        return picture
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    factors = rng.uniform(max(0.0, 1 - amount), 1 + amount, size=3)
    for i in rng.permutation(3):
        picture = enhancers[i](picture).enhance(float(factors[i]))
    return picture


def to_unit(images: list[np.ndarray], device: torch.device) -> Tensor:
    """uint8 pictures of one size -> float32 (B, 3, H, W) in [0, 1], on the device."""
    batch = torch.from_numpy(np.stack(images)).to(device, non_blocking=True)
    return batch.permute(0, 3, 1, 2).float().div_(255)


def normalise(images: Tensor, spec: ImageSpec) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> normalised with the spec's mean and standard deviation."""
    mean = torch.tensor(spec.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(3, 1, 1)
    return (images - mean) / std
