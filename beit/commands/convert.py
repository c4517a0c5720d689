"""`beit convert`: a model of any known format in, one that transformers, timm or unilm reads out."""

from __future__ import annotations

import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from torch import Tensor

from beit.atomic import CannotWrite
from beit.checkpoints import Format, load_model, save
from beit.hub import resolve, sha256_of
from beit.model import Beit
from beit.tokenizer_files import is_tokenizer, load_tokenizer, save_tokenizer
from beit.weight_files import CheckpointError

TOLERANCE = 1e-5  # of the probe picture's outputs, relative to the largest


@Parameter(name="*")
@dataclass(frozen=True)
class Convert:
    source: str
    """Folder, file, hub:owner/name or a name of `beit models`; a tokenizer's file too."""
    out: Annotated[Path, Parameter(alias="-o")]
    """Folder to write; a .pth file with --to unilm."""
    _: KW_ONLY
    to: Format = "transformers"
    """Whose library is to read it; transformers is our own format too."""
    img_size: PositiveInt | None = None
    """Pixels; another than the source's resizes its bias tables and positions."""
    num_classes: NonNegativeInt | None = None
    """Begin a new head of this many classes; 0 leaves the head off."""
    num_heads: PositiveInt | None = None
    """Attention heads, where the file does not say and they are not 64 wide."""
    early_layer: PositiveInt | None = None
    """BEiT v2's split, where it is not 9 of 12 or 21 of 24."""
    fp32: bool = False
    """Store float32 whatever the source holds."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    overwrite: bool = False
    """Replace a model that is there."""


def convert(settings: Convert) -> None:
    """Convert a model or tokenizer between the formats of transformers, timm and unilm."""
    source = resolve(settings.source, settings.revision)
    _check_place(settings)
    provenance = {
        "made_by": "beit convert",
        "source": settings.source,
        "source_sha256": sha256_of(source),
        "revision": settings.revision,
    }
    provenance = {key: value for key, value in provenance.items() if value is not None}
    if is_tokenizer(source):
        _convert_tokenizer(source, settings, provenance)
        return
    model = load_model(
        source,
        img_size=settings.img_size,
        num_classes=settings.num_classes,
        num_heads=settings.num_heads,
        early_layer=settings.early_layer,
        dtype=torch.float32 if settings.fp32 else None,
    )
    print(f"{settings.source}: {model.load_report}", file=sys.stderr)
    c = model.config
    if settings.to == "unilm" and c.pooling == "cls" and type(model) is not Beit and not c.num_classes:
        raise ValueError(
            "unilm's file cannot say that features are those of the class token; keep the head, or write "
            "another format"
        )
    save(model, settings.out, {**model.provenance, **provenance}, settings.to)
    for loss in not_kept(model, settings.to):
        print(f"{settings.out}: not kept: {loss}", file=sys.stderr)
    difference = parity(model, settings)
    print(
        f"{settings.out}: written for {settings.to}; a picture read back through it differs by "
        f"{difference:.1e}",
        file=sys.stderr,
    )


def _convert_tokenizer(source: Path, settings: Convert, provenance: dict[str, Any]) -> None:
    if settings.to != "transformers":
        raise ValueError(f"a tokenizer has no {settings.to} format; leave --to out")
    for name in ("img_size", "num_classes", "early_layer"):
        if getattr(settings, name) is not None:
            raise ValueError(f"a tokenizer has no {name}; leave --{name.replace('_', '-')} out")
    tokenizer = load_tokenizer(source, settings.num_heads)
    save_tokenizer(tokenizer, settings.out, provenance)
    again = load_tokenizer(settings.out)
    picture = torch.rand(1, 3, *tokenizer.view_size, generator=torch.Generator().manual_seed(0))
    if not torch.equal(tokenizer.encode(picture), again.encode(picture)):
        raise CheckpointError(f"{settings.out} gives other tokens than {settings.source}")
    print(f"{settings.out}: {type(tokenizer).__name__}, the same tokens", file=sys.stderr)


def _check_place(settings: Convert) -> None:
    """Refuse to write over something, before any work is done."""
    out = settings.out
    if settings.to == "unilm" and out.suffix not in (".pth", ".pt"):
        raise ValueError(f"unilm's format is one file: name it .pth, not {out.name}")
    if settings.to != "unilm" and out.suffix in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{settings.to}'s format is a folder, and {out.name} looks like a file")
    if out.exists() and out.is_dir() == (settings.to == "unilm"):
        what, wanted = ("folder", "file") if out.is_dir() else ("file", "folder")
        raise CannotWrite(
            f"{out} is a {what}, and {settings.to}'s format is a {wanted}; name another place"
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.is_dir() and not all((out / name).is_file() for name in ("config.json", "model.safetensors")):
        raise CannotWrite(f"{out} is not empty and holds no model; choose another place")
    if not settings.overwrite:
        raise CannotWrite(f"{out} is there already; --overwrite replaces it, or choose another place")


def not_kept(model: Beit, to: Format) -> list[str]:
    """What a format has no place for, or its library reads otherwise."""
    c = model.config
    height, width = c.grid
    losses = []
    if to != "transformers" and c.layer_norm_eps != 1e-6:
        losses.append(f"layer_norm_eps {c.layer_norm_eps:g}, {to} always has 1e-06")
    if to == "timm" and c.use_mask_token:
        losses.append("mask_token, timm cannot mask")
    if to == "unilm":
        names = "the class names and " if model.id2label else ""
        losses.append(f"{names}how pictures are prepared, unilm's file holds tensors only")
        if c.several_labels:
            losses.append("that a picture may have several labels")
        if height != width:
            losses.append(
                "which side of the rectangle is which: beit.load(file, img_size=(height, width))"
            )
    if to == "transformers" and c.early_layer:
        losses.append("in transformers: v2's extra blocks, it leaves them out; beit reads them")
    if to == "transformers" and height != width and (c.use_abs_pos_emb or c.rel_pos_bias != "none"):
        losses.append("in transformers: a rectangle's positions, it exchanges the sides; beit does not")
    spec = model.image_spec
    if to == "transformers" and spec.resize == "short_side" and spec.size[0] != spec.size[1]:
        losses.append(
            "in transformers: how the rectangle is cut, it fills up with black; beit covers it"
        )
    return losses


def parity(model: Beit, settings: Convert) -> float:
    """The largest difference of a probe picture's outputs through the written file, relative to the
    largest output. Raises CheckpointError where it is more than rounding."""
    c = model.config
    again = load_model(
        settings.out, num_heads=c.num_heads, early_layer=c.early_layer or None, img_size=c.img_size
    )
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, c.in_chans, *c.image_height_width, generator=generator)
    with torch.no_grad():
        # The layer norms' epsilon and the preparation are not in every format; the weights are judged.
        expected, got = model.float()(picture), _with_eps(again.float(), c.layer_norm_eps)(picture)
    difference = (
        _largest(expected - got) / max(_largest(expected), 1e-12) if expected.shape == got.shape else 1.0
    )
    theirs = again.state_dict()
    changed = [k for k, t in model.state_dict().items() if k in theirs and not torch.equal(t, theirs[k])]
    if changed or expected.shape != got.shape or not difference <= TOLERANCE:
        raise CheckpointError(
            f"{settings.out} was written but answers otherwise than {settings.source}: a probe picture's "
            f"outputs differ by {difference:.1e} of their size. Do not use it, and please report this"
        )
    return difference


def _with_eps(model: Beit, eps: float) -> Beit:
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    return model


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
