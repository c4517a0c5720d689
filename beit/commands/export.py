"""`beit export`: a model as a graph file for OpenVINO, ONNX Runtime or torch.export."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter
from cyclopts.types import PositiveInt

from beit.atomic import check_place
from beit.checkpoints import load_model
from beit.data import open_source
from beit.export import Target, parts_of
from beit.export import export as write_graph
from beit.graphs import SUFFIX_OF, EmbedPooling, Kind, Output
from beit.hub import model_files, resolve, sha256_of
from beit.image import BadImage, ImageSpec, preprocess
from beit.plural import counted
from beit.ranges import Share


@Parameter(name="*")
@dataclass(frozen=True)
class Export:
    model: str
    """Model folder or file, hub:owner/name, or a name that `beit models` lists."""
    _: KW_ONLY
    to: Target
    """What is to run it."""
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    """An .xml for openvino, with a .bin beside, an .onnx or a .pt2; named like the model if not given."""
    kind: Kind = "classification"
    """What it computes: classes, features, or the tokens of hidden patches."""
    pooling: EmbedPooling = "mean"
    """Of features: mean of the patches, class token, or all tokens."""
    layer: int | None = None
    """Block whose states are the features; the end, through the last norm, if not given."""
    img_size: PositiveInt | None = None
    """Pixels, if not the model's own; the bias is resized."""
    max_size: PositiveInt | None = None
    """Take pictures of any size, rectangles too, up to so many pixels a side; slower for the usual one."""
    precision: Literal["fp32", "int8"] = "fp32"
    pictures: Path | None = None
    """For int8: a folder, list or shards of the kind of pictures it will see."""
    count: PositiveInt = 256
    """Of these pictures, spread over the whole: half to calibrate on, half to measure."""
    min_agreement: Share = 0.99
    """Refuse int8 that names the model's class less often than this."""
    anyway: bool = False
    """Write it all the same."""
    json: bool = False
    """Print the report as one JSON line."""


def export(settings: Export) -> dict[str, Any]:
    """Write a graph file if it agrees with the model."""
    small = "-int8" if settings.precision == "int8" else ""
    name = Path(settings.model).name
    known = (".run", ".pth", ".pt", ".pkl", ".bin", ".safetensors")
    name = next((name.removesuffix(end) for end in known if name.endswith(end)), name)
    out = settings.out or Path(f"{name}{small}{SUFFIX_OF[settings.to]}")
    for file in (*parts_of(out), *([out.with_suffix(".json")] if small else [])):
        check_place(file, model_files(settings.model))
    if settings.precision == "int8" and settings.pictures is None:
        raise ValueError("int8 is calibrated on pictures of the kind it will see: --pictures PLACE")
    model = load_model(settings.model, img_size=settings.img_size)
    prepared: list[np.ndarray] = []
    if settings.pictures is not None:
        prepared = some_pictures(settings.pictures, settings.count, model.image_spec)
    report = write_graph(
        model,
        out,
        settings.to,
        Output(settings.kind, settings.pooling, settings.layer),
        precision=settings.precision,
        pictures=prepared,
        min_agreement=settings.min_agreement,
        anyway=settings.anyway,
        model_sha256=sha256_of(resolve(settings.model)),
        max_size=settings.max_size,
    )
    if settings.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(f"{out}: {', '.join(lines(report))}")
    return report


def some_pictures(place: Path, count: int, spec: ImageSpec) -> list[np.ndarray]:
    """Prepared pictures, evenly from the whole of a place; unreadable ones are left out, and counted."""
    source = open_source(place)
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    # Folders and shards are often sorted by class: both halves are to see all of them.
    chosen = np.concatenate([chosen[::2], chosen[1::2]])
    found = []
    for index in chosen:
        with suppress(BadImage):
            found.append(preprocess(source.read(int(index)), spec))
    if len(found) < len(chosen):
        print(f"{counted(len(chosen) - len(found), 'picture')} could not be read", file=sys.stderr)
    return found


def lines(report: dict[str, Any]) -> list[str]:
    """The report in words."""
    told = [f"{report['bytes'] / 1e6:,.1f} MB", f"fp32 differs by {report['max_error']:.1e}"]
    if report["precision"] == "int8":
        ms = ", ".join(f"{name} {each:.1f} ms" for name, each in report["ms_batch_1"].items())
        told += [
            f"int8: {report['agreement_is']} {report['agreement']:.2%} of {report['measured_on']} pictures",
            f"mean error {report['mean_abs_error']:.3g} of a deviation of {report['output_std']:.3g}",
            f"{report['quantised_layers']} layers in int8, {len(report['kept_in_higher_precision'])} not",
            f"a picture takes {ms}",
        ]
    return told
