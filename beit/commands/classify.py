"""`beit classify`: name what is on pictures."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from beit.data import list_pictures, open_source
from beit.engine import Engine, Prediction
from beit.precision import Precision
from beit.run import CannotWrite


@Parameter(name="*")
@dataclass(frozen=True)
class Classify:
    images: Annotated[list[Path], Parameter(consume_multiple=True)]
    """Pictures, folders of them, or a .txt or .csv that lists them."""
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """Model folder or file, hub:owner/name, or a name that `beit models` lists."""
    top: PositiveInt = 5
    """Classes to name for each picture."""
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    """Write to this .csv or .jsonl instead."""
    json: bool = False
    """Print one JSON object a picture."""
    batch_size: PositiveInt = 16
    precision: Precision = "auto"
    device: str = "auto"


class SomeSkipped(Exception):
    """Done, but some pictures could not be read; they are named in the output."""

    exit_code = 3


def classify(settings: Classify) -> None:
    """Classify pictures."""
    if settings.out is not None and settings.out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--out {settings.out} must end in .csv or .jsonl")
    if settings.out is not None and not settings.out.parent.is_dir():
        raise CannotWrite(f"cannot write {settings.out}: {settings.out.parent} is not a folder")
    pictures = list(find_pictures(settings.images))
    engine = Engine(
        settings.model,
        precision=settings.precision,
        device=settings.device,
        batch_size=settings.batch_size,
    )
    predictions = engine.classify(pictures, settings.top)
    if settings.out is not None:
        with settings.out.open("w", newline="") as stream:
            write = write_csv if settings.out.suffix == ".csv" else write_jsonl
            failed = write(predictions, stream)
        print(f"{len(pictures)} pictures classified into {settings.out}", file=sys.stderr)
    elif settings.json:
        failed = write_jsonl(predictions, sys.stdout)
    else:
        failed = write_words(predictions, sys.stdout)
    if failed:
        raise SomeSkipped(f"{failed} of {len(pictures)} pictures could not be read")


def find_pictures(places: list[Path]) -> Iterator[Path]:
    """The pictures named, in order; folders and lists opened."""
    for place in places:
        if place.is_dir():
            below = list_pictures(place)
            if not below:
                raise ValueError(f"{place} holds no pictures")
            yield from below
        elif place.suffix in (".txt", ".csv"):
            yield from open_source(place).paths
        elif place.exists():
            yield place
        else:
            raise ValueError(f"{place} does not exist")


def write_words(predictions: Iterable[Prediction], stream: TextIO) -> int:
    """A line a picture, for people; returns how many could not be read."""
    failed = 0
    for prediction in predictions:
        failed += prediction.error is not None
        ranked = "  ".join(f"{name} {score:.1%}" for name, score in prediction.top)
        print(f"{prediction.path}  {prediction.error or ranked}", file=stream, flush=True)
    return failed


def write_jsonl(predictions: Iterable[Prediction], stream: TextIO) -> int:
    """One JSON object a picture."""
    failed = 0
    for prediction in predictions:
        failed += prediction.error is not None
        answer = prediction.to_dict()
        del answer["ms"]  # the same pictures give the same lines
        print(json.dumps(answer, ensure_ascii=False), file=stream, flush=True)
    return failed


def write_csv(predictions: Iterable[Prediction], stream: TextIO) -> int:
    """path, label, score, error; in the order of the pictures."""
    failed = 0
    writer = csv.writer(stream)
    writer.writerow(["path", "label", "score", "error"])
    for prediction in predictions:
        failed += prediction.error is not None
        row: list[Any] = [prediction.path, prediction.label, prediction.score, prediction.error]
        writer.writerow(row)
    return failed
