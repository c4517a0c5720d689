"""Models on disk: write and read them, and hand a pre-trained encoder over to a classifier.

A saved model is a transformers folder: `config.json`, `model.safetensors` with transformers' names,
`preprocessor_config.json`, a model card. What transformers has no field for stands under one key,
`beit`, of `config.json`. Tokenizers are folders of the same kind with a `model_type` of their own.
Only JSON and safetensors are read, so nothing that is opened can run code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from beit.atomic import write_together
from beit.image import ImageSpec, unilm_spec
from beit.model import (
    Beit,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    resize_positions,
)
from beit.relative_position import relative_position_index, resize_bias_table
from beit.tokenizer import DalleConfig, DalleTokenizer, DiscreteVAE, DiscreteVAEConfig
from beit.vqkd import VQKD, VQKDConfig

FORMAT = 1  # of what stands under the `beit` key


class CheckpointError(ValueError):
    """A model folder that cannot be used, and why."""

    exit_code = 5


MODEL_CLASSES: dict[str, type[Beit]] = {
    "BeitModel": Beit,
    "BeitForMaskedImageModeling": BeitForMaskedImageModeling,
    "BeitForImageClassification": BeitForImageClassification,
}

# Our name (timm's and unilm's) -> transformers' name on disk. {i} is a block. The fused qkv matrix is
# cut in three; see `to_transformers`.
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


def rename(name: str, table: dict[str, str]) -> str | None:
    """Translate a parameter name by the table; None where no row fits."""
    number = re.search(r"(?:blocks|layer)\.(\d+)\.", name)
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
    """The reverse; a name that no rule knows is kept, so that the loader can report it."""
    back = {theirs: ours for ours, theirs in {**ENCODER_NAMES, **HEAD_NAMES}.items()}
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("beit.")
        part = re.fullmatch(
            r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight", name
        )
        if part:
            parts.setdefault(part[1], {})[part[2]] = tensor
        elif name.endswith("relative_position_index"):
            continue  # recomputed; old files carry one a block
        elif name.startswith("layernorm."):
            second = full_name != name and name in tensors  # a norm before the masked model's own
            result[full_name if second else "norm" + name[len("layernorm") :]] = tensor
        else:
            result[rename(name, back) or full_name] = tensor
    for number, qkv in parts.items():
        if len(qkv) == 3:
            rows = [qkv["query"], qkv["key"], qkv["value"]]
            alike = len({row.shape for row in rows}) == 1
            # What cannot be one matrix is shown by its largest part, for the loader to report.
            fused = torch.cat(rows) if alike else max(rows, key=Tensor.numel)
            result[f"blocks.{number}.attn.qkv.weight"] = fused
    return result


# --- config.json ----------------------------------------------------------------------------------


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
    return content


def read_model_config(content: dict[str, Any]) -> BeitConfig:
    """A BeitConfig from the content of config.json; ours, or transformers' for a BEiT."""
    ours = content.get("beit", {})
    size = content["image_size"]
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
        mlp_ratio=content["intermediate_size"] / content["hidden_size"],
        init_values=content.get("layer_scale_init_value") or 0.0,
        rel_pos_bias=bias,  # type: ignore[arg-type]
        use_abs_pos_emb=content.get("use_absolute_position_embeddings", False),
        use_mask_token=content.get("use_mask_token", False),
        pooling=ours.get("pooling", "mean" if content.get("use_mean_pooling", True) else "cls"),
        layer_norm_eps=content.get("layer_norm_eps", 1e-12),
        drop_path_rate=content.get("drop_path_rate", 0.0),
        num_classes=len(content.get("id2label", {})),
        vocab_size=content.get("vocab_size", 8192),
        early_layer=ours.get("early_layer", 0),
        head_layers=ours.get("head_layers", 2),
    )


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
    """An ImageSpec from what `dataclasses.asdict` made of it, by way of JSON."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return ImageSpec(**values)


# --- folders --------------------------------------------------------------------------------------


def save_model(model: Beit, folder: str | Path, provenance: dict[str, Any] | None = None) -> None:
    """Write a model as a folder that `load`, and transformers' from_pretrained, read.

    provenance: how it was made, plain values; kept in config.json. config.json is written last, so a
    folder that has one is whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = describe_model(model, provenance or {})
    card = _model_card(model, config, provenance or {})
    contents = {
        "model.safetensors": save(to_transformers(model), metadata={"format": "pt"}),
        "preprocessor_config.json": _json(describe_processor(model.image_spec)),
        "README.md": card.encode(),
        "config.json": _json(config),
    }
    write_together(folder, contents)


def load(source: str | Path) -> Beit:
    """Read a model folder; the model comes in evaluation mode.

    `model.config`, `model.image_spec` and `model.id2label` come with it. Raises CheckpointError where
    the folder is no model, or its tensors are not those of its config.
    """
    folder = Path(source)
    content = _read_config(folder)
    if content.get("model_type") != "beit":
        raise CheckpointError(
            f"{folder} holds a {content.get('model_type')!r}, not a BEiT encoder"
            + ("; give it as --tokenizer" if content.get("model_type") in TOKENIZERS else "")
        )
    name = (content.get("architectures") or ["?"])[0]
    if name not in MODEL_CLASSES:
        raise CheckpointError(f"{folder} holds a {name}; known are {', '.join(MODEL_CLASSES)}")
    try:
        config = read_model_config(content)
        with torch.device("meta"):  # shapes only: every value comes from the file
            model = MODEL_CLASSES[name](config)
        model.id2label = {int(i): label for i, label in content.get("id2label", {}).items()}
        if "image_spec" in content.get("beit", {}):
            model.image_spec = read_image_spec(content["beit"]["image_spec"])
    except Exception as error:  # a wrong number shows as almost anything
        raise CheckpointError(f"{folder / 'config.json'} does not describe a BEiT: {error!r}") from error
    tensors = from_transformers(_read_tensors(folder))
    _check_same(folder, {k: v.shape for k, v in model.state_dict().items()}, tensors)
    model.load_state_dict(tensors, assign=True)
    model.relative_position_index = relative_position_index(config.grid)
    return model.requires_grad_(True).eval()


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
    weights = save(tensors, metadata={"format": "pt"})
    write_together(folder, {"model.safetensors": weights, "config.json": _json(config)})


def load_tokenizer(source: str | Path) -> AnyTokenizer:
    """Read a tokenizer folder, in evaluation mode. Raises CheckpointError."""
    folder = Path(source)
    content = _read_config(folder)
    kind = content.get("model_type")
    if kind not in TOKENIZERS:
        raise CheckpointError(
            f"{folder} holds a {kind!r}, not a visual tokenizer; train one with "
            "`beit train-tokenizer DATA -o RUN`"
        )
    try:
        tokenizer = TOKENIZERS[kind](content["sizes"])
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'} has wrong sizes: {error!r}") from error
    tensors = _read_tensors(folder)
    if isinstance(tokenizer, DalleTokenizer) and not any(k.startswith("decoder.") for k in tensors):
        tokenizer.decoder = None
    _check_same(folder, {k: v.shape for k, v in tokenizer.state_dict().items()}, tensors)
    tokenizer.load_state_dict(tensors)
    return tokenizer.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist")
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "run.toml").exists():
            raise CheckpointError(
                f"the run {folder} has not finished; give its command again and it will go on"
            )
        raise CheckpointError(f"{folder} has no config.json, so it is not a model folder")
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _check_same(folder: Path, wanted: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    wrong = [
        f"{k} is {tuple(tensors[k].shape)}, config.json says {tuple(wanted[k])}"
        for k in sorted(wanted.keys() & tensors.keys())
        if tensors[k].shape != wanted[k]
    ]
    if missing or extra or wrong:
        facts = [f"{len(missing)} tensors are missing ({', '.join(missing[:4])}, …)"] if missing else []
        facts += [f"{len(extra)} are unknown ({', '.join(extra[:4])}, …)"] if extra else []
        facts += wrong[:4]
        raise CheckpointError(f"{folder} does not fit its own config.json: {'; '.join(facts)}")


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


# --- hand-over ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor of the source, and what is new."""

    used: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)  # the shared table, now one a block
    new: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("resized", "expanded", "new", "ignored")]
        text = [f"{name} {', '.join(_shorten(names))}" for name, names in rows if names]
        return "; ".join([f"used {len(self.used)} tensors", *text])


def _shorten(names: list[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"blocks\.\d+\.", "blocks.*.", name) for name in names))


def to_classifier(
    source: Beit,
    classes: Sequence[str],
    img_size: int | tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
) -> tuple[BeitForImageClassification, LoadReport]:
    """A classifier that begins with the encoder of `source` (recipe §2.6).

    The shared bias table is copied into every block; tables and positions are resized to another
    img_size; the final norm and the masked-image head are left behind, and `fc_norm` and the head
    begin anew (a classifier's head is kept where it has the same classes in the same order).
    """
    old = source.config
    size = old.img_size if img_size is None else img_size
    config = replace(old.for_classification(len(classes)), img_size=size, drop_path_rate=drop_path_rate)
    model = BeitForImageClassification(config)
    spec = replace(source.image_spec, size=config.image_height_width)
    if spec.crop_ratio == unilm_spec(source.image_spec.size[0]).crop_ratio:  # nobody chose another
        spec = replace(spec, crop_ratio=unilm_spec(spec.size[0]).crop_ratio)
    model.image_spec = spec
    model.id2label = dict(enumerate(classes))
    same_head = source.id2label == model.id2label
    report = LoadReport()
    tensors = source.state_dict()
    shared = tensors.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        names = [f"blocks.{i}.attn.relative_position_bias_table" for i in range(config.depth)]
        tensors.update(dict.fromkeys(names, shared))
        report.expanded.append("rel_pos_bias.relative_position_bias_table")
    wanted = model.state_dict()
    taken: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in wanted or (name.startswith("head.") and not same_head):
            report.ignored.append(name)
            continue
        if old.grid != config.grid and name.endswith("relative_position_bias_table"):
            tensor = resize_bias_table(tensor, old.grid, config.grid)
            report.resized.append(name)
        elif old.grid != config.grid and name == "pos_embed":
            tensor = resize_positions(tensor, old.grid, config.grid)
            report.resized.append(name)
        taken[name] = tensor
        report.used.append(name)
    report.new.extend(sorted(wanted.keys() - taken.keys()))
    model.load_state_dict(taken, strict=False)
    return model, report
