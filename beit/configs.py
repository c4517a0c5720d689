"""What the JSON files of each format say of a model: its sizes, its classes, how its pictures are prepared.

transformers keeps them in `config.json` and `preprocessor_config.json`, timm in one `config.json`. What
neither has a field for stands under one key, `beit`, of transformers' file. Values are checked, and no
name in a file is looked up as a class.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from beit.image import HALF, ImageSpec
from beit.layouts import mlp_ratio_of
from beit.model import Beit, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

FORMAT = 1  # of what stands under the `beit` key

MODEL_CLASSES: dict[str, type[Beit]] = {
    "BeitModel": Beit,
    "BeitForMaskedImageModeling": BeitForMaskedImageModeling,
    "BeitForImageClassification": BeitForImageClassification,
}


def describe_model(model: Beit, provenance: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json."""
    c = model.config
    size = c.img_size if isinstance(c.img_size, int) else list(c.img_size)
    name = next(name for name, cls in MODEL_CLASSES.items() if cls is type(model))
    masked = isinstance(model, BeitForMaskedImageModeling)
    pools_the_mean = masked or (c.pooling == "mean" and type(model) is not Beit)
    content: dict[str, Any] = {
        "architectures": [name],
        "model_type": "beit",
        "image_size": size,
        "patch_size": c.patch_size,
        "num_channels": c.in_chans,
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "intermediate_size": int(c.embed_dim * c.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": c.layer_norm_eps,
        "layer_scale_init_value": c.init_values,
        "drop_path_rate": c.drop_path_rate,
        "use_mask_token": c.use_mask_token,
        "use_absolute_position_embeddings": c.use_abs_pos_emb,
        "use_relative_position_bias": c.rel_pos_bias == "per_block",
        "use_shared_relative_position_bias": c.rel_pos_bias == "shared",
        # A bare encoder ends in a norm over all tokens, which is transformers' other pooling; its masked
        # model has a norm of its own, and a second one unless its encoder believes that it pools.
        "use_mean_pooling": pools_the_mean,
        "vocab_size": c.vocab_size,
        "dtype": str(model.cls_token.dtype).removeprefix("torch."),
        "beit": {
            "format": FORMAT,
            "pooling": c.pooling,
            "early_layer": c.early_layer,
            "head_layers": c.head_layers,
            "image_spec": dataclasses.asdict(model.image_spec),
            "provenance": provenance,
        },
    }
    if isinstance(model, BeitForImageClassification):
        names = [model.id2label.get(i, str(i)) for i in range(c.num_classes)]
        content["id2label"] = {str(i): name for i, name in enumerate(names)}
        content["label2id"] = {name: i for i, name in enumerate(names)}
        if c.several_labels:
            content["problem_type"] = SEVERAL_LABELS
    return content


SEVERAL_LABELS = "multi_label_classification"  # transformers' problem_type
WHOLE = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
PLAIN_VIT = {  # what a ViT's config.json does not say in a BEiT's words
    "use_absolute_position_embeddings": True,
    "layer_scale_init_value": 0.0,
    "use_mean_pooling": False,
}
DEFAULT_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves these two out of the file


def read_transformers_config(content: dict[str, Any]) -> BeitConfig:
    """A BeitConfig from the content of config.json; ours, or transformers' for a BEiT or a ViT."""
    if content.get("model_type") == "vit":
        content = {**content, **PLAIN_VIT}
    ours = content.get("beit", {})
    size = content["image_size"]
    for name in WHOLE:
        if type(content[name]) is not int or content[name] < 1:
            raise ValueError(f"{name} {content[name]!r} is not a whole number above 0")
    eps, drop_path_rate = content.get("layer_norm_eps", 1e-12), content.get("drop_path_rate", 0.0)
    if not 0 <= eps < 1 or not 0 <= drop_path_rate < 1:
        raise ValueError(
            f"layer_norm_eps {eps!r} and drop_path_rate {drop_path_rate!r} must be in [0, 1)"
        )
    if content.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {content['hidden_act']!r} is not gelu")
    if content.get("use_shared_relative_position_bias"):
        bias = "shared"
    else:
        bias = "per_block" if content.get("use_relative_position_bias") else "none"
    return BeitConfig(
        img_size=size if isinstance(size, int) else (size[0], size[1]),
        patch_size=content["patch_size"],
        in_chans=content.get("num_channels", 3),
        embed_dim=content["hidden_size"],
        depth=content["num_hidden_layers"],
        num_heads=content["num_attention_heads"],
        mlp_ratio=mlp_ratio_of(content["intermediate_size"], content["hidden_size"]),
        init_values=content.get("layer_scale_init_value") or 0.0,
        rel_pos_bias=bias,  # type: ignore[arg-type]
        use_abs_pos_emb=content.get("use_absolute_position_embeddings", False),
        use_mask_token=content.get("use_mask_token", False),
        pooling=ours.get("pooling", "mean" if content.get("use_mean_pooling", True) else "cls"),
        layer_norm_eps=eps,
        drop_path_rate=drop_path_rate,
        num_classes=len(content.get("id2label", {})),
        several_labels=content.get("problem_type") == SEVERAL_LABELS,
        vocab_size=content.get("vocab_size", 8192),
        early_layer=ours.get("early_layer", 0),
        head_layers=ours.get("head_layers", 2),
    )


def read_labels(content: dict[str, Any], assumed: list[str]) -> dict[int, str]:
    """id2label, its keys 0 to n - 1; with gaps (the 22k folders') renumbered in the order of the keys."""
    given = {int(key): str(name) for key, name in content.get("id2label", {}).items()}
    labels = dict(enumerate(given[key] for key in sorted(given)))
    if labels.keys() != given.keys():
        assumed.append(
            f"id2label has gaps up to {max(given)}; its {len(given)} names are renumbered by key"
        )
    return labels


def describe_processor(spec: ImageSpec) -> dict[str, Any]:
    """The content of preprocessor_config.json: the same preparation in transformers' words."""
    height, width = spec.size
    crop = spec.resize == "short_side"
    short_side = {"shortest_edge": math.floor(min(height, width) / spec.crop_ratio)}
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": short_side if crop else {"height": height, "width": width},
        "resample": {"bilinear": 2, "bicubic": 3, "lanczos": 1}[spec.filter],
        "do_center_crop": crop,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "do_reduce_labels": False,
    }


def read_image_spec(content: dict[str, Any]) -> ImageSpec:
    """An ImageSpec from what `dataclasses.asdict` made of it, by way of JSON. Raises ValueError."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return _checked(ImageSpec(**values))


def _checked(spec: ImageSpec) -> ImageSpec:
    """A spec whose numbers come from a file: what no picture can be prepared by is refused here."""
    if not all(type(pixels) is int for pixels in spec.size):
        raise ValueError(f"size {spec.size} is not (height, width) in pixels")
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"image {name} {values} is not three numbers")
    if min(spec.std) <= 0:
        raise ValueError(f"image std {spec.std} must be above 0")
    return spec


def read_processor(content: dict[str, Any]) -> ImageSpec:
    """An ImageSpec from a preprocessor_config.json, old or new. Raises ValueError for what has no equal."""
    size, crop = content.get("size", 224), content.get("crop_size", 224)
    side = {"height": size, "width": size} if isinstance(size, int) else size
    cut = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    filters, number = {1: "lanczos", 2: "bilinear", 3: "bicubic"}, content.get("resample", 3)
    if number not in filters:
        raise ValueError(f"it resizes by Pillow's filter {number!r}; known are {filters}")
    if content.get("do_resize") is False or content.get("do_rescale") is False:
        raise ValueError("it does not resize, or does not rescale to [0, 1]")
    if abs(content.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"it rescales by {content['rescale_factor']}, not by 1/255")
    plain = content.get("do_normalize") is False
    common: dict[str, Any] = {
        "filter": filters[number],
        "mean": (0.0, 0.0, 0.0) if plain else tuple(content.get("image_mean", HALF)),
        "std": (1.0, 1.0, 1.0) if plain else tuple(content.get("image_std", HALF)),
    }
    if "shortest_edge" not in side:
        if content.get("do_center_crop") and side != cut:
            raise ValueError(f"it squashes to {side} and then cuts {cut}")
        return _checked(ImageSpec((side["height"], side["width"]), "squash", crop_ratio=1.0, **common))
    if not content.get("do_center_crop"):
        raise ValueError("it resizes the short side and does not crop, which gives no fixed size")
    ratio = _crop_ratio(min(cut.values()), side["shortest_edge"])
    return _checked(ImageSpec((cut["height"], cut["width"]), "short_side", crop_ratio=ratio, **common))


def _crop_ratio(size: int, short_side: int) -> float:
    """The crop ratio, round where one is, that resizes the short side to just this."""
    for ratio in (0.875, 0.9, 0.95, 1.0, size / short_side):
        if math.floor(size / ratio) == short_side:
            return ratio
    return size / (short_side + 0.5)  # the quotient's last digit fell on the wrong side


# --- timm's config.json ---------------------------------------------------------------------------


def describe_timm(model: Beit) -> dict[str, Any]:
    """The content of timm's config.json. Raises ValueError for what timm has no class for."""
    c, spec = model.config, model.image_spec
    if isinstance(model, BeitForMaskedImageModeling):
        raise ValueError("timm has no masked-image head; give num_classes=0 to take the encoder alone")
    if spec.resize == "squash" and spec.size[0] != spec.size[1]:
        raise ValueError(f"timm cannot say that pictures are squashed to {spec.size}")
    height, width = c.image_height_width
    pool = "avg" if c.pooling == "mean" else "token"
    if type(model) is Beit:
        pool = ""  # all tokens, normed
    arguments = {
        "img_size": [height, width],
        "patch_size": c.patch_size,
        "in_chans": c.in_chans,
        "embed_dim": c.embed_dim,
        "depth": c.depth,
        "num_heads": c.num_heads,
        "mlp_ratio": c.mlp_ratio,
        "init_values": c.init_values or None,
        "use_abs_pos_emb": c.use_abs_pos_emb,
        "use_rel_pos_bias": c.rel_pos_bias == "per_block",
        "use_shared_rel_pos_bias": c.rel_pos_bias == "shared",
        "num_classes": c.num_classes if pool else 0,
        "global_pool": pool,
    }
    content: dict[str, Any] = {
        "architecture": "beit_large_patch16_224" if c.depth >= 24 else "beit_base_patch16_224",
        "num_classes": arguments["num_classes"],
        "num_features": c.embed_dim,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [c.in_chans, height, width],
            "fixed_input_size": True,
            "interpolation": spec.filter,
            "crop_pct": spec.crop_ratio,
            "crop_mode": "squash" if spec.resize == "squash" else "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": arguments["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if model.id2label:
        content["label_names"] = [model.id2label.get(i, str(i)) for i in range(c.num_classes)]
    if c.several_labels:
        content["problem_type"] = SEVERAL_LABELS
    return content


def read_timm_spec(pretrained: dict[str, Any], size: tuple[int, int]) -> ImageSpec:
    """timm's evaluation transform: its pretrained_cfg as an ImageSpec. Raises ValueError."""
    mode = pretrained.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ValueError(f"crop_mode {mode!r} is not center or squash")
    return _checked(
        ImageSpec(
            size,
            "squash" if mode == "squash" else "short_side",
            pretrained.get("interpolation", "bicubic"),
            1.0 if mode == "squash" else float(pretrained.get("crop_pct") or 0.875),
            tuple(pretrained.get("mean", HALF)),
            tuple(pretrained.get("std", HALF)),
        )
    )


def read_timm_labels(content: dict[str, Any]) -> dict[int, str]:
    """Class names in timm's config.json: its label_names, by their descriptions where it has them."""
    names, words = content.get("label_names") or [], content.get("label_descriptions") or {}
    return {i: str(words.get(name, name)) for i, name in enumerate(names)}
