"""`beit info`: what a model, tokenizer or graph is, without guessing; or what a named size would be."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from cyclopts import Parameter
from cyclopts.types import PositiveInt

from beit.checkpoints import describe_family, find_weights
from beit.flops import forward_flops
from beit.graph_cache import known_choice
from beit.graphs import RUNTIME_OF, about_of, is_graph
from beit.hub import is_size, resolve, sha256_of
from beit.model import VARIANTS, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling
from beit.names import printable
from beit.plural import counted
from beit.tokenizer_files import is_tokenizer, load_tokenizer
from beit.torch_model import is_small


@Parameter(name="*")
@dataclass(frozen=True)
class Info:
    model: str
    """Folder, file, hub:owner/name or a name of `beit models`; a tokenizer's or an exported graph's too; or
    the name of a size."""
    _: KW_ONLY
    num_heads: PositiveInt | None = None
    """Attention heads, where the file does not say and they are not 64 wide."""
    early_layer: PositiveInt | None = None
    """BEiT v2's split, where it is not 9 of 12 or 21 of 24."""
    json: bool = False
    """Print one JSON line instead of words."""


def info(settings: Info) -> dict[str, Any]:
    """Tell what a model is: family, size, classes, preparation, parameters, provenance, hash."""
    if is_size(settings.model) and settings.model in VARIANTS:
        facts = describe_size(settings.model)
    elif is_graph(settings.model):
        facts = describe_graph(Path(settings.model))
    else:
        path = resolve(settings.model)
        tokenizer = is_tokenizer(path)
        facts = (describe_tokenizer if tokenizer else describe_encoder)(path, settings)
        facts["sha256"] = sha256_of(path)
    if settings.json:
        print(json.dumps(facts, ensure_ascii=False))
        return facts
    print(settings.model)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        for number, line in enumerate(value if isinstance(value, list) else [value]):
            words = f"{line:,}" if type(line) is int else printable(str(line))
            print(f"  {key.replace('_', ' ') if number == 0 else '':14} {words}")
    return facts


def describe_size(name: str) -> dict[str, Any]:
    """The facts of a size that has no weights yet."""
    config = VARIANTS[name]
    kind = BeitForMaskedImageModeling if config.use_mask_token else BeitForImageClassification
    verb = "pretrain" if config.use_mask_token else "finetune"
    with torch.device("meta"):
        model = kind(config)
    height, width = config.image_height_width
    return {
        "family": describe_family(config, kind),
        "weights": f"none, it is a size; train it: beit {verb} DATA --model {name}",
        "img_size": f"{height} x {width} pixels, patches of {config.patch_size}",
        "heads": config.num_heads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward": _forward(config),
        "config": dataclasses.asdict(config),
    }


def _forward(config: BeitConfig) -> str:
    return f"{forward_flops(config) / 1e9:.3g} GFLOP a picture"


def describe_encoder(path: Path, settings: Info) -> dict[str, Any]:
    """The facts of an encoder or a classifier."""
    found = find_weights(path, None, settings.num_heads, settings.early_layer)
    config, spec = found.config, found.image_spec
    height, width = config.image_height_width
    tensors = found.tensors.values()
    facts: dict[str, Any] = {
        "family": describe_family(config, found.model_class),
        "format": found.layout,
        "img_size": f"{height} x {width} pixels, patches of {config.patch_size}",
        "heads": config.num_heads,
        "parameters": sum(t.numel() for t in tensors),
        "forward": _forward(config),
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
        "norm_eps": config.layer_norm_eps,
        "preparation": dataclasses.asdict(spec),
    }
    if found.id2label:
        facts["classes"] = _classes([found.id2label[i] for i in range(len(found.id2label))])
    if found.ignored:
        reasons = Counter(found.ignored.values())
        facts["ignored"] = [f"{counted(often, 'item')}: {reason}" for reason, often in reasons.items()]
    if found.assumed:
        facts["assumed"] = found.assumed
    if found.provenance:
        facts["provenance"] = found.provenance
    small = "torch, as so small a model is not measured"
    facts["runtime"] = small if is_small(config) else known_choice(path)
    return facts


def _classes(names: Sequence[str]) -> str:
    return f"{len(names)}: {'; '.join(names[:6])}{'; …' if len(names) > 6 else ''}"


def describe_graph(file: Path) -> dict[str, Any]:
    """The facts of a file that `beit export` wrote. Raises GraphError, ValueError for a missing extra."""
    about = about_of(file)
    height, width = about.image_spec.size
    what = {
        "classification": "classes",
        "masked": "tokens of hidden patches",
        "features": f"features, pooling {about.pooling}, "
        + ("at the end" if about.layer is None else f"layer {about.layer}"),
    }
    others = "" if about.max_size is None else f", and any size up to {about.max_size}"
    facts: dict[str, Any] = {
        "family": f"graph for {RUNTIME_OF[file.suffix]}: {what[about.kind]}",
        "precision": about.precision,
        "img_size": f"{height} x {width} pixels{others}, patches of {about.config['patch_size']}",
        "preparation": dataclasses.asdict(about.image_spec),
    }
    if about.labels:
        facts["classes"] = _classes(about.labels)
    report = file.with_suffix(".json")
    if about.precision == "int8":
        with suppress(OSError, ValueError, KeyError, TypeError):  # lost, or another's file of that name
            told = json.loads(report.read_text(encoding="utf-8"))
            facts["agreement"] = (
                f"{told['agreement_is']} {told['agreement']:.2%} of {told['measured_on']} pictures"
            )
    return facts | {"made_by": about.made_by, "model_sha256": about.model_sha256}


def describe_tokenizer(path: Path, settings: Info) -> dict[str, Any]:
    """The facts of a visual tokenizer."""
    tokenizer = load_tokenizer(path, settings.num_heads)
    height, width = tokenizer.view_size
    facts: dict[str, Any] = {
        "family": f"visual tokenizer, {type(tokenizer).__name__}",
        "tokens": f"{tokenizer.vocab_size}, one for {tokenizer.stride} x {tokenizer.stride} pixels",
        "view_size": f"{height} x {width} pixels",
        "can_draw": tokenizer.can_draw,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "sizes": dataclasses.asdict(tokenizer.config),
    }
    file = path / "config.json"
    if file.is_file():
        told = json.loads(file.read_text(encoding="utf-8")).get("provenance", {})
        if "live_codes" in told:
            facts["health"] = describe_health(told)
        for name in ("reconstructions.png", "report.html"):
            if (path / name).is_file():
                facts[name.split(".")[0]] = str(path / name)
        facts["provenance"] = told
    return facts


def describe_health(told: dict[str, Any]) -> list[str]:
    """What a tokenizer's training found, beside what is usual."""
    quality = {
        "psnr_db": "dB PSNR of what it draws; 11 is one colour for all, 17 to 23 our own short runs",
        "cosine": "cosine to the teacher; 1 says all that the teacher says",
    }
    return [
        f"{told['live_codes']:.1%} of the codes alive; above 95 % is good",
        f"{told['perplexity']:.0f} perplexity; half of the codes or more is good",
        *(f"{told[key]:.3g} {text}" for key, text in quality.items() if key in told),
    ]
