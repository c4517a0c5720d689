"""Reading pictures: our loader beside a plain torch DataLoader over Pillow, in one run.

    python benchmarks/data.py --pictures imagenette/ --repeats 5

Parts: `speed` (images a second, of JPEGs of 224, 500 and 4000 pixels), `listing` (time to the first batch
of a list of 1,000,000 pictures, and again from the kept index), `memory` (resident memory over 200,000
samples). Prints Markdown.

The plain loader does what is usually written: decode all, jitter, flip, crop, resize, to numpy, divide,
normalise, each picture by itself. Both give float batches on the CPU: pre-training a normalised view of
224 pixels, a view of 112 for the tokenizer, and a mask; fine-tuning a normalised view of 224 pixels.
A core's images a second are images by seconds of processor time, of all processes together. Both take
turns, so that what else runs hurts both.

The pictures of 500 and 4000 pixels are photographs cut to 4:3, made larger, and given noise until a
pixel takes about as many bits as in photographs of such a size; without, they decode too easily.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from beit.augment import CropAndFlip, TwoViews, normalise, to_unit
from beit.data import BadImages, ImageSource, Loader, open_source
from beit.image import OpenImage, unilm_spec
from beit.masking import sample_mask

SPEC = unilm_spec(224)
CPU = torch.device("cpu")
BATCH = 32
NOISE = {500: 6.0, 4000: 4.0}  # standard deviation, of 255


# --- Pictures ------------------------------------------------------------------------------------


def write_pictures(
    source: ImageSource, size: int, count: int, folder: Path
) -> tuple[ImageSource, float]:
    """`count` JPEGs of a width, and how many bits a pixel of theirs takes."""
    folder.mkdir()
    bits = pixels = 0
    for number, index in enumerate(np.linspace(0, len(source) - 1, count).astype(int).tolist()):
        content = source.paths.content(index)
        if size != 224:
            picture = source.open(index).picture()
            height = round(picture.width * 3 / 4)
            box = (0, (picture.height - height) // 2, picture.width, (picture.height + height) // 2)
            large = picture.crop(box).resize((size, size * 3 // 4), Image.Resampling.LANCZOS)
            noise = np.random.default_rng(number).normal(0, NOISE[size], (size * 3 // 4, size, 1))
            noisy = np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(noisy).save(stream, "JPEG", quality=90)
            content = stream.getvalue()
        (folder / f"{number:05d}.jpg").write_bytes(content)
        bits, pixels = bits + 8 * len(content), pixels + math.prod(open_size(content))
    return open_source(folder), bits / pixels


def open_size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.size


# --- The plain loader ----------------------------------------------------------------------------


class PlainPictures(Dataset[tuple[Tensor, ...]]):
    """Pictures as they are usually read: one at a time, whole, in Pillow."""

    def __init__(self, source: ImageSource, two_views: bool) -> None:
        self.paths = [str(path) for path in source.paths]
        self.two_views = two_views
        self.mean, self.std = (
            torch.tensor(SPEC.mean)[:, None, None],
            torch.tensor(SPEC.std)[:, None, None],
        )

    def __len__(self) -> int:
        return 10**9  # as many as are asked for

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng(index)
        with Image.open(self.paths[index % len(self.paths)]) as opened:
            picture = opened.convert("RGB")
        if self.two_views:
            enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
            for number in rng.permutation(3):
                picture = enhancers[number](picture).enhance(rng.uniform(0.6, 1.4))
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = self.crop_box(picture.size, rng)
        crop = picture.crop(box)
        view = self.tensor(crop.resize((224, 224), Image.Resampling.BICUBIC))
        view = (view - self.mean) / self.std
        if not self.two_views:
            return (view,)
        mask = torch.from_numpy(sample_mask((14, 14), 75, rng))
        return view, self.tensor(crop.resize((112, 112), Image.Resampling.LANCZOS)), mask

    def crop_box(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        """8 to 100 % of the area, 3:4 to 4:3."""
        for _ in range(10):
            area = size[0] * size[1] * rng.uniform(0.08, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if width <= size[0] and height <= size[1]:
                left = int(rng.integers(size[0] - width + 1))
                top = int(rng.integers(size[1] - height + 1))
                return left, top, left + width, top + height
        return 0, 0, *size

    def tensor(self, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def plain_batches(source: ImageSource, two_views: bool, count: int, workers: int) -> Iterator[Any]:
    pictures = PlainPictures(source, two_views)
    yield from DataLoader(pictures, BATCH, sampler=range(count * BATCH), num_workers=workers)


# --- Ours ----------------------------------------------------------------------------------------


def our_batches(source: ImageSource, two_views: bool, count: int, workers: int) -> Iterator[Any]:
    bad_images = BadImages(Path(tempfile.gettempdir()) / "none.csv", len(source), 0.0)
    loader = Loader(source, min(BATCH, len(source)), 0, workers, bad_images)
    steps = range(count * BATCH // loader.batch_size)
    views, view = TwoViews(), CropAndFlip()

    def prepare(picture: OpenImage, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return (
            (*views(picture, rng), sample_mask((14, 14), 75, rng))
            if two_views
            else (view(picture, rng),)
        )

    for samples in loader.batches(steps, prepare):
        first, *others = zip(*(value for _, value in samples), strict=True)
        images = normalise(to_unit(list(first), CPU), SPEC)
        if two_views:
            yield images, to_unit(list(others[0]), CPU), torch.from_numpy(np.stack(others[1]))
        else:
            yield (images,)


# --- Measuring -----------------------------------------------------------------------------------


def processor_seconds() -> float:
    """Of this process and those of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def rates(batches: Iterator[Any]) -> tuple[float, float]:
    """Images a second, and a second of processor time."""
    wall, processor, images = time.monotonic(), processor_seconds(), 0
    for batch in batches:
        images += len(batch[0])
    wall = time.monotonic() - wall
    return images / wall, images / (processor_seconds() - processor)


def middle(values: list[float]) -> str:
    """Median, least and most."""
    digits = 0 if min(values) >= 20 else 1
    low, median, high = (
        f"{v:,.{digits}f}" for v in (min(values), statistics.median(values), max(values))
    )
    return f"{median} ({low} to {high})"


def speed(source: ImageSource, folder: Path, repeats: int, workers: int) -> None:
    """The table of images a second."""
    makers: dict[str, Callable[[ImageSource, bool, int, int], Iterator[Any]]] = {
        "plain": plain_batches,
        "beit": our_batches,
    }
    print(f"\n{workers} workers; median (least to most) of {repeats} turns\n")
    columns = ["pictures", "bits a pixel", "pipeline", "plain, a core", "beit, a core", "gain"]
    print(f"| {' | '.join([*columns, 'plain, in all', 'beit, in all'])} |\n{'|---' * 8}|")
    for size, number, count in ((224, 512, 40), (500, 512, 20), (4000, 32, 3)):
        pictures, bits = write_pictures(source, size, number, folder / str(size))
        for two_views in (True, False):
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
            for turn in range(repeats + 1):  # the first warms the disk's cache
                for name, make in makers.items():
                    rate = rates(make(pictures, two_views, count if turn else 2, workers))
                    found[name] += [rate] if turn else []
            walls = {name: [wall for wall, _ in rows] for name, rows in found.items()}
            cores = {name: [core for _, core in rows] for name, rows in found.items()}
            pairs = zip(cores["beit"], cores["plain"], strict=True)
            gain = [ours / plain for ours, plain in pairs]
            row = [str(size), f"{bits:.1f}", "pre-training" if two_views else "fine-tuning"]
            row += [middle(cores["plain"]), middle(cores["beit"]), middle(gain)]
            row += [middle(walls["plain"]), middle(walls["beit"])]
            print(f"| {' | '.join(row)} |", flush=True)


LISTING = """
import sys, time
from pathlib import Path
import numpy, torch, beit.augment
begun = time.monotonic()
from beit.data import BadImages, Loader, open_source
source = open_source(sys.argv[1])
opened = time.monotonic()
loader = Loader(source, 64, 0, 2, BadImages(Path(sys.argv[1] + ".bad"), len(source), 0.0))
batches = loader.batches(range(10), beit.augment.CropAndFlip())
assert len(next(batches)) == 64
print(opened - begun, time.monotonic() - begun)
"""


def listing(source: ImageSource, folder: Path, repeats: int, number: int = 1_000_000) -> None:
    """Seconds to open a list and to its first batch, listed anew and from the kept index."""
    (folder / "few").mkdir()
    for place in range(1000):
        content = source.paths.content(place * len(source) // 1000)
        (folder / "few" / f"n{place:08d}.JPEG").write_bytes(content)
    lines = [f"few/n{i % 1000:08d}.JPEG,n{i % 1000:08d}\n" for i in range(number)]
    (folder / "list.csv").write_text("path,label\n" + "".join(lines))
    os.utime(folder / "list.csv", (1e9, 1e9))
    print(f"\n| a list of {number:,} | opened, s | first batch of 64, s |\n|---|---|---|")
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    times: dict[str, list[list[float]]] = {"listed anew": [], "from the kept index": []}
    for _ in range(repeats):
        subprocess.run(["rm", "-rf", str(folder / "cache")], check=True)
        for rows in times.values():
            command = [sys.executable, "-c", LISTING, str(folder / "list.csv")]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append([float(word) for word in done.stdout.split()])
    for name, rows in times.items():
        opened, first = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {opened:.2f} | {first:.2f} |")


def memory(source: ImageSource, workers: int, samples: int) -> None:
    """Resident memory of this process, its own pages alone, and of all together, on the way."""
    print(f"\n| samples of {samples:,} | this process, MiB | workers too, MiB |\n|---|---|---|")
    for number, _ in enumerate(our_batches(source, True, samples // BATCH, workers), 1):
        if number % (samples // BATCH // 10) == 0 or number == 100:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            own, *others = (proportional_mib(pid) for pid in ("self", *children))
            print(f"| {number * BATCH:,} | {own:.0f} | {own + sum(others):.0f} |", flush=True)


def proportional_mib(pid: str) -> float:
    """Resident memory, shared pages divided among those who share them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("Linux tells it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", required=True, help="photographs of 224 pixels or more")
    parser.add_argument("--parts", nargs="+", default=["speed", "listing", "memory"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--samples", type=int, default=200_000, help="of the part memory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(arguments.pictures)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}, Pillow {PIL.__version__}; {time.strftime('%Y-%m-%d')}"
    )
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in arguments.parts:
            speed(source, Path(folder), arguments.repeats, arguments.workers)
        if "listing" in arguments.parts:
            listing(source, Path(folder), arguments.repeats)
        if "memory" in arguments.parts:
            memory(source, arguments.workers, arguments.samples)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
