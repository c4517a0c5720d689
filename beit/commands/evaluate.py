"""`beit evaluate`: how often a classifier is right, class by class."""

from __future__ import annotations

import json
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from rich.console import Console
from rich.table import Table

from beit.data import open_source
from beit.engine import Engine
from beit.metrics import confusion_matrix, top_k_accuracy
from beit.precision import Precision


@Parameter(name="*")
@dataclass(frozen=True)
class Evaluate:
    data: Path
    """Folder with one sub-folder a class, or with val/ of such; or a .csv of path,label."""
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """Model folder or file, hub:owner/name, or a name that `beit models` lists."""
    split: str = "val"
    """Folder of DATA to score, where it has train/ and others."""
    batch_size: PositiveInt = 64
    precision: Precision = "fp32"
    device: str = "auto"
    json: bool = False
    """Print one JSON line instead of a table."""


def evaluate(settings: Evaluate) -> dict[str, Any]:
    """Score a classifier on labelled pictures."""
    engine = Engine(settings.model, settings.device, settings.precision, settings.batch_size)
    source = open_source(settings.data, settings.split, labelled=True).with_classes(engine.labels)
    logits = engine.logits_of(source)
    labels = np.array(source.labels)
    confusion = confusion_matrix(logits.argmax(axis=1), labels, len(engine.labels))
    result: dict[str, Any] = {
        "top1": top_k_accuracy(logits, labels, 1),
        "top5": top_k_accuracy(logits, labels, 5),
        "pictures": len(source),
        "preprocessing": f"short side / {engine.model.image_spec.crop_ratio}, centre crop",
        "per_class": {
            name: confusion[i, i] / confusion[i].sum()
            for i, name in enumerate(engine.labels)
            if confusion[i].sum()
        },
    }
    if settings.json:
        print(json.dumps(result))
        return result
    table = Table(title=f"{settings.model} on {settings.data}")
    for column in ("class", "pictures", "right", "most often taken for"):
        table.add_column(
            column, justify="left" if column in ("class", "most often taken for") else "right"
        )
    for i, name in enumerate(engine.labels):
        count = int(confusion[i].sum())
        if count:
            others = confusion[i].copy()
            others[i] = 0
            worst = int(others.argmax())
            wrong = f"{engine.labels[worst]} ({others[worst]})" if others[worst] else ""
            table.add_row(name, str(count), f"{confusion[i, i] / count:.1%}", wrong)
    console = Console()
    console.print(table)
    console.print(f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} of {len(source)} pictures")
    return result
