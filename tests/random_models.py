"""Small models with random weights, one of each kind, and what compares them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit.model import Beit, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

GOLDEN = Path(__file__).parent / "golden"
TABLE = "relative_position_bias_table"
SMALL = BeitConfig(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=4)
SHARED = SMALL.for_pretraining(vocab_size=40)
V2 = replace(SHARED, early_layer=2)
PLAIN = replace(SMALL, rel_pos_bias="none", use_abs_pos_emb=True, init_values=0.0, pooling="cls")
MODELS: dict[str, tuple[type[Beit], BeitConfig]] = {
    "classifier": (BeitForImageClassification, SMALL),
    "classifier of several labels": (BeitForImageClassification, replace(SMALL, several_labels=True)),
    "classifier without classes": (BeitForImageClassification, replace(SMALL, num_classes=0)),
    "classifier from the class token": (BeitForImageClassification, replace(SMALL, pooling="cls")),
    "class token without classes": (
        BeitForImageClassification,
        replace(SMALL, pooling="cls", num_classes=0),
    ),
    "plain classifier": (BeitForImageClassification, PLAIN),
    "shared-bias classifier": (BeitForImageClassification, replace(SMALL, rel_pos_bias="shared")),
    "masked model": (BeitForMaskedImageModeling, SHARED),
    "plain masked model": (BeitForMaskedImageModeling, PLAIN.for_pretraining(40)),
    "v2 masked model": (BeitForMaskedImageModeling, V2),
    "encoder": (Beit, replace(SMALL, num_classes=0)),
    "encoder of a masked model": (Beit, SHARED),
    "rectangle": (BeitForImageClassification, replace(SMALL, img_size=(32, 48))),
    "plain rectangle": (BeitForImageClassification, replace(PLAIN, img_size=(32, 48))),
    "thin": (BeitForImageClassification, replace(SMALL, mlp_ratio=2.5, layer_norm_eps=1e-12)),
}
NAMES = {0: "Katze", 1: "dog, big", 2: '猫 "x"', 3: "4"}


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Every parameter anew, none at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(name: str) -> Any:
    kind, config = MODELS[name]
    model = randomise(kind(config))
    if config.num_classes == 4 and kind is BeitForImageClassification:
        model.id2label = dict(NAMES)
    return model


def pictures(config: BeitConfig, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, *config.image_height_width, generator=generator)


def same_tensors(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
