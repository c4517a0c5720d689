"""Damaged pictures without end: whatever a file holds, reading it gives an array or a BadImage.

    python tests/fuzz_images.py COUNT SEED

prints one line of JSON: how many were read and refused, by code, the slowest in seconds of work, and
how much memory the process held at most. Any other exception ends it; a warning is one.
"""

from __future__ import annotations

import io
import json
import resource
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from beit.image import BadImage, open_image

ADDRESS_SPACE = 2 << 30  # bytes; a file that asks for more gets an error from the system


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def seeds() -> list[bytes]:
    """Small pictures of six formats in their usual guises."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).resize((72, 60))
    grey, palette, clear = rgb.convert("L"), rgb.quantize(32), rgb.convert("RGBA")
    deep = Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16))
    exif = rgb.getexif()
    exif[274], exif[270] = 6, "words " * 20
    frames = [rgb.rotate(angle) for angle in (90, 180)]
    several = {"save_all": True, "append_images": frames}
    return [
        encoded(rgb, "JPEG", exif=exif),
        encoded(rgb, "JPEG", progressive=True, quality=60),
        encoded(rgb.convert("CMYK"), "JPEG"),
        encoded(grey, "JPEG", quality=30),
        encoded(rgb, "PNG", exif=exif),
        encoded(palette, "PNG", transparency=3),
        encoded(deep, "PNG"),
        encoded(rgb, "PNG", **several),
        encoded(clear, "WEBP", lossless=True),
        encoded(rgb, "WEBP", exif=exif),
        encoded(rgb, "WEBP", **several),
        encoded(palette, "GIF"),
        encoded(rgb, "GIF", **several),
        encoded(rgb, "TIFF", exif=exif),
        encoded(rgb, "TIFF", compression="tiff_lzw"),
        encoded(rgb, "TIFF", compression="jpeg"),
        encoded(deep, "TIFF"),
        encoded(rgb.convert("F"), "TIFF"),
        encoded(rgb, "BMP"),
        encoded(palette, "BMP"),
        encoded(grey.convert("1"), "BMP"),
    ]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, overwritten, with extreme numbers, with stretches doubled, moved or taken out."""
    data = bytearray(content)
    kind = rng.integers(6)
    start, end = sorted(int(v) for v in rng.integers(0, len(data), 2))
    if kind == 0:
        data = data[: int(rng.integers(1, len(data)))]
    elif kind == 1:
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            data[place] = rng.integers(256)
    elif kind == 2:  # headers are where the numbers are
        width = int(rng.choice([1, 2, 4]))
        place = int(rng.integers(0, min(len(data), 200)))
        value = [b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"][rng.integers(4)]
        data[place : place + width] = value[:width]
    elif kind == 3:
        data[start:start] = data[start:end]
    elif kind == 4:
        data = data[end:] + data[:end] if rng.random() < 0.1 else data[:start] + data[end:]
    else:
        other = int(rng.integers(0, len(data)))
        data[other : other + end - start] = data[start:end]
    damaged = bytes(data)
    if content.startswith(b"\x89PNG") and rng.random() < 0.7:
        damaged = with_checksums(damaged)
    return damaged


def with_checksums(png: bytes) -> bytes:
    """The same chunks with right checksums: otherwise that is all a reader ever sees of a damaged one."""
    out, place = bytearray(png[:8]), 8
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        body = png[place + 4 : place + 8 + length]
        out += png[place : place + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        place += 12 + length
    return bytes(out)


def peak_mib() -> float:
    """The most memory this process held. Linux's other number includes the parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def fuzz(count: int, seed: int) -> dict[str, object]:
    """Read `count` damaged pictures, some at a smaller scale."""
    rng, originals = np.random.default_rng(seed), seeds()
    codes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(count):
        content = mutated(originals[number % len(originals)], rng)
        started = time.process_time()
        try:
            opened = open_image(content)
            scale = int(rng.choice([1, 1, 2, 8]))
            image = opened.read(scale)
            assert image.dtype == np.uint8, image.dtype
            assert image.ndim == 3, image.shape
            assert image.shape[2] == 3, image.shape
            if scale == 1:
                assert opened.size == image.shape[1::-1], (opened.size, image.shape)
            codes["read"] += 1
        except BadImage as error:
            codes[error.code] += 1
        slowest = max(slowest, time.process_time() - started)
    return {"codes": dict(codes), "slowest_s": round(slowest, 3), "peak_mib": round(peak_mib())}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("error")
    print(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]))))
