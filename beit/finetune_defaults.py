"""What a fine-tuning does where nobody says: settings from the pictures.

With few pictures a linear head on frozen features is as good as anything; with more, training all has to
beat it. From the number of pictures, too, come batch and epochs; from their size the network that begins
from nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from beit.data import ImageSource
from beit.hub import is_size
from beit.image import BadImage
from beit.labelled import Labelled

RELEASED = "beit_base_patch16_224_pt22k"  # what is named to those who begin from nothing
FEW = 50  # pictures a class; with fewer, frozen features and a linear head
IMAGE_PASSES = 50_000  # pictures seen in all, where neither epochs nor steps are given
UNBALANCED = 3.0  # the largest class is so many times the smallest
# Given, they say that one wants to train, and how; so does a number of steps.
TRAINING = ("epochs", "batch_size", "lr", "layer_decay", "crop_scale")


def chosen(given: Mapping[str, Any], data: Labelled, depth: int | None = None) -> dict[str, Any]:
    """A value for each setting of `finetune` that is None in `given`; those that have no say stay out.

    depth: blocks of the trained model to begin with; None where it begins from nothing.
    """
    count, classes = len(data.train.source), len(data.classes)
    model = given["model"] or size_for(data.train.source)
    fresh = is_size(model)
    asked = bool(given["steps"]) or any(given[name] is not None for name in TRAINING)
    method = given["method"]
    if method is None:
        few = count < FEW * classes and not fresh
        method = "full" if asked or data.several or data.val is None else "head" if few else "best"
    if method != "full" and data.several:
        raise ValueError(f"--method {method} is for one label a picture; use --method full")
    if given["class_weights"] and data.several:
        raise ValueError("--class-weights is for one label a picture; leave it out")
    if method == "best" and data.val is None:
        raise ValueError("--method best compares on validation pictures; give --val, or a --val-share")
    found: dict[str, Any] = {
        "model": model,
        "method": method,
    }
    if method != "head":
        found |= {
            "batch_size": 64 if count >= 640 else max(8, 2 ** int(math.log2(max(count, 10) / 10))),
            "lr": 1e-3,
            "layer_decay": 1.0 if fresh else 0.75 if (depth or 0) >= 24 else 0.65,  # as published
            "crop_scale": (0.08, 1.0) if asked else (0.3, 1.0),
        }
        counts = data.counts
        if not asked and not data.several and counts.max() > UNBALANCED * max(1, counts.min()):
            found["class_weights"] = True
        if not given["steps"]:
            found["epochs"] = min(100, max(10, IMAGE_PASSES // count))
    return {name: value for name, value in found.items() if given[name] is None}


def size_for(source: ImageSource) -> str:
    """The network that begins from nothing, by the median short side of up to 50 pictures."""
    sides = []
    for index in np.linspace(0, len(source) - 1, min(50, len(source))).astype(int).tolist():
        with suppress(BadImage):
            sides.append(min(source.open(index).size))
    return "beit_mini_patch8_32" if sides and np.median(sides) < 48 else "beit_tiny_patch8_64"


def run_name(data: Path) -> str:
    """What a run on some data is called: flowers of flowers/, flowers.csv or shards/flowers-*.tar."""
    name = data.resolve().name
    for suffix in (".csv", ".tar", ".parquet", ".txt"):
        name = name.removesuffix(suffix)
    return re.split(r"[*?{[]", name)[0].rstrip("-_.") or "finetune"
