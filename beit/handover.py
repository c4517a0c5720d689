"""From one model's tensors to another's: what is taken, expanded, resized, new or left behind.

A pre-trained encoder becomes a classifier (recipe §2.6): the shared bias table is copied into every
block, tables and positions are resized to another image size, the final norm and the masked-image
head stay behind, `fc_norm` and the head begin anew. Nothing of this is silent: LoadReport says it all.

Shapes: (R, H) bias tables; pos_embed (1, 1 + L, D); patch kernel (D, 3, p, p).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from beit.image import resized_spec
from beit.layouts import TABLE, reason_to_ignore
from beit.model import Beit, BeitConfig, BeitForImageClassification, resize_positions
from beit.relative_position import resize_bias_table

HEAD = ("head.weight", "head.bias")
SHARED = f"rel_pos_bias.{TABLE}"

# What a classifier leaves behind, and why.
PRETRAINING_ONLY = {
    "mask_token": "only pre-training masks patches",
    "lm_head": "guesses visual tokens, which only pre-training asks for",
    "cls_pt_layers": "v2's extra blocks serve pre-training only",
    "norm": "a classifier has a norm of its own, after pooling",
    "fc_norm": "this model has no pooling",
    "head": "other classes were asked for, or none",
}


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor of the source, what is new, and what was taken for granted."""

    used: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)  # the shared table, now one a block
    matched: list[str] = field(default_factory=list)  # rows of the head, by the names of their classes
    new: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)  # name: why
    assumed: list[str] = field(default_factory=list)  # what the file does not say

    def __str__(self) -> str:
        text = [f"used {len(self.used)} tensors"]
        for name in ("resized", "expanded", "matched", "new"):
            if names := getattr(self, name):
                text.append(f"{name} {', '.join(_shorten(names))}")
        reasons = dict.fromkeys(self.ignored.values())
        for reason in reasons:
            names = _shorten([name for name, why in self.ignored.items() if why == reason])
            text.append(f"ignored {', '.join(names)} ({reason})")
        text += [f"assumed {item}" for item in self.assumed]
        return "; ".join(text)


def _shorten(names: list[str]) -> list[str]:
    """Names with their block's number, and weight beside bias, as one."""
    short = [re.sub(r"(blocks|layers?|cls_pt_layers)\.\d+\.", r"\1.*.", name) for name in names]
    return list(dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in short))


def hand_over(
    tensors: dict[str, Tensor], old: BeitConfig, model: Beit, keep_head: bool = True
) -> tuple[dict[str, Tensor], LoadReport, list[str]]:
    """What `model` takes of another's tensors: (tensors that fit it, the report, unknown names).

    tensors: under our names, of a model with config `old`; they are not changed. keep_head: whether a
    classifier's head comes along. A tensor whose shape is wrong for another reason than the sizes in
    the configs is passed on as it is, for the caller to refuse.
    """
    new, report = model.config, LoadReport()
    wanted = model.state_dict().keys()
    tensors, unknown = dict(tensors), []
    if SHARED in tensors and model.rel_pos_bias is None and new.rel_pos_bias == "per_block":
        shared = tensors.pop(SHARED)
        tensors |= {f"blocks.{i}.attn.{TABLE}": shared.clone() for i in range(new.depth)}
        report.expanded.append(SHARED)
    taken: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = name.split(".")[0]
        if name not in wanted or (part == "head" and not keep_head):
            reason = PRETRAINING_ONLY.get(part) or reason_to_ignore(name)
            if reason is None:
                unknown.append(name)
            else:
                report.ignored[name] = reason
            continue
        if name.endswith(TABLE) and old.grid != new.grid:
            tensor = resize_bias_table(tensor, old.grid, new.grid)
            report.resized.append(name)
        elif name == "pos_embed" and old.grid != new.grid:
            tensor = resize_positions(tensor.double(), old.grid, new.grid).to(tensor.dtype)
            report.resized.append(name)
        elif name == "patch_embed.proj.weight" and old.patch_size != new.patch_size:
            tensor = resize_patch_kernel(tensor, new.patch_size)
            report.resized.append(name)
        taken[name] = tensor
        report.used.append(name)
    report.new.extend(name for name in wanted if name not in taken)
    return taken, report, unknown


def resize_patch_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """A (D, C, p, p) patch kernel for patches of another size, (D, C, q, q).

    The one whose products with enlarged patches come nearest to the old one's with the patches
    themselves (pseudo-inverse resize; Beyer et al.: FlexiViT, arXiv 2212.08013). Exact when q > p.
    """
    old = kernel.shape[-1]
    if old == patch_size:
        return kernel
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    enlarged = F.interpolate(basis, size=(patch_size, patch_size), mode="bicubic", antialias=True)
    matrix = torch.linalg.pinv(enlarged.view(old * old, -1))  # (q*q, p*p)
    resized = kernel.double().flatten(2) @ matrix.T
    return resized.view(*kernel.shape[:2], patch_size, patch_size).to(kernel.dtype)


def to_classifier(
    source: Beit,
    classes: Sequence[str],
    img_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
) -> tuple[BeitForImageClassification, LoadReport]:
    """A classifier that begins with the encoder of `source`.

    A classifier's own head is kept by name: where it knows all of the classes, in whatever order and among
    whatever others, each keeps its row. Else the head begins anew.
    """
    if isinstance(classes, (int, str)):
        raise ValueError(
            f"classes {classes!r} are not their names, such as ['cat', 'dog']; for a number of them: "
            "beit.load(MODEL, num_classes=3)"
        )
    old = source.config
    size = old.img_size if img_size is None else img_size
    config = replace(old.for_classification(len(classes)), img_size=size, drop_path_rate=drop_path_rate)
    model = BeitForImageClassification(config)
    model.image_spec = resized_spec(source.image_spec, config.image_height_width)
    model.id2label = dict(enumerate(classes))
    tensors, rows = source.state_dict(), rows_of(source.id2label, classes)
    keep = rows is not None and "head.weight" in tensors
    changed = keep and rows != list(range(old.num_classes))
    if changed:
        tensors |= {name: tensors[name][rows] for name in HEAD}
    taken, report, unknown = hand_over(tensors, old, model, keep_head=keep)
    report.matched.extend(HEAD if changed else ())
    assert not unknown, f"a model of ours has tensors of no known name: {unknown}"
    model.load_state_dict(taken, strict=False)
    return model, report


def rows_of(id2label: Mapping[int, str], classes: Sequence[str]) -> list[int] | None:
    """Which of a head's rows are those of some classes; None if it lacks one, or has two of its name."""
    if id2label == dict(enumerate(classes)):
        return list(id2label)
    often, row = Counter(id2label.values()), {name: number for number, name in id2label.items()}
    return [row[name] for name in classes] if all(often[name] == 1 for name in classes) else None
