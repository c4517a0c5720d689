"""Tensors and JSON as they lie in files and folders, before anybody knows whose they are.

A file is safetensors, or a pickle that `unpickle`'s allow-list reads, with its tensors at the top or under
one of the usual keys; a folder has its weights in one file or in several with an index. What cannot be
used is a CheckpointError that says why. Nothing that is opened can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit.graphs import is_graph
from beit.plural import counted
from beit.unpickle import Inert, module_tensors, read_weights

MAX_JSON_BYTES = 1 << 24  # the names of 21,841 classes, twice, are 1.7 MB
CONTAINERS = ("model", "module", "state_dict", "weights")
GRAPH = (
    "an exported graph, which classify, embed, evaluate, serve, bench and info take{}; here the model is "
    "needed that it was exported from, such as the run's folder"
)


class CheckpointError(ValueError):
    """A model that cannot be used, and why."""

    exit_code = 5


# Other files of a training's checkpoint, and what they are.
BESIDE_WEIGHTS = {
    "optimizer.safetensors": "an optimiser keeps",
    "tally.safetensors": "a training counts",
}


def file_tensors(path: Path) -> tuple[Any, dict[str, Tensor], dict[str, str]]:
    """What a file holds, the state dict in it, and what lay beside that dict."""
    if is_graph(path):
        raise CheckpointError(f"{path} is {GRAPH.format('')}")
    if path.suffix == ".toml":
        raise CheckpointError(f"{path} is settings, not a model; its folder may be one")
    if path.name in BESIDE_WEIGHTS:
        kept = BESIDE_WEIGHTS[path.name]
        raise CheckpointError(f"{path} is what {kept}; the weights are in model.safetensors")
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


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder: safetensors or old .bin, in one file or in several with an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        read = read_safetensors if name.endswith(".safetensors") else _bin_tensors
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return read(file)
        if index.is_file():
            parts = sorted(set(map(str, read_json(index).get("weight_map", {}).values())))
            strangers = [part for part in parts if Path(part).name != part]
            if strangers or not parts:
                raise CheckpointError(
                    f"{index} names files outside its folder: {', '.join(strangers) or 'none'}"
                )
            return {key: tensor for part in parts for key, tensor in read(folder / part).items()}
    raise CheckpointError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def _bin_tensors(file: Path) -> dict[str, Tensor]:
    return file_tensors(file)[1]


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}; get or copy it again") from error


def read_config_json(folder: Path) -> dict[str, Any]:
    """A folder's config.json, or why it is no finished model."""
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "run.toml").exists():
            raise CheckpointError(
                f"the run {folder} has not finished; give its command again and it will go on"
            )
        if (folder / "optimizer.safetensors").is_file():
            raise CheckpointError(
                f"{folder} is a checkpoint of a training: give its command again to go on from it; its "
                f"weights as they were are {folder / 'model.safetensors'}"
            )
        if (folder / "shards.json").is_file():
            raise CheckpointError(f"{folder} holds shards of pictures, to be given as DATA; not a model")
        if graphs := sorted(filter(is_graph, folder.iterdir())):
            raise CheckpointError(f"{folder} holds {GRAPH.format(f' as {graphs[0]}')}")
        raise CheckpointError(
            f"{folder} has no config.json, so it is not a model folder; "
            "give one, or a name that `beit models` lists"
        )
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a config's size."""
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} is larger than the {MAX_JSON_BYTES:,} bytes of any real config")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return content


def check_same(path: Path, wanted: dict[str, torch.Size], tensors: dict[str, Tensor], what: str) -> None:
    """Hold tensors against the names and shapes that a `what` has."""
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    facts = [f"missing: {counted(len(missing), 'tensor')} ({some_names(missing)})"] if missing else []
    facts += [f"unknown: {len(unknown)} ({some_names(unknown)})"] if unknown else []
    facts += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ][:4]
    if facts:
        raise CheckpointError(f"{path} looks like a {what}, but does not fit: {'; '.join(facts)}")


def some_names(names: Iterable[str], most: int = 4) -> str:
    """The first of them, and how many more."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def json_bytes(content: dict[str, Any]) -> bytes:
    """A config.json for people to read too."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
