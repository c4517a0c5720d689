"""Models on disk: read those of every format, write those that every format's own library reads.

A saved model is a transformers folder: `config.json`, `model.safetensors` with transformers' names on
disk, `preprocessor_config.json`, a model card. What transformers has no field for stands under one
key, `beit`, of `config.json`.

What comes in may also be a timm folder, a raw file of unilm's or timm's, a plain ViT (DINO's, say), or a
name on the hub. `weight_files` opens them, `tokenizer_files` knows tokenizers.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from beit.atomic import not_there, write_atomically, write_together
from beit.configs import (
    DEFAULT_LABELS,
    FORMAT,
    MODEL_CLASSES,
    SEVERAL_LABELS,
    describe_model,
    describe_processor,
    describe_timm,
    read_image_spec,
    read_labels,
    read_processor,
    read_timm_labels,
    read_timm_spec,
    read_transformers_config,
)
from beit.handover import hand_over
from beit.hub import class_names, resolve
from beit.image import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageSpec,
    resized_spec,
    timm_spec,
    transformers_spec,
    unilm_spec,
)
from beit.layouts import (
    EXPORT,
    count_blocks,
    from_transformers,
    from_vit,
    layout_of,
    read_config,
    reason_to_ignore,
    strip_prefix,
    to_transformers,
    what_no_beit_has,
)
from beit.model import (
    Beit,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    check_whole,
)
from beit.relative_position import relative_position_index
from beit.tokenizer_files import TOKENIZERS, AnyTokenizer, is_tokenizer, load_tokenizer
from beit.unpickle import RefusedFile
from beit.weight_files import (
    CheckpointError,
    check_same,
    file_tensors,
    folder_tensors,
    json_bytes,
    read_config_json,
    read_json,
)

FOR_PRETRAINING = "it is what `beit pretrain DATA --tokenizer` takes"

Size = int | tuple[int, int]
Format = Literal["transformers", "timm", "unilm"]


# --- reading ---------------------------------------------------------------------------------------


@dataclass
class Weights:
    """A model as it was found: tensors under our names, and what is known about them."""

    path: Path
    layout: str  # as people call it: "transformers folder", "unilm file", ...
    tensors: dict[str, Tensor]
    config: BeitConfig
    model_class: type[Beit]
    image_spec: ImageSpec
    id2label: dict[int, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def load(
    source: str | Path,
    *,
    img_size: Size | None = None,
    num_classes: int | None = None,
    patch_size: int | None = None,
    num_heads: int | None = None,
    early_layer: int | None = None,
    image_spec: ImageSpec | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Beit | AnyTokenizer:
    """Read a model, or a visual tokenizer, of any known format, in evaluation mode.

    source: a folder (ours, transformers', timm's), a file (unilm's or timm's .pth, OpenAI's
    encoder.pkl, VQ-KD's .pth, safetensors), `hub:owner/name[@revision]`, or a name of `beit models`.
    The rest is as in `load_model`. Raises CheckpointError, or ValueError for a wrong argument.
    """
    path = resolve(str(source), revision)
    if is_tokenizer(path):
        return load_tokenizer(path, num_heads=num_heads)
    model = load_model(
        path,
        img_size=img_size,
        num_classes=num_classes,
        patch_size=patch_size,
        num_heads=num_heads,
        early_layer=early_layer,
        image_spec=image_spec,
        dtype=dtype,
    )
    model.provenance["source"] = str(source)
    return model


def load_model(
    source: str | Path,
    *,
    img_size: Size | None = None,
    num_classes: int | None = None,
    patch_size: int | None = None,
    num_heads: int | None = None,
    early_layer: int | None = None,
    image_spec: ImageSpec | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Beit:
    """Read an encoder or a classifier of any known format, in evaluation mode.

    img_size, patch_size: pixels; another than the file's resizes bias tables, positions and kernel.
    num_classes: another than the file's begins a new head, 0 leaves it off (features); a pre-trained
    model becomes a classifier by it. num_heads, early_layer, image_spec: what the file does not say,
    where the rule is wrong. dtype: the file's own where not given.

    The model has `config`, `image_spec`, `id2label`, `load_report`, `provenance`. Raises
    CheckpointError where the source is no BEiT or does not fit.
    """
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes {num_classes} is not 0, for none, or more")
    found = find_weights(resolve(str(source), revision), img_size, num_heads, early_layer)
    _check_own(found)
    cls, config = found.model_class, found.config
    if num_classes is not None and (
        cls is not BeitForImageClassification or num_classes != config.num_classes
    ):
        cls, config = BeitForImageClassification, config.for_classification(num_classes)
    config = replace(
        config,
        img_size=config.img_size if img_size is None else img_size,
        patch_size=config.patch_size if patch_size is None else patch_size,
    )
    classifies = issubclass(cls, BeitForImageClassification)
    keep_head = config.num_classes == found.config.num_classes
    with torch.device("meta"):  # shapes alone; the values come from the file
        model = cls(config)
    model.image_spec = image_spec or found.image_spec
    if image_spec is None and config.image_height_width != found.config.image_height_width:
        model.image_spec = resized_spec(model.image_spec, config.image_height_width)
    model.id2label = found.id2label if keep_head and classifies else {}
    taken, report, unknown = hand_over(found.tensors, found.config, model, keep_head)
    assert not unknown, f"tensors that passed for known are not: {unknown}"
    model.load_report = replace(
        report, ignored={**found.ignored, **report.ignored}, assumed=[*found.assumed, *report.assumed]
    )
    model.provenance = {"source": str(source), "layout": found.layout, **found.provenance}
    # A new head takes the file's number format; a file of several is read in the widest.
    held = functools.reduce(torch.promote_types, {tensor.dtype for tensor in taken.values()})
    if report.new:  # a norm, a head: begun as in a model of one block
        fresh = cls(replace(config, depth=1, early_layer=0)).state_dict()
        taken |= {name: fresh[name] for name in report.new}
    model.load_state_dict(taken, assign=True)
    biased = config.rel_pos_bias != "none"
    model.relative_position_index = relative_position_index(config.grid if biased else (1, 1))
    return model.to(dtype or held).requires_grad_(True).eval()


def find_weights(
    path: Path,
    img_size: Size | None = None,
    num_heads: int | None = None,
    early_layer: int | None = None,
) -> Weights:
    """Look at a folder or a file and say what is in it. Raises CheckpointError."""
    try:
        if path.is_dir():
            content = read_config_json(path)
            if "pretrained_cfg" in content or "architecture" in content:
                return _timm_folder(path, content, num_heads, early_layer)
            return _transformers_folder(path, content, num_heads, early_layer)
        if not path.exists():
            raise CheckpointError(not_there(path))
        return _single_file(path, img_size, num_heads, early_layer)
    except (CheckpointError, RefusedFile):
        raise
    except Exception as error:  # a wrong number shows as almost anything
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} does not describe a BEiT: {reason}") from error


def _transformers_folder(
    path: Path, content: dict[str, Any], num_heads: int | None, early_layer: int | None
) -> Weights:
    kind = content.get("model_type")
    if kind not in ("beit", "data2vec-vision", "vit"):
        raise CheckpointError(
            f"{path} holds a {str(kind)[:80]!r}, not a BEiT encoder or a plain ViT; "
            + (FOR_PRETRAINING if kind in list(TOKENIZERS) else EXPORT)
        )
    ours = content.get("beit", {})
    if ours.get("format", FORMAT) > FORMAT:
        raise CheckpointError(
            f"{path} has format {ours['format']} and this version of beit reads up to {FORMAT}; update it"
        )
    if not isinstance(ours.get("provenance", {}), dict):
        raise ValueError(f"provenance in config.json is {str(ours['provenance'])[:80]!r}")
    tensors = folder_tensors(path)
    tensors = from_vit(tensors) if kind == "vit" else strip_prefix(from_transformers(tensors))
    tensors, ignored = _set_aside(tensors)
    given = content.get("architectures")
    name = given[0] if given else _class_of(tensors).__name__
    # A ViT's masked model guesses pixels: its name is left, and so is unknown.
    name = re.sub("^(Data2VecVision|ViT(?!ForMasked))", "Beit", name)
    if name not in {*MODEL_CLASSES, "BeitForSemanticSegmentation", "BeitBackbone"}:
        raise CheckpointError(f"{path} holds a {name}; known are {', '.join(MODEL_CLASSES)}")
    if name == "BeitForImageClassification":
        content.setdefault("id2label", DEFAULT_LABELS)
    assumed: list[str] = []
    config = read_transformers_config(content)
    for what, asked in (("num_heads", num_heads), ("early_layer", early_layer)):
        if asked not in (None, getattr(config, what)):
            raise ValueError(f"{what} {asked} was asked for; its config says {getattr(config, what)}")
    labels = read_labels(content, assumed)
    if name not in MODEL_CLASSES or (name == "BeitModel" and "norm.weight" not in tensors):
        # transformers' bare encoder pools the mean into a norm, as our classifier without a head does;
        # a segmentation model's encoder has no norm at all.
        name, labels, config = "BeitForImageClassification", {}, replace(config, num_classes=0)
    if not ours and config.rel_pos_bias != "none" and config.grid[0] != config.grid[1]:
        assumed.append("the table's rows: row by row; transformers exchanges a rectangle's sides")
    if "image_spec" in ours:
        try:
            spec = read_image_spec(ours["image_spec"])
        except (TypeError, AttributeError) as error:
            raise ValueError(f"image_spec in config.json: {error}") from None
    elif (file := path / "preprocessor_config.json").is_file():
        spec = read_processor(read_json(file))
        if spec.size != config.image_height_width:
            sizes = [" x ".join(map(str, each)) for each in (spec.size, config.image_height_width)]
            assumed.append(
                f"pictures of {sizes[0]}, as they are prepared, where the model's own are {sizes[1]}"
            )
        if spec.resize == "short_side" and spec.size[0] != spec.size[1]:
            assumed.append(
                "preparation: the rectangle is covered, where transformers fills up with black"
            )
    else:
        spec = ImageSpec(config.image_height_width, "squash", crop_ratio=1.0)
        assumed.append("preparation: squashed, bicubic, mean 0.5 (there is no preprocessor_config.json)")
    return Weights(
        path,
        "beit folder" if ours else "transformers folder",
        tensors,
        config,
        MODEL_CLASSES[name],
        spec,
        labels,
        ignored,
        assumed,
        ours.get("provenance", {}),
    )


def _timm_folder(
    path: Path, content: dict[str, Any], num_heads: int | None, early_layer: int | None
) -> Weights:
    architecture = str(content.get("architecture"))
    if not architecture.startswith(("beit", "vit_", "deit_")) or "quickgelu" in architecture:
        raise CheckpointError(f"{path} holds timm's {architecture}, not a BEiT or a plain ViT; {EXPORT}")
    pretrained = content.get("pretrained_cfg") or content  # old folders keep it all on one level
    arguments = content.get("model_args") or {}
    size = arguments.get("img_size") or pretrained.get("input_size", [3, 224, 224])[1:]
    found = _from_blocks(
        path,
        folder_tensors(path),
        num_heads or arguments.get("num_heads"),
        early_layer,
        known_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
    )
    config = found.config
    said = {**arguments, "num_classes": content.get("num_classes")}
    for name in ("embed_dim", "depth", "num_heads", "patch_size", "num_classes"):
        if said.get(name) not in (None, getattr(config, name)):
            raise ValueError(
                f"its config.json says {name} {said[name]}, its tensors {getattr(config, name)}"
            )
    pool = said.get("global_pool", content.get("global_pool"))
    norm = "norm.weight" if "norm.weight" in found.tensors else "fc_norm.weight"
    norms = {"avg": "fc_norm.weight", "token": "norm.weight", "": "norm.weight", None: norm}
    if norms.get(pool) != norm:
        raise ValueError(f"its global_pool is {pool!r} and it has {norm}, which nothing here computes")
    if pool == "token" and found.model_class is Beit:  # without a head
        found.model_class, found.config = BeitForImageClassification, replace(config, pooling="cls")
    found.layout = "timm folder"
    found.image_spec = read_timm_spec(pretrained, config.image_height_width)
    found.id2label = read_timm_labels(content)
    several = content.get("problem_type") == SEVERAL_LABELS  # our own word for it; timm has none
    found.config = replace(found.config, several_labels=several)
    if len(found.id2label) not in (0, config.num_classes):
        raise ValueError(f"it names {len(found.id2label)} classes, its head has {config.num_classes}")
    return _with_class_names(found)


def _single_file(
    path: Path, img_size: Size | None, num_heads: int | None, early_layer: int | None
) -> Weights:
    content, tensors, rest = file_tensors(path)
    layout = layout_of(tensors)
    if layout in ("dalle", "vqkd"):
        raise CheckpointError(f"{path} holds a visual tokenizer, not a model; {FOR_PRETRAINING}")
    if layout == "transformers":
        tensors = from_transformers(tensors)
    elif layout == "unknown":
        what = what_no_beit_has(tensors)
        raise CheckpointError(
            f"{path} has no tensors of a BEiT; its first are {', '.join(list(tensors)[:4]) or 'none'}; "
            + (f"it is a ViT with {what}; {EXPORT}" if what else "docs/formats.md lists what is read")
        )
    found = _from_blocks(path, tensors, num_heads, early_layer, img_size)
    wrapped = bool(rest) or any("relative_position_index" in name for name in found.ignored)
    found.ignored |= rest
    config, size = found.config, found.config.image_height_width
    if layout == "transformers":
        found.layout, found.config = "transformers file", replace(config, layer_norm_eps=1e-12)
        spec = transformers_spec(max(size))
    elif layout == "vit":
        found.layout = "ViT file"
        if any("encoder.layer." in name or "_proj" in name for name in tensors):
            found.config = replace(config, layer_norm_eps=1e-12)
        # timm's own ViTs are bare classifiers and have 0.5; DINO's and MAE's are encoders, DeiT's files
        # hold their weights under `model`: they have ImageNet's statistics.
        bare = content is tensors and config.num_classes
        spec = timm_spec(max(size)) if bare else unilm_spec(max(size))
        spec = spec if bare else replace(spec, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    elif wrapped or content is not tensors or "mask_token" in found.tensors:
        found.layout, spec = "unilm file", unilm_spec(max(size))
    else:
        found.layout, spec = "timm file", timm_spec(max(size))
    absolute = config.use_abs_pos_emb and layout == "blocks"
    if "beitv2" in path.name or config.early_layer or absolute:
        spec = replace(spec, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    found.image_spec = replace(spec, size=size)
    found.assumed += [
        f"layer_norm_eps {found.config.layer_norm_eps}",
        f"preparation of a {found.layout}: {spec.resize}, {spec.filter}, crop {spec.crop_ratio}, "
        f"mean {spec.mean[0]}; image_spec= sets it",
    ]
    return _with_class_names(found)


def _with_class_names(found: Weights) -> Weights:
    """Words for the classes of a head that only ImageNet's can be, where the source has none."""
    if not found.id2label and (names := class_names(found.config.num_classes)):
        found.id2label = dict(enumerate(names))
        found.assumed.append(f"class names: those of ImageNet with {len(names)} classes, in their order")
    return found


def _from_blocks(
    path: Path,
    tensors: dict[str, Tensor],
    num_heads: int | None,
    early_layer: int | None,
    img_size: Size | None = None,
    known_size: tuple[int, int] | None = None,
) -> Weights:
    """Tensors under our names without a config of transformers': all that they say is read from them."""
    vit = layout_of(tensors) == "vit"
    tensors, ignored = _set_aside(from_vit(tensors) if vit else strip_prefix(tensors))
    config, assumed = read_config(tensors, img_size, num_heads, early_layer, known_size)
    if vit and "norm.weight" in tensors:  # also without a head its class token speaks for the picture
        config = replace(config, pooling="cls")
    kind = _class_of(tensors)
    return Weights(path, "file", tensors, config, kind, ImageSpec(), ignored=ignored, assumed=assumed)


def _class_of(tensors: dict[str, Tensor]) -> type[Beit]:
    """Which model has these parts."""
    if "lm_head.weight" in tensors:
        return BeitForMaskedImageModeling
    if "norm.weight" in tensors and not {"head.weight", "fc_norm.weight"} & tensors.keys():
        return Beit
    return BeitForImageClassification


def _set_aside(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take out what is of no use beside an encoder, with the reasons."""
    ignored = {name: reason for name in tensors if (reason := reason_to_ignore(name))}
    return {name: tensor for name, tensor in tensors.items() if name not in ignored}, ignored


DTYPES = {"float64", "float32", "bfloat16", "float16"}
MAX_PATCHES = 1 << 14  # 2048 x 2048 pixels in patches of 16; their index alone is 2 GiB


def _check_own(found: Weights) -> None:
    """A source against its config: nothing missing, nothing unknown, every shape as it should be."""
    path, tensors, c = found.path, found.tensors, found.config
    try:
        numbers = {"blocks": c.depth}
        if c.early_layer and found.model_class is BeitForMaskedImageModeling:
            numbers["cls_pt_layers"] = c.head_layers
        for name, number in numbers.items():  # before anything is built in this number
            if count_blocks(tensors, name) != number:
                raise ValueError(
                    f"it has {count_blocks(tensors, name)} {name}, its config says {number}"
                )
        if c.grid[0] * c.grid[1] > MAX_PATCHES:
            raise ValueError(f"its grid of {c.grid} patches has more than {MAX_PATCHES}")
        with torch.device("meta"):
            like = found.model_class(c).state_dict()
    except Exception as error:  # a wrong number in config.json shows as almost anything
        raise CheckpointError(f"{path} does not describe a BEiT: {error}") from error
    if not {"fc_norm.weight", "norm.weight"} & tensors.keys():  # a backbone, taken before its norm
        like = {name: tensor for name, tensor in like.items() if not name.startswith("fc_norm.")}
    check_same(
        path,
        {k: v.shape for k, v in like.items()},
        tensors,
        describe_family(found.config, found.model_class),
    )
    strange = {str(t.dtype).removeprefix("torch.") for t in tensors.values()} - DTYPES
    if strange:
        raise CheckpointError(
            f"{path} has tensors of {', '.join(sorted(strange))}; known are {', '.join(sorted(DTYPES))}"
        )


def describe_family(c: BeitConfig, model_class: type[Beit]) -> str:
    """What a model is, in words: "BEiT classifier, 12 blocks of width 768, one bias table a block"."""
    task = {
        BeitForMaskedImageModeling: f"masked-image model of {c.vocab_size} tokens",
        BeitForImageClassification: f"classifier of {c.num_classes} classes"
        if c.num_classes
        else "encoder",
    }.get(model_class, "encoder")
    version = "BEiT v2" if c.early_layer else "BEiT"
    bias = {
        "per_block": "one bias table a block",
        "shared": "one shared bias table",
        "none": "no bias table",
    }
    extras = [bias[c.rel_pos_bias]]
    if c.use_abs_pos_emb:
        extras.append("absolute positions")
    if not c.init_values:
        extras.append("no LayerScale")
    return f"{version} {task}, {c.depth} blocks of width {c.embed_dim}, {', '.join(extras)}"


# --- writing ---------------------------------------------------------------------------------------


def save(
    model: Beit,
    folder: str | Path,
    provenance: dict[str, Any] | None = None,
    to: Format = "transformers",
) -> None:
    """Write a model as a folder that `load` and transformers' from_pretrained read; or as timm's
    folder; or, `to="unilm"`, as unilm's file.

    provenance: how it was made, plain values; kept in config.json. config.json is written last, so a
    folder that has one is whole. Raises ValueError for what the format cannot hold.
    """
    folder = Path(folder)
    check_whole(model)
    if to == "unilm":
        return write_atomically(folder, unilm_bytes(model))
    folder.mkdir(parents=True, exist_ok=True)
    if to == "timm":
        config = describe_timm(model)
        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        tensors.pop("mask_token", None)  # timm cannot mask
        contents = {"model.safetensors": to_safetensors(tensors, metadata={"format": "pt"})}
    else:
        config = describe_model(model, provenance or {})
        card = _model_card(model, config, provenance or {})
        contents = {
            "model.safetensors": to_safetensors(to_transformers(model), metadata={"format": "pt"}),
            "preprocessor_config.json": json_bytes(describe_processor(model.image_spec)),
            "README.md": card.encode(),
        }
    write_together(folder, {**contents, "config.json": json_bytes(config)})
    return None


def unilm_bytes(model: Beit) -> bytes:
    """unilm's file: its names under `model`, with the index buffers that its strict loading asks for."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    index = relative_position_index(model.config.grid)
    places = {
        name.removesuffix("bias_table") + "index" for name in tensors if name.endswith("bias_table")
    }
    stream = io.BytesIO()
    torch.save({"model": {**tensors, **dict.fromkeys(sorted(places), index)}}, stream)
    return stream.getvalue()


def _model_card(model: Beit, config: dict[str, Any], provenance: dict[str, Any]) -> str:
    height, width = model.image_spec.size
    count = sum(p.numel() for p in model.parameters())
    lines = [
        f"# {config['architectures'][0]}",
        "",
        f"BEiT, {count:,} parameters, {height} x {width} pixels, patches of {config['patch_size']}.",
        "Written by `beit`; read by `beit.load` and by transformers' `from_pretrained`.",
    ]
    if model.id2label:
        lines += ["", f"Classes: {', '.join(list(model.id2label.values())[:20])}"]
    if provenance:
        lines += ["", "| how it was made | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in provenance.items()]
    return "\n".join(lines) + "\n"
