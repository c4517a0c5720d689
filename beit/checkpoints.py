"""Models on disk: read those of every format, write those that every format's own library reads.

A saved model is a transformers folder: `config.json`, `model.safetensors` with transformers' names on
disk, `preprocessor_config.json`, a model card. What transformers has no field for stands under one
key, `beit`, of `config.json`. Tokenizers are folders of the same kind with a `model_type` of their own.

What comes in may also be a timm folder, a raw file of unilm's or timm's, OpenAI's pickled dVAE, a
VQ-KD file, or a name on the hub. Files are JSON, safetensors, or read by `unpickle`'s allow-list:
nothing that is opened can run code.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from beit.atomic import write_atomically, write_together
from beit.configs import (
    FORMAT,
    MODEL_CLASSES,
    describe_model,
    describe_processor,
    describe_timm,
    read_image_spec,
    read_labels,
    read_processor,
    read_timm_spec,
    read_transformers_config,
)
from beit.handover import hand_over, resized_spec
from beit.hub import class_names, resolve
from beit.image import IMAGENET_MEAN, IMAGENET_STD, ImageSpec, unilm_spec
from beit.layouts import (
    from_transformers,
    layout_of,
    read_config,
    reason_to_ignore,
    strip_prefix,
    to_transformers,
)
from beit.model import Beit, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling
from beit.relative_position import relative_position_index
from beit.tokenizer import DalleConfig, DalleTokenizer, DiscreteVAE, DiscreteVAEConfig
from beit.unpickle import Inert, RefusedFile, module_tensors, read_weights
from beit.vqkd import VQKD, VQKDConfig

Size = int | tuple[int, int]
Format = Literal["transformers", "timm", "unilm"]


class CheckpointError(ValueError):
    """A model that cannot be used, and why."""

    exit_code = 5


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
    return load_model(
        path,
        img_size=img_size,
        num_classes=num_classes,
        patch_size=patch_size,
        num_heads=num_heads,
        early_layer=early_layer,
        image_spec=image_spec,
        dtype=dtype,
    )


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
    found = find_weights(resolve(str(source), revision), img_size, num_heads, early_layer)
    _check_own(found)
    cls, config = found.model_class, found.config
    if num_classes is not None and (
        cls is not BeitForImageClassification or num_classes != config.num_classes
    ):
        cls, config = BeitForImageClassification, config.for_classification(num_classes)
    config = replace(
        config, img_size=img_size or config.img_size, patch_size=patch_size or config.patch_size
    )
    classifies = issubclass(cls, BeitForImageClassification)
    keep_head = config.num_classes == found.config.num_classes
    begins_anew = classifies and (
        not {"fc_norm.weight", "norm.weight"} & found.tensors.keys()
        or found.model_class is not cls
        or (config.num_classes > 0 and not keep_head)
    )
    # Shapes alone, where every value comes from the file.
    with torch.device("cpu" if begins_anew else "meta"):
        model = cls(config)
    model.image_spec = image_spec or found.image_spec
    if image_spec is None and config.image_height_width != found.config.image_height_width:
        model.image_spec = resized_spec(model, config)
    model.id2label = found.id2label if keep_head and classifies else {}
    taken, report, unknown = hand_over(found.tensors, found.config, model, keep_head)
    assert not unknown, f"tensors that passed for known are not: {unknown}"
    model.load_report = replace(
        report, ignored={**found.ignored, **report.ignored}, assumed=[*found.assumed, *report.assumed]
    )
    model.provenance = {"source": str(source), "layout": found.layout, **found.provenance}
    model.load_state_dict(taken, strict=False, assign=True)
    model.relative_position_index = relative_position_index(config.grid)
    return model.to(dtype).requires_grad_(True).eval() if dtype else model.requires_grad_(True).eval()


def find_weights(
    path: Path,
    img_size: Size | None = None,
    num_heads: int | None = None,
    early_layer: int | None = None,
) -> Weights:
    """Look at a folder or a file and say what is in it. Raises CheckpointError."""
    try:
        if path.is_dir():
            content = _read_config(path)
            if "pretrained_cfg" in content or "architecture" in content:
                return _timm_folder(path, content, img_size, num_heads, early_layer)
            return _transformers_folder(path, content)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        return _single_file(path, img_size, num_heads, early_layer)
    except (CheckpointError, RefusedFile):
        raise
    except Exception as error:  # a wrong number shows as almost anything
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} does not describe a BEiT: {reason}") from error


def _transformers_folder(path: Path, content: dict[str, Any]) -> Weights:
    kind = content.get("model_type")
    if kind not in ("beit", "data2vec-vision"):
        raise CheckpointError(
            f"{path} holds a {kind!r}, not a BEiT encoder"
            + ("; give it as --tokenizer" if kind in TOKENIZERS else "")
        )
    ours = content.get("beit", {})
    if ours.get("format", FORMAT) > FORMAT:
        raise CheckpointError(
            f"{path} has format {ours['format']} and this version of beit reads up to {FORMAT}; update it"
        )
    name = (content.get("architectures") or ["BeitModel"])[0].replace("Data2VecVision", "Beit")
    if name not in {*MODEL_CLASSES, "BeitForSemanticSegmentation", "BeitBackbone"}:
        raise CheckpointError(f"{path} holds a {name}; known are {', '.join(MODEL_CLASSES)}")
    assumed: list[str] = []
    config = read_transformers_config(content)
    labels = read_labels(content, assumed)
    tensors, ignored = _set_aside(strip_prefix(from_transformers(_folder_tensors(path))))
    if name not in MODEL_CLASSES or (name == "BeitModel" and "norm.weight" not in tensors):
        # transformers' bare encoder pools the mean into a norm, as our classifier without a head does;
        # a segmentation model's encoder has no norm at all.
        name, labels, config = "BeitForImageClassification", {}, replace(config, num_classes=0)
    if "image_spec" in ours:
        try:
            spec = read_image_spec(ours["image_spec"])
        except (TypeError, AttributeError) as error:
            raise ValueError(f"image_spec in config.json: {error}") from None
    elif (file := path / "preprocessor_config.json").is_file():
        spec = read_processor(_read_json(file))
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
    path: Path,
    content: dict[str, Any],
    img_size: Size | None,
    num_heads: int | None,
    early_layer: int | None,
) -> Weights:
    architecture = str(content.get("architecture"))
    if not architecture.startswith("beit"):
        raise CheckpointError(f"{path} holds timm's {architecture}, not a BEiT")
    pretrained, arguments = content.get("pretrained_cfg", {}), content.get("model_args", {})
    shape = pretrained.get("input_size", [3, 224, 224])
    found = _from_blocks(
        path,
        _folder_tensors(path),
        arguments.get("num_heads", num_heads),
        early_layer,
        (shape[1], shape[2]),
    )
    found.layout, found.image_spec = "timm folder", read_timm_spec(pretrained, (shape[1], shape[2]))
    if names := content.get("label_names"):
        found.id2label = {i: str(name) for i, name in enumerate(names)}
    return found


def _single_file(
    path: Path, img_size: Size | None, num_heads: int | None, early_layer: int | None
) -> Weights:
    content, tensors, rest = _file_tensors(path)
    layout = layout_of(tensors)
    if layout in ("dalle", "vqkd"):
        raise CheckpointError(f"{path} holds a visual tokenizer; give it as --tokenizer")
    if layout == "transformers":
        tensors = from_transformers(tensors)
    elif layout == "vit":
        raise CheckpointError(
            f"{path} has attn.qkv.bias, so its keys have a bias: it is a ViT, DeiT or BEiT-3"
        )
    elif layout == "unknown":
        raise CheckpointError(
            f"{path} has no tensors of a BEiT; its first are {', '.join(list(tensors)[:4]) or 'none'}"
        )
    found = _from_blocks(path, tensors, num_heads, early_layer, img_size)
    found.ignored |= rest
    side = max(found.config.image_height_width)
    wrapped = content is not tensors or any("relative_position_index" in name for name in found.ignored)
    if layout == "transformers":
        found.layout = "transformers file"
        found.config = replace(found.config, layer_norm_eps=1e-12)
        found.image_spec = ImageSpec(found.config.image_height_width, "squash", "bilinear", 1.0)
    else:
        found.layout = "unilm file" if wrapped or "mask_token" in found.tensors else "timm file"
        crop = (
            unilm_spec(side).crop_ratio if found.layout == "unilm file" else (0.9 if side < 384 else 1.0)
        )
        found.image_spec = ImageSpec(found.config.image_height_width, crop_ratio=crop)
    imagenet = "beitv2" in path.name or found.config.early_layer or found.config.use_abs_pos_emb
    if imagenet:
        found.image_spec = replace(found.image_spec, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    spec = found.image_spec
    found.assumed.append(
        f"preparation of a {found.layout}: {spec.resize}, {spec.filter}, crop {spec.crop_ratio}, "
        f"mean {spec.mean[0]}; image_spec= sets it"
    )
    if names := class_names(found.config.num_classes):
        found.id2label = dict(enumerate(names))
        found.assumed.append(f"class names: those of ImageNet with {len(names)} classes, in their order")
    return found


def _from_blocks(
    path: Path,
    tensors: dict[str, Tensor],
    num_heads: int | None,
    early_layer: int | None,
    img_size: Size | None,
) -> Weights:
    """unilm's and timm's tensors: everything is read from them."""
    tensors, ignored = _set_aside(strip_prefix(tensors))
    config, assumed = read_config(tensors, img_size, num_heads, early_layer)
    model_class: type[Beit] = BeitForImageClassification
    if "lm_head.weight" in tensors:
        model_class = BeitForMaskedImageModeling
    elif not {"head.weight", "fc_norm.weight"} & tensors.keys() and "norm.weight" in tensors:
        model_class = Beit
    return Weights(
        path, "file", tensors, config, model_class, unilm_spec(224), {}, ignored, assumed
    )  # fmt: skip


def _set_aside(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take out what is of no use beside an encoder, with the reasons."""
    ignored = {name: reason for name in tensors if (reason := reason_to_ignore(name))}
    return {name: tensor for name, tensor in tensors.items() if name not in ignored}, ignored


CONTAINERS = ("model", "module", "state_dict", "weights")


def _file_tensors(path: Path) -> tuple[Any, dict[str, Tensor], dict[str, str]]:
    """What a file holds, the state dict in it, and what lay beside that dict."""
    content = read_weights(path)
    if isinstance(content, Inert):
        return content, module_tensors(content), {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    inner, rest = content, {}
    for key in CONTAINERS:
        if isinstance(content.get(key), dict):
            inner = content[key]
            rest = {str(k): "the state of a training run" for k in content if k != key}
            break
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors; its keys are {', '.join(map(str, list(inner)[:6]))}"
        )
    rest |= {str(name): "not a tensor" for name, value in inner.items() if not isinstance(value, Tensor)}
    return (content if inner is not content else tensors), tensors, rest


def _folder_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder: safetensors, in one file or several, or an old .bin."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.is_file():
        return _safetensors(file)
    if index.is_file():
        parts = sorted(set(map(str, _read_json(index).get("weight_map", {}).values())))
        strangers = [part for part in parts if Path(part).name != part]
        if strangers or not parts:
            raise CheckpointError(
                f"{index} names files outside its folder: {', '.join(strangers) or 'none'}"
            )
        return {name: tensor for part in parts for name, tensor in _safetensors(folder / part).items()}
    for name in ("pytorch_model.bin", "model.bin"):
        if (folder / name).is_file():
            return _file_tensors(folder / name)[1]
    raise CheckpointError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "run.toml").exists():
            raise CheckpointError(
                f"the run {folder} has not finished; give its command again and it will go on"
            )
        raise CheckpointError(f"{folder} has no config.json, so it is not a model folder")
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def _check_own(found: Weights) -> None:
    """A file against its own config: nothing missing, nothing unknown, every shape as it should be."""
    depth = found.config.depth
    if not any(name.startswith(f"blocks.{depth - 1}.") for name in found.tensors):
        raise CheckpointError(
            f"{found.path} does not fit its own config: it has no block {depth} of {depth}"
        )
    try:
        with torch.device("meta"):
            wanted = found.model_class(found.config).state_dict()
    except Exception as error:  # a wrong number in config.json shows as almost anything
        raise CheckpointError(f"{found.path} does not describe a BEiT: {error}") from error
    if not {"fc_norm.weight", "norm.weight"} & found.tensors.keys():  # a backbone, taken before its norm
        wanted = {name: like for name, like in wanted.items() if not name.startswith("fc_norm.")}
    _check_same(
        found.path, {k: v.shape for k, v in wanted.items()}, found.tensors, describe_family(found)
    )


def _check_same(
    path: Path, wanted: dict[str, torch.Size], tensors: dict[str, Tensor], what: str
) -> None:
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    facts = [f"{len(missing)} tensors are missing ({_some(missing)})"] if missing else []
    facts += [f"{len(unknown)} are unknown ({_some(unknown)})"] if unknown else []
    facts += [
        f"{name} is {tuple(tensors[name].shape)}, its config says {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ][:4]
    if facts:
        raise CheckpointError(f"{path} does not fit its own config, {what}: {'; '.join(facts)}")


def _some(names: Iterable[str], most: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def describe_family(found: Weights) -> str:
    """What a model is, in words: "BEiT classifier, 12 blocks of width 768, one bias table a block"."""
    c = found.config
    task = {
        BeitForMaskedImageModeling: f"masked-image model of {c.vocab_size} tokens",
        BeitForImageClassification: f"classifier of {c.num_classes} classes"
        if c.num_classes
        else "encoder",
    }.get(found.model_class, "encoder")
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
    if to == "unilm":
        return write_atomically(folder, unilm_bytes(model))
    folder.mkdir(parents=True, exist_ok=True)
    if to == "timm":
        config = describe_timm(model)
        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        contents = {"model.safetensors": to_safetensors(tensors, metadata={"format": "pt"})}
    else:
        config = describe_model(model, provenance or {})
        card = _model_card(model, config, provenance or {})
        contents = {
            "model.safetensors": to_safetensors(to_transformers(model), metadata={"format": "pt"}),
            "preprocessor_config.json": _json(describe_processor(model.image_spec)),
            "README.md": card.encode(),
        }
    write_together(folder, {**contents, "config.json": _json(config)})
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


# --- tokenizers ------------------------------------------------------------------------------------


AnyTokenizer = DiscreteVAE | DalleTokenizer | VQKD
TOKENIZERS: dict[str, Callable[[dict[str, Any]], AnyTokenizer]] = {
    "beit-discrete-vae": lambda sizes: DiscreteVAE(DiscreteVAEConfig(**sizes)),
    "beit-dalle-dvae": lambda sizes: DalleTokenizer(DalleConfig(**sizes)),
    "beit-vqkd": lambda sizes: VQKD(VQKDConfig(**sizes)),
}
MODEL_TYPES = {DiscreteVAE: "beit-discrete-vae", DalleTokenizer: "beit-dalle-dvae", VQKD: "beit-vqkd"}


def save_tokenizer(
    tokenizer: AnyTokenizer, folder: str | Path, provenance: dict[str, Any] | None = None
) -> None:
    """Write a tokenizer as a folder that `load_tokenizer` and `beit pretrain --tokenizer` read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": MODEL_TYPES[type(tokenizer)],
        "sizes": dataclasses.asdict(tokenizer.config),
        "provenance": provenance or {},
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in tokenizer.state_dict().items()}
    weights = to_safetensors(tensors, metadata={"format": "pt"})
    write_together(folder, {"model.safetensors": weights, "config.json": _json(config)})


def is_tokenizer(path: Path) -> bool:
    """Whether a folder or a file is a visual tokenizer and no encoder."""
    if path.is_dir():
        file = path / "config.json"
        return file.is_file() and _read_json(file).get("model_type") in TOKENIZERS
    return path.exists() and layout_of(_file_tensors(path)[1]) in ("dalle", "vqkd")


def load_tokenizer(source: str | Path, num_heads: int | None = None) -> AnyTokenizer:
    """Read a visual tokenizer, in evaluation mode.

    source: a folder of ours; OpenAI's encoder.pkl, which takes the decoder.pkl beside it along; a
    VQ-KD .pth. num_heads: of a VQ-KD file whose heads are not 64 wide. Raises CheckpointError.
    """
    path = resolve(str(source))
    if not path.is_dir():
        return _tokenizer_file(path, num_heads)
    content = _read_config(path)
    kind = content.get("model_type")
    if kind not in TOKENIZERS:
        raise CheckpointError(
            f"{path} holds a {kind!r}, not a visual tokenizer; train one with "
            "`beit train-tokenizer DATA -o RUN`"
        )
    try:
        tokenizer = TOKENIZERS[kind](content["sizes"])
    except Exception as error:
        raise CheckpointError(f"{path / 'config.json'} has wrong sizes: {error!r}") from error
    return _fill_tokenizer(path, tokenizer, _folder_tensors(path))


def _tokenizer_file(path: Path, num_heads: int | None) -> AnyTokenizer:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    tensors = _file_tensors(path)[1]
    try:
        if layout_of(tensors) == "dalle":
            return _dalle(path, tensors)
        if layout_of(tensors) == "vqkd":
            dropped = ("loss", "teacher", "scaling")
            tensors = {name: t for name, t in tensors.items() if not name.startswith(dropped)}
            return _fill_tokenizer(path, VQKD(read_vqkd_config(tensors, num_heads)), tensors)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]}") from None
    raise CheckpointError(
        f"{path} is not a visual tokenizer; its first tensors are {_some(list(tensors))}"
    )


def _dalle(path: Path, tensors: dict[str, Tensor]) -> AnyTokenizer:
    """OpenAI's dVAE from its encoder's file, the decoder's beside it."""
    if "blocks.input.w" in tensors:  # one half, as OpenAI pickled it
        if tensors["blocks.input.w"].shape[1] != 3:
            raise CheckpointError(f"{path} is the decoder; give the encoder, and it takes this along")
        other = path.with_name(path.name.replace("encoder", "decoder"))
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
        if other != path and other.exists():
            drawn = _file_tensors(other)[1]
            tensors |= {f"decoder.{name}": tensor for name, tensor in drawn.items()}
    head, stem = tensors["encoder.blocks.output.conv.w"], tensors["encoder.blocks.input.w"]
    start = tensors.get("decoder.blocks.input.w")
    config = DalleConfig(
        vocab_size=head.shape[0],
        n_hid=stem.shape[0],
        n_init=128 if start is None else start.shape[0],
        n_blk_per_group=len(
            {n.split(".")[3] for n in tensors if n.startswith("encoder.blocks.group_1.")}
        ),
    )
    return _fill_tokenizer(path, DalleTokenizer(config, with_decoder=start is not None), tensors)


def read_vqkd_config(tensors: dict[str, Tensor], num_heads: int | None = None) -> VQKDConfig:
    """A VQKDConfig from the published names' shapes; heads are 64 wide where num_heads is not given."""
    kernel, codes = tensors["encoder.patch_embed.proj.weight"], tensors["quantize.embedding.weight"]
    grid = math.isqrt(tensors["encoder.pos_embed"].shape[1] - 1)

    def depth(part: str) -> int:
        return 1 + max(int(m[1]) for n in tensors if (m := re.match(rf"{part}\.blocks\.(\d+)\.", n)))

    return VQKDConfig(
        img_size=grid * kernel.shape[-1],
        patch_size=kernel.shape[-1],
        embed_dim=kernel.shape[0],
        encoder_depth=depth("encoder"),
        decoder_depth=depth("decoder"),
        num_heads=num_heads or max(1, kernel.shape[0] // 64),
        vocab_size=codes.shape[0],
        code_dim=codes.shape[1],
        teacher_dim=tensors["decode_task_layer.2.weight"].shape[0],
    )


def _fill_tokenizer(path: Path, tokenizer: AnyTokenizer, tensors: dict[str, Tensor]) -> AnyTokenizer:
    if isinstance(tokenizer, DalleTokenizer) and not any(k.startswith("decoder.") for k in tensors):
        tokenizer.decoder = None
    _check_same(path, {k: v.shape for k, v in tokenizer.state_dict().items()}, tensors, "a tokenizer")
    tokenizer.load_state_dict(tensors)
    return tokenizer.eval()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


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
