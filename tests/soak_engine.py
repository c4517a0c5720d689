"""Threads that call one engine without end: each answer must be right, and memory must not grow.

    python tests/soak_engine.py --seconds 60      (`make soak`)

The first quarter of the time warms up; growth is counted from there. Prints one line of JSON; exit code 1
if an answer was wrong, or if the process grew by more than GROWTH of what it had when warm. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from conftest import draw_shape
from PIL import Image

from beit.checkpoints import save
from beit.engine import Engine
from beit.model import BeitConfig, BeitForImageClassification

MODEL = BeitConfig(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4, num_classes=10)
PICTURES = 24
TOLERANCE = 1e-5
GROWTH = 0.05  # of the warm process: what allocators of many threads still take; a leak takes more


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--runtime", default="torch", choices=["torch", "openvino", "onnx"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), given.seconds, given.threads, given.runtime)
    print(json.dumps(result))
    return 1 if result["wrong"] or result["grown_share"] > GROWTH else 0


def soak(folder: Path, seconds: float, threads: int, runtime: str) -> dict[str, float]:
    """Right and wrong answers of so many threads, and how much the process grew, in MiB."""
    torch.manual_seed(0)
    model = BeitForImageClassification(MODEL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save(model, folder / "model")
    files = draw(folder)
    engine = Engine(folder / "model", runtime, "fp32", batch_size=4)  # type: ignore[arg-type]
    scores = [dict(next(engine.classify(file, top=10)).top) for file in files]
    vectors = [next(engine.embed(file)).vector for file in files]
    counts: Counter[str] = Counter()
    counting = threading.Lock()
    end = time.monotonic() + seconds

    def right(number: int) -> bool:
        """Ask of a picture, and of one that is none in the same batch."""
        place = number % len(files)
        asked = [files[place], folder / "none.jpg", files[place]]
        if number % 2:
            one, none, other = engine.classify(asked, top=10)
            same = all(
                abs(score - scores[place][name]) < TOLERANCE
                for a in (one, other)
                for name, score in a.top
            )
        else:
            one, none, other = engine.embed(asked)  # type: ignore[assignment]
            same = all(np.allclose(a.vector, vectors[place], atol=1e-4) for a in (one, other))  # type: ignore[attr-defined]
        return same and none.error == "no such file"

    def ask(thread: int) -> None:
        rng = np.random.default_rng(thread)
        while time.monotonic() < end:
            try:
                word = "right" if right(int(rng.integers(1 << 30))) else "wrong"
            except Exception as error:
                word = f"wrong: {type(error).__name__}"
            with counting:
                counts[word] += 1

    crew = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for thread in crew:
        thread.start()
    time.sleep(seconds / 4)
    warm = resident_mib()
    for thread in crew:
        thread.join()
    gc.collect()
    wrong = sum(count for word, count in counts.items() if word != "right")
    grown = resident_mib() - warm
    rest = {"seconds": seconds, "warm_mib": round(warm), "grown_mib": round(grown, 1)}
    rest["grown_share"] = round(grown / warm, 4)
    return {"threads": threads, "right": counts["right"], "wrong": wrong, **rest}


def draw(folder: Path) -> list[Path]:
    """Shapes of different sizes."""
    files = []
    for number in range(PICTURES):
        shape = ("disc", "square", "triangle")[number % 3]
        picture: Image.Image = draw_shape(shape, 36, np.random.default_rng(number))
        files.append(folder / f"{number}.png")
        picture.resize((40 + 7 * number, 60)).save(files[-1])
    return files


if __name__ == "__main__":
    sys.exit(main())
