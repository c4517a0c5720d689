"""Features of pictures: the states of chosen layers, pooled.

BEiT's most useful features lie in its middle: layer 9 of 12 in the base model, 14 of 24 in the large.

Shapes: n pictures, D width; a feature is float32 (n, D), or (n, 2D) for `both`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from beit.model import Beit
from beit.precision import Precision, autocast

Pooling = Literal["mean", "cls", "both"]


def default_layer(depth: int) -> int:
    """The layer to probe where none is named: the paper's 9 of 12 and 14 of 24, else three quarters."""
    return {12: 9, 24: 14}.get(depth, max(1, round(0.75 * depth)))


def pool_tokens(tokens: Tensor, pooling: Pooling) -> Tensor:
    """(B, 1 + L, D) -> (B, D): the mean of the patches, the class token, or both side by side."""
    if pooling == "mean":
        return tokens[:, 1:].mean(dim=1)
    if pooling == "cls":
        return tokens[:, 0]
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)


@torch.no_grad()
def extract_features(
    model: Beit,
    batches: Iterable[Tensor],
    layers: list[int],
    pooling: Pooling = "mean",
    precision: Precision = "auto",
) -> dict[int, Tensor]:
    """Features of every batch of normalised images (B, 3, H, W), for all layers in one pass.

    Returns {layer: (n, D) float32 on the CPU}. The states are those of the blocks, without a norm.
    The model is put into evaluation mode.
    """
    model.eval()
    device = model.cls_token.device
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for images in batches:
        with autocast(precision, device):
            states = model.layers(images.to(device), layers)
        for layer, state in zip(layers, states, strict=True):
            found[layer].append(pool_tokens(state.float(), pooling).cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}
