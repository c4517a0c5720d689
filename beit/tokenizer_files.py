"""Visual tokenizers on disk: folders of ours, OpenAI's pickled dVAE, a VQ-KD file of the authors'.

A saved tokenizer is a folder, as a model's is: `config.json` with a `model_type` of its own and the sizes,
and `model.safetensors`; for a VQ-KD also the pictures that its tokens are drawn by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from beit.atomic import not_there, write_together
from beit.hub import resolve
from beit.layouts import count_blocks, layout_of
from beit.tokenizer import DalleConfig, DalleTokenizer, DiscreteVAE, DiscreteVAEConfig
from beit.unpickle import RefusedFile
from beit.vqkd import VQKD, VQKDConfig
from beit.weight_files import (
    CheckpointError,
    check_same,
    file_tensors,
    folder_tensors,
    json_bytes,
    read_config_json,
    read_json,
    read_safetensors,
    some_names,
)

AnyTokenizer = DiscreteVAE | DalleTokenizer | VQKD
# From the sizes in config.json and the tensors' names.
TOKENIZERS: dict[str, Callable[[dict[str, Any], Iterable[str]], AnyTokenizer]] = {
    "beit-discrete-vae": lambda sizes, _: DiscreteVAE(DiscreteVAEConfig(**sizes)),
    "beit-dalle-dvae": lambda sizes, names: DalleTokenizer(
        DalleConfig(**sizes), with_decoder=any(name.startswith("decoder.") for name in names)
    ),
    "beit-vqkd": lambda sizes, _: VQKD(VQKDConfig(**sizes)),
}
COUNTS = ("num_layers", "n_blk_per_group", "encoder_depth", "decoder_depth")
MODEL_TYPES = {DiscreteVAE: "beit-discrete-vae", DalleTokenizer: "beit-dalle-dvae", VQKD: "beit-vqkd"}
MEAN_PATCHES = "mean_patches.safetensors"  # what a VQ-KD's tokens look like, where that was counted


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
    contents = {"model.safetensors": to_safetensors(tensors, metadata={"format": "pt"})}
    if isinstance(tokenizer, VQKD) and tokenizer.mean_patches is not None:
        drawn = {"mean_patches": tokenizer.mean_patches.cpu().contiguous()}
        contents[MEAN_PATCHES] = to_safetensors(drawn)
    write_together(folder, {**contents, "config.json": json_bytes(config)})


def is_tokenizer(path: Path) -> bool:
    """Whether a folder or a file is a visual tokenizer and no encoder."""
    if path.is_dir():
        file = path / "config.json"
        return file.is_file() and read_json(file).get("model_type") in list(TOKENIZERS)
    return path.exists() and layout_of(file_tensors(path)[1]) in ("dalle", "vqkd")


def load_tokenizer(source: str | Path, num_heads: int | None = None) -> AnyTokenizer:
    """Read a visual tokenizer, in evaluation mode.

    source: a folder of ours; OpenAI's encoder.pkl, which takes the decoder.pkl beside it along; a
    VQ-KD .pth. num_heads: of a VQ-KD file whose heads are not 64 wide. Raises CheckpointError.
    """
    path = resolve(str(source))
    try:
        return _tokenizer_folder(path) if path.is_dir() else _tokenizer_file(path, num_heads)
    except (CheckpointError, RefusedFile):
        raise
    except Exception as error:  # a wrong number shows as almost anything
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} does not describe a tokenizer: {reason}") from error


def _tokenizer_folder(path: Path) -> AnyTokenizer:
    content = read_config_json(path)
    kind = content.get("model_type")
    if kind not in list(TOKENIZERS):
        raise CheckpointError(
            f"{path} holds a {str(kind)[:80]!r}, not a visual tokenizer; train one with "
            "`beit train-tokenizer DATA -o RUN`"
        )
    tensors, sizes = folder_tensors(path), content["sizes"]
    if any(sizes.get(name, 0) > len(tensors) for name in COUNTS):
        raise ValueError(f"its config.json says more layers than its {len(tensors)} tensors make")
    tokenizer = _fill_tokenizer(path, lambda: TOKENIZERS[kind](sizes, tensors.keys()), tensors)
    if isinstance(tokenizer, VQKD) and (path / MEAN_PATCHES).is_file():
        drawn = read_safetensors(path / MEAN_PATCHES)
        shape = torch.Size((tokenizer.vocab_size, 3, tokenizer.stride, tokenizer.stride))
        check_same(path / MEAN_PATCHES, {"mean_patches": shape}, drawn, "VQKD")
        tokenizer.mean_patches = drawn["mean_patches"]
    return tokenizer


def _tokenizer_file(path: Path, num_heads: int | None) -> AnyTokenizer:
    if not path.exists():
        raise CheckpointError(not_there(path))
    tensors = file_tensors(path)[1]
    layout = layout_of(tensors)
    if layout == "dalle":
        return _dalle(path, tensors)
    if layout == "vqkd":
        dropped = ("loss", "teacher", "scaling")
        tensors = {name: t for name, t in tensors.items() if not name.startswith(dropped)}
        config = read_vqkd_config(tensors, num_heads)
        return _fill_tokenizer(path, lambda: VQKD(config), tensors)
    raise CheckpointError(
        f"{path} is not a visual tokenizer; its first tensors are {some_names(list(tensors))}"
    )


def _dalle(path: Path, tensors: dict[str, Tensor]) -> AnyTokenizer:
    """OpenAI's dVAE from its encoder's file, the decoder's beside it."""
    if "blocks.input.w" in tensors:  # one half, as OpenAI pickled it
        if tensors["blocks.input.w"].shape[1] != 3:
            raise CheckpointError(f"{path} is the decoder; give the encoder, and it takes this along")
        other = path.with_name(path.name.replace("encoder", "decoder"))
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
        if other != path and other.exists():
            drawn = file_tensors(other)[1]
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
    with_decoder = start is not None
    return _fill_tokenizer(path, lambda: DalleTokenizer(config, with_decoder), tensors)


def read_vqkd_config(tensors: dict[str, Tensor], num_heads: int | None = None) -> VQKDConfig:
    """A VQKDConfig from the published names' shapes; heads are 64 wide where num_heads is not given."""
    kernel, codes = tensors["encoder.patch_embed.proj.weight"], tensors["quantize.embedding.weight"]
    grid, width = math.isqrt(tensors["encoder.pos_embed"].shape[1] - 1), kernel.shape[0]
    if num_heads is None and width % 64:
        raise ValueError(
            f"it does not say its heads, and width {width} is no multiple of 64; give num_heads, or "
            "convert it first: beit convert FILE FOLDER --num-heads N"
        )
    return VQKDConfig(
        img_size=grid * kernel.shape[-1],
        patch_size=kernel.shape[-1],
        embed_dim=width,
        encoder_depth=count_blocks(tensors, "encoder.blocks"),
        decoder_depth=count_blocks(tensors, "decoder.blocks"),
        num_heads=num_heads or width // 64,
        vocab_size=codes.shape[0],
        code_dim=codes.shape[1],
        teacher_dim=tensors["decode_task_layer.2.weight"].shape[0],
    )


def _fill_tokenizer(
    path: Path, build: Callable[[], AnyTokenizer], tensors: dict[str, Tensor]
) -> AnyTokenizer:
    with torch.device("meta"):  # nothing is allocated before the file has shown its sizes
        like = build()
    wanted = {name: tensor.shape for name, tensor in like.state_dict().items()}
    check_same(path, wanted, tensors, type(like).__name__)
    tokenizer = build()
    tokenizer.load_state_dict(tensors)
    return tokenizer.eval()
