"""How each format names a BEiT's tensors, or a plain ViT's, and what these say about the model.

Our names are those of unilm and timm. transformers has two sets of its own: the names on disk, which
every version reads, and version 5's module names, which now and then get saved too. Both cut the fused
`qkv` matrix in three. docs/formats.md has the whole table.

Shapes: R bias table rows, H heads, D width; a table is (R, H) with R = (2h-1)(2w-1) + 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from beit.model import Beit, BeitConfig, BeitForMaskedImageModeling, RelPosBias
from beit.relative_position import CLASS_ROWS, Grid

TABLE = "relative_position_bias_table"

# Our name -> transformers' name on disk. {i} is a block.
ENCODER_NAMES = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "rel_pos_bias": "encoder.relative_position_bias",
    "blocks.{i}.norm1": "encoder.layer.{i}.layernorm_before",
    "blocks.{i}.norm2": "encoder.layer.{i}.layernorm_after",
    "blocks.{i}.gamma_1": "encoder.layer.{i}.lambda_1",
    "blocks.{i}.gamma_2": "encoder.layer.{i}.lambda_2",
    "blocks.{i}.attn.q_bias": "encoder.layer.{i}.attention.attention.query.bias",
    "blocks.{i}.attn.v_bias": "encoder.layer.{i}.attention.attention.value.bias",
    "blocks.{i}.attn.relative_position_bias_table": (
        "encoder.layer.{i}.attention.attention.relative_position_bias.relative_position_bias_table"
    ),
    "blocks.{i}.attn.proj": "encoder.layer.{i}.attention.output.dense",
    "blocks.{i}.mlp.fc1": "encoder.layer.{i}.intermediate.dense",
    "blocks.{i}.mlp.fc2": "encoder.layer.{i}.output.dense",
    "fc_norm": "pooler.layernorm",
}
HEAD_NAMES = {"head": "classifier", "lm_head": "lm_head", "cls_pt_layers": "cls_pt_layers"}
QKV = "encoder.layer.{i}.attention.attention."

# Version 5's module name -> the name on disk.
MODULE_NAMES = {
    "shared_position_bias": "encoder.relative_position_bias",
    "layers.{i}.relative_position_bias": (
        "encoder.layer.{i}.attention.attention.relative_position_bias"
    ),
    "layers.{i}.attention.q_proj": "encoder.layer.{i}.attention.attention.query",
    "layers.{i}.attention.k_proj": "encoder.layer.{i}.attention.attention.key",
    "layers.{i}.attention.v_proj": "encoder.layer.{i}.attention.attention.value",
    "layers.{i}.attention.o_proj": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.mlp.fc1": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.mlp.fc2": "encoder.layer.{i}.output.dense",
    "layers.{i}": "encoder.layer.{i}",
}

# What may stand beside an encoder and is of no use to it, and why.
IGNORED = (
    (r"(.*\.)?relative_position_index", "computed from the grid, never read"),
    (r"(.*\.)?(fpn\d?|decode_head|auxiliary_head)\..*", "a segmentation head"),
    # q.(k + b) = q.k + q.b: a ViT's key bias adds one number to all logits of a query, which no softmax
    # sees. So this loses nothing.
    (r".*\.(attn\.k_bias|attention\.key\.bias|k_proj\.bias)", "adds the same to all logits of a query"),
    (r"(vit\.)?pooler\.dense\..*", "transformers' layer behind a ViT's class token"),
)

# What makes a ViT another model than ours. The names are timm's, DINO's, OpenAI's and transformers'.
OTHER_VITS = (
    (r"(.*\.)?(reg_token|register_tokens|storage_tokens)", "register tokens"),
    (r"(.*\.)?(dist_token|distillation_token)", "a distillation token"),
    (r"(.*\.)?(norm_pre|ln_pre|pre_layrnorm)\..*", "a norm before its first block, as CLIP has it"),
    (r".*\.(q_norm|k_norm)\..*", "norms of queries and keys"),
    (r".*\.mlp\.(w\d+|weights_in|fc1_g)\..*", "a gated MLP (SwiGLU)"),
    (r"(.*\.)?(rope|rope_embed|rope_embeddings)\..*", "rotary positions"),
)
EXPORT = (
    "for train-tokenizer --teacher export it as a .pt2 that makes (B, L, T) of pictures (B, 3, H, W) "
    "in [0, 1], as docs/formats.md shows"
)


def rename(name: str, table: dict[str, str]) -> str | None:
    """Translate a parameter name by the table; None where no row fits."""
    number = re.search(r"(?:blocks|layers?)\.(\d+)\.", name)
    for ours, theirs in table.items():
        if number:
            ours, theirs = ours.replace("{i}", number[1]), theirs.replace("{i}", number[1])
        if name == ours or name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    return None


def to_transformers(model: Beit) -> dict[str, Tensor]:
    """The model's tensors under transformers' names on disk (the old ones, which all versions read)."""
    prefix = "" if type(model) is Beit else "beit."
    norm = "layernorm" if isinstance(model, BeitForMaskedImageModeling) else f"{prefix}layernorm"
    result: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        qkv = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.weight", name)
        if qkv:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[f"{prefix}{QKV.format(i=qkv[1])}{part}.weight"] = rows.contiguous()
        elif name.startswith("norm."):
            result[norm + name[4:]] = tensor.contiguous()
        elif head := rename(name, HEAD_NAMES):
            result[head] = tensor.contiguous()
        else:
            encoder = rename(name, ENCODER_NAMES)
            assert encoder is not None, f"parameter {name} has no transformers name"
            result[prefix + encoder] = tensor.contiguous()
    return result


def from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse, from either set of names; a name that no rule knows is kept, to be reported."""
    back = {theirs: ours for ours, theirs in {**ENCODER_NAMES, **HEAD_NAMES}.items()}
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("beit.").removeprefix("data2vec_vision.").removeprefix("vit.")
        name = rename(name, MODULE_NAMES) or name
        part = re.fullmatch(
            r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight", name
        )
        if part:
            parts.setdefault(part[1], {})[part[2]] = tensor
        elif name.startswith("layernorm."):
            second = full_name != name and name in tensors  # a norm before the masked model's own
            result[full_name if second else "norm" + name[len("layernorm") :]] = tensor
        else:
            result[rename(name, back) or full_name] = tensor
    for number, qkv in parts.items():
        if len(qkv) == 3:
            rows = [qkv["query"], qkv["key"], qkv["value"]]
            alike = len({(row.shape, row.dtype) for row in rows}) == 1
            # What cannot be one matrix is shown by its largest part, for the loader to report.
            fused = torch.cat(rows) if alike else max(rows, key=Tensor.numel)
            result[f"blocks.{number}.attn.qkv.weight"] = fused
    return result


def from_vit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain ViT's tensors, by timm's and DINO's names or by transformers', under ours.

    Raises ValueError for a ViT that computes something else.
    """
    what = what_no_beit_has(tensors)
    if not any(re.search(r"(^|\.)blocks\.\d+\.", name) for name in tensors):
        result = strip_prefix(from_transformers(tensors))
    else:
        result = {}
        for name, tensor in strip_prefix(tensors).items():
            name = name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
            if name.endswith(".attn.qkv.bias"):
                parts = zip("qkv", tensor.chunk(3), strict=True)
                result |= {name.replace("qkv.", f"{part}_"): bias.clone() for part, bias in parts}
            else:  # DINOv2's mask token is (1, D)
                result[name] = tensor.view(1, 1, -1) if name == "mask_token" else tensor
        positions = result.get("pos_embed")
        if (
            what is None
            and positions is not None
            and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]
        ):
            what = "no position for its class token"
    fc1, fc2 = (result.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if what is None and fc1 is not None and fc2 is not None and fc1.shape[0] != fc2.shape[-1]:
        what = "a gated MLP (SwiGLU)"
    for name, cause in (("cls_token", "no class token"), ("pos_embed", "no absolute positions")):
        if what is None and name not in result:
            what = cause
    if what is not None:
        raise ValueError(f"it is a ViT with {what}, which is not computed here; {EXPORT}")
    return result


def what_no_beit_has(names: Iterable[str]) -> str | None:
    """What shows a ViT to be more than a plain one; None where no name does."""
    names = list(names)
    rules = (what for pattern, what in OTHER_VITS if any(re.fullmatch(pattern, n) for n in names))
    return next(rules, None)


def strip_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off what wraps an encoder: `module.` (DDP), `backbone.` (segmentation), `model.` (timm)."""
    for name in tensors:
        if name.endswith("cls_token") and not name.endswith("embeddings.cls_token"):
            prefix = name[: -len("cls_token")]
            return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def layout_of(names: Iterable[str]) -> str:
    """Whose names these are: transformers, blocks (unilm and timm), dalle, vqkd, vit, or unknown."""
    names = list(names)
    rules = (
        ("vqkd", r"quantize\.embedding\.weight"),
        ("dalle", r"(encoder\.|decoder\.)?blocks\.(input|group_1\..*|output\.conv)\.[wb]"),
        ("vit", r".*\.(attn\.qkv|attention\.key|k_proj)\.bias"),  # a BEiT's keys have no bias
        ("blocks", r".*blocks\.\d+\.attn\.qkv\.weight"),
        ("transformers", r".*layers?\.\d+\.attention\.(attention\.query|q_proj)\.weight"),
    )
    for layout, pattern in rules:
        if any(re.fullmatch(pattern, name) for name in names):
            return layout
    return "unknown"


def reason_to_ignore(name: str) -> str | None:
    """Why a tensor beside the encoder is left out; None where nothing explains it."""
    return next((reason for pattern, reason in IGNORED if re.fullmatch(pattern, name)), None)


# --- what the tensors say -------------------------------------------------------------------------


def read_config(
    tensors: dict[str, Tensor],
    img_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    early_layer: int | None = None,
    known_size: tuple[int, int] | None = None,
) -> tuple[BeitConfig, list[str]]:
    """The config of a BEiT from its tensors under our names, and what had to be assumed.

    img_size: pixels, where the tensors leave it open (no table, no positions, or a rectangle).
    num_heads, early_layer: where the rule (64 wide, at most 16; 9 of 12, 21 of 24) is wrong. known_size:
    pixels, from a config beside the tensors; it is taken where the tensors allow it. Raises ValueError.
    """
    missing = {"cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} - tensors.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    assumed: list[str] = []
    width = tensors["cls_token"].shape[-1]
    kernel = tensors["patch_embed.proj.weight"]
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"patch_embed.proj.weight {tuple(kernel.shape)} has no square patches")
    patch = kernel.shape[-1]
    depth = count_blocks(tensors)

    shared = tensors.get(f"rel_pos_bias.{TABLE}")
    own = tensors.get(f"blocks.0.attn.{TABLE}")
    bias: RelPosBias = "none" if shared is None and own is None else "shared"
    if own is not None:
        bias = "per_block"
    table = own if own is not None else shared
    positions = tensors.get("pos_embed")
    if table is not None:
        if num_heads not in (None, table.shape[1]):
            raise ValueError(f"num_heads {num_heads} was asked for; its bias has {table.shape[1]} heads")
        num_heads = table.shape[1]
        grids = _rectangles(table.shape[0] - CLASS_ROWS)
        grid = _grid_of(grids, known_size, img_size, patch, "bias table")
    elif positions is not None:
        grid = _grid_of(_factors(positions.shape[1] - 1), known_size, img_size, patch, "pos_embed")
    elif known_size is not None:
        grid = known_size[0] // patch, known_size[1] // patch
    elif img_size is not None:
        height, across = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = height // patch, across // patch
    else:
        grid = 224 // patch, 224 // patch
        assumed.append(
            f"img_size {grid[0] * patch}: nothing in the file depends on it; img_size= sets it"
        )
    if num_heads is None:
        if width % 64:
            raise ValueError(
                f"it does not say its heads, and width {width} is no multiple of 64; num_heads="
            )
        num_heads = min(width // 64, 16)  # the huge, giant and gigantic ViTs have 80, 88, 104 wide ones
        assumed.append(f"num_heads {num_heads}: {width // num_heads} wide each; num_heads= sets it")

    extra = {n.split(".")[1] for n in tensors if n.startswith("cls_pt_layers.")}
    if not extra:
        if early_layer:
            raise ValueError(f"early_layer {early_layer} was asked for; it has no cls_pt_layers")
        early_layer = 0
    elif early_layer is None:
        early_layer = {12: 9, 24: 21}.get(depth, max(1, round(depth * 3 / 4)))
        assumed.append(f"early_layer {early_layer} of {depth}; early_layer= sets it")
    head, lm_head = tensors.get("head.weight"), tensors.get("lm_head.weight")
    config = BeitConfig(
        img_size=grid[0] * patch if grid[0] == grid[1] else (grid[0] * patch, grid[1] * patch),
        patch_size=patch,
        in_chans=kernel.shape[1],
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio_of(tensors["blocks.0.mlp.fc1.weight"].shape[0], width),
        init_values=(0.1 if depth < 24 else 1e-5) if "blocks.0.gamma_1" in tensors else 0.0,
        rel_pos_bias=bias,
        use_abs_pos_emb=positions is not None,
        use_mask_token="mask_token" in tensors,
        pooling="cls" if {"head.weight", "norm.weight"} <= tensors.keys() else "mean",
        num_classes=0 if head is None else head.shape[0],
        vocab_size=8192 if lm_head is None else lm_head.shape[0],
        early_layer=early_layer,
        head_layers=len(extra) or 2,
    )
    return config, assumed


def count_blocks(tensors: Iterable[str], name: str = "blocks") -> int:
    """How many blocks the names number, from 0 without a gap. Raises ValueError."""
    numbers = {n[len(name) + 1 :].split(".")[0] for n in tensors if n.startswith(f"{name}.")}
    missing = next(i for i in range(len(numbers) + 1) if str(i) not in numbers)
    if missing != len(numbers):
        last = max(numbers, key=lambda number: (len(number), number))
        raise ValueError(f"it has {name}.{last} and lacks {name}.{missing}")
    return missing


def mlp_ratio_of(hidden: int, width: int) -> float:
    """The ratio that makes just so many hidden units, though a quotient may round below it."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _rectangles(offsets: int) -> list[Grid]:
    """The grids with (2h-1)(2w-1) offsets, the square first."""
    return [((a + 1) // 2, (b + 1) // 2) for a, b in _factors(offsets) if a % 2 and b % 2]


def _factors(count: int) -> list[Grid]:
    """The pairs (a, b) with a * b = count, those nearest to a square first."""
    small = [a for a in range(math.isqrt(max(count, 0)), 0, -1) if count % a == 0]
    return list(dict.fromkeys(pair for a in small for pair in ((a, count // a), (count // a, a))))


def _grid_of(
    possible: list[Grid],
    known_size: tuple[int, int] | None,
    img_size: int | tuple[int, int] | None,
    patch: int,
    what: str,
) -> Grid:
    """The one grid that a table or the positions can mean: the one that is known, a square, or the
    rectangle that was asked for."""
    known, asked = (
        (size[0] // patch, size[1] // patch) if isinstance(size, (tuple, list)) else None
        for size in (known_size, img_size)
    )
    if known in possible:
        return known
    if possible and possible[0][0] == possible[0][1]:
        return possible[0]
    if asked in possible:
        return asked
    sizes = ", ".join(f"({h * patch}, {w * patch})" for h, w in possible[:6]) or "nothing"
    raise ValueError(
        f"its {what} is of no square; img_size=(height, width) of beit.load must say which of {sizes}"
    )
