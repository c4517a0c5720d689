"""Pictures of what happens: a masked image, its tokens drawn, reconstructions, curves.

Shapes: an image is uint8 (height, width, 3); a mask bool (h, w).
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

GREY = 127  # what a masked patch looks like
GREEN, RED = (5, 150, 105), (220, 38, 38)
COLOURS = (
    "#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#4d7c0f", "#92400e",
    "#475569", "#a21caf", "#0f766e",
)  # fmt: skip
MOST_POINTS = 1000  # of a curve: twice the pixels that it is drawn on


def to_bytes(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> uint8 (B, H, W, 3)."""
    scaled = images.detach().float().clamp(0, 1).mul(255).round().byte()
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def hide_patches(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with its masked patches greyed out."""
    return np.where(spread(mask, image.shape[:2])[..., None], np.uint8(GREY), image)


def mark_patches(image: np.ndarray, mask: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The image, pale, with its masked patches green where `right` (h, w) is True, else red."""
    pale = 255 - (255 - image.astype(np.float32)) / 2
    size = image.shape[:2]
    for where, colour in ((mask & right, GREEN), (mask & ~right, RED)):
        pale = np.where(spread(where, size)[..., None], 0.4 * pale + 0.6 * np.array(colour), pale)
    return pale.astype(np.uint8)


def spread(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A patch mask (h, w) as a pixel mask of (height, width), whole multiples of it."""
    h, w = mask.shape
    return np.kron(mask, np.ones((size[0] // h, size[1] // w), dtype=bool))


def strip(rows: Sequence[Sequence[np.ndarray]], side: int = 96, gap: int = 4) -> Image.Image:
    """A sheet of pictures, one row a sample, each drawn `side` pixels high and wide."""
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (columns * (side + gap) + gap, len(rows) * (side + gap) + gap), (255, 255, 255)
    )
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            enlarged = image.shape[0] <= side and image.shape[1] <= side  # to see single pixels
            how = Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
            tile = Image.fromarray(image).resize((side, side), how)
            sheet.paste(tile, (gap + x * (side + gap), gap + y * (side + gap)))
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """An image as the content of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def jpeg_bytes(image: Image.Image, most: int) -> bytes:
    """An image as the content of a JPEG file of about `most` bytes or fewer, as fine as that allows."""
    for quality in (90, 75, 50, 25, 10):
        stream = io.BytesIO()
        image.save(stream, format="JPEG", quality=quality, subsampling=0)  # marks keep their colour
        if stream.tell() <= most:
            break
    return stream.getvalue()


def img_tag(image: Image.Image, alt: str) -> str:
    """An image as an HTML element that carries its own data."""
    return data_tag(png_bytes(image), "png", alt)


def data_tag(content: bytes, kind: str, alt: str) -> str:
    """The content of a picture file, `kind` "png" or "jpeg", as an HTML element."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points as a curve can show, evenly spread, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, MOST_POINTS).astype(int)]


def ticks(values: list[float], digits: int) -> list[str]:
    """Numbers of an axis, with as many digits as tell them apart; large ones whole, with commas."""
    words: list[str] = []
    for more in range(digits, 9):
        words = [f"{value:.{more}g}" for value in values]
        if len(set(words)) == len(words):
            break
    return [f"{v:,.0f}" if "e+" in word else word for v, word in zip(values, words, strict=True)]


def line_chart(
    lines: dict[str, list[tuple[float, float]]], x_label: str, y_label: str, width: int = 460
) -> str:
    """Curves as an SVG element: {name: [(x, y), ...]}, points that are not finite left out."""
    left, bottom, right = 60, 40, 16
    in_a_row = max(1, (width - left) // 130)  # names above the picture
    names = 18 * ((len(lines) - 1) // in_a_row)
    top, height = 30 + names, round(width * 0.56) + names
    clean = {
        name: thinned([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
        for name, points in lines.items()
    }
    points = [point for line in clean.values() for point in line]
    if not points:
        return "<p>no numbers yet</p>"
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(y_label)}">']
    x_values, y_values = (np.linspace(*ends, 5).tolist() for ends in ((x0, x1), (y0, y1)))
    for x_value, y_value, x_words, y_words in zip(
        x_values, y_values, ticks(x_values, 4), ticks(y_values, 3), strict=True
    ):
        _, y = place(x0, y_value)
        x, _ = place(x_value, y0)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{y_words}</text>')
        last = x_value == x_values[-1]  # ends with the picture, which would cut it
        where, anchor = (width - 1, "end") if last else (round(x, 1), "middle")
        parts.append(
            f'<text x="{where}" y="{height - bottom + 16}" text-anchor="{anchor}">{x_words}</text>'
        )
    for i, (name, line) in enumerate(clean.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>')
        if len(clean) > 1:
            parts.append(
                f'<text x="{left + 8 + 130 * (i % in_a_row)}" y="{24 + 18 * (i // in_a_row)}" '
                f'style="fill:{colour}">'
                f"{html.escape(name)}</text>"
            )
    middle = (left + width - right) / 2
    parts.append(
        f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    parts.append(f'<text x="4" y="12">{html.escape(y_label)}</text></svg>')
    return "".join(parts)
