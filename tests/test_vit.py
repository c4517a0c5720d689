"""A plain ViT, by the names of timm, DINO and transformers: read, and answering as transformers does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit.checkpoints import load, save
from beit.image import IMAGENET_MEAN
from beit.model import Beit, BeitForImageClassification
from beit.weight_files import CheckpointError

Tensors = dict[str, Tensor]
transformers = pytest.importorskip("transformers", minversion="5.0")
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32,
         "patch_size": 8}  # fmt: skip
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def theirs(kind: str, **settings: Any) -> Any:
    """One of transformers' models, random, its key biases too."""
    config = transformers.Dinov2Config if kind.startswith("Dino") else transformers.ViTConfig
    settings = SIZES | ({} if kind.startswith("Dino") else {"intermediate_size": 96}) | settings
    return randomise(getattr(transformers, kind)(config(**settings)))


@torch.no_grad()
def expected(model: Any) -> Tensor:
    """Logits of a classifier, all tokens behind the last norm of an encoder."""
    output = model(IMAGES)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@torch.no_grad()
def answers(model: Beit) -> Tensor:
    if isinstance(model, BeitForImageClassification):
        return model(IMAGES)
    (states,) = model.layers(IMAGES, [model.config.depth])
    return model.norm(states)


def same(model: Beit, other: Any) -> None:
    torch.testing.assert_close(answers(model), expected(other), atol=1e-5, rtol=1e-5)


def original_names(model: Any, folder: Path) -> Tensors:
    """A model of transformers under the names that timm and facebook's DINO and DINOv2 publish."""
    model.save_pretrained(folder)
    held = {k.removeprefix("vit."): v for k, v in load_file(folder / "model.safetensors").items()}
    tensors: Tensors = {}
    rules = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer": "blocks",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm.": "norm.",
        "classifier": "head",
    }
    for name, tensor in held.items():
        if name.startswith("pooler."):
            continue
        for old, new in rules.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    for block in range(SIZES["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [
                tensors.pop(f"blocks.{block}.attention.attention.{part}.{kind}")
                for part in ("query", "key", "value")
            ]
            tensors[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    if not any("ls1" in name for name in tensors):
        tensors.pop("mask_token", None)
    return tensors


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_a_folder_of_transformers_answers_alike(kind: str, tmp_path: Path) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    same(loaded, model)
    assert loaded.config.rel_pos_bias == "none"
    assert not loaded.load_report.new
    reasons = {reason for name, reason in loaded.load_report.ignored.items() if "key" in name}
    assert reasons == {"adds the same to all logits of a query"}


@pytest.mark.parametrize("names", ["on disk", "of modules"])
def test_a_weight_file_of_transformers_alone_is_enough(names: str, tmp_path: Path) -> None:
    model = theirs("ViTModel")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if names == "of modules":
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "alone.safetensors")
    same(load(tmp_path / "alone.safetensors", num_heads=3), model)


def test_timms_file_is_a_classifier_with_half_as_mean(tmp_path: Path) -> None:
    model = theirs("ViTForImageClassification", num_labels=5, layer_norm_eps=1e-6)
    torch.save(original_names(model, tmp_path), tmp_path / "vit.pth")
    loaded = load(tmp_path / "vit.pth", num_heads=3)
    same(loaded, model)
    assert loaded.config.pooling == "cls"
    assert loaded.image_spec.mean[0] == 0.5


@pytest.mark.parametrize("wrapped", [False, True])
def test_dinos_file_is_an_encoder_with_imagenets_mean(wrapped: bool, tmp_path: Path) -> None:
    model = theirs("ViTModel", layer_norm_eps=1e-6)
    tensors = original_names(model, tmp_path)
    torch.save({"model": tensors} if wrapped else tensors, tmp_path / "dino.pth")
    loaded = load(tmp_path / "dino.pth", num_heads=3)
    assert type(loaded) is Beit
    same(loaded, model)
    assert loaded.image_spec.mean == IMAGENET_MEAN


def test_dinov2s_file_with_layer_scale_and_mask_token(tmp_path: Path) -> None:
    model = theirs("Dinov2Model")
    torch.save(original_names(model, tmp_path), tmp_path / "dinov2.pth")
    loaded = load(tmp_path / "dinov2.pth", num_heads=3)
    same(loaded, model)
    assert loaded.image_spec.mean == IMAGENET_MEAN


def test_what_was_read_is_saved_as_ours_and_read_again(tmp_path: Path) -> None:
    model = theirs("ViTForImageClassification")
    model.save_pretrained(tmp_path / "theirs")
    save(load(tmp_path / "theirs"), tmp_path / "ours")
    same(load(tmp_path / "ours"), model)


def test_a_masked_model_of_pixels_is_refused(tmp_path: Path) -> None:
    theirs("ViTForMaskedImageModeling", encoder_stride=8).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a ViTForMaskedImageModeling"):
        load(tmp_path)


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.zeros(shape)}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (added("register_tokens", 1, 4, 24), "register tokens"),
        (added("dist_token", 1, 1, 24), "a distillation token"),
        (added("norm_pre.weight", 24), "a norm before its first block, as CLIP has it"),
        (added("blocks.0.attn.q_norm.weight", 8), "norms of queries and keys"),
        (added("blocks.0.mlp.w12.weight", 96, 24), "a gated MLP (SwiGLU)"),
        (added("rope.freqs", 8), "rotary positions"),
        (without("cls_token"), "no class token"),
        (without("pos_embed"), "no absolute positions"),
        (
            lambda tensors: {**tensors, "pos_embed": tensors["pos_embed"][:, 1:]},
            "no position for its class token",
        ),
    ],
)
def test_a_vit_that_computes_something_else_is_refused_by_name_with_a_way_on(
    change: Callable[[Tensors], Tensors], what: str, tmp_path: Path
) -> None:
    torch.save(change(original_names(theirs("ViTModel"), tmp_path)), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=re.escape(f"a ViT with {what}")) as caught:
        load(tmp_path / "other.pth", num_heads=3)
    assert "--teacher export it as a .pt2" in str(caught.value)
    assert caught.value.exit_code == 5
