"""What moves the weights: parameter groups, layer-wise decay, the schedule.

Groups are those of the published code: no weight decay for vectors, biases, positions and the class
token (the mask token and the bias tables do decay); with layer-wise decay, one pair of groups a layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

NO_DECAY = ("pos_embed", "cls_token")


def layer_id(name: str, depth: int) -> int:
    """The layer a parameter belongs to: 0 embeddings, i + 1 block i, depth + 1 all that follows."""
    if name.startswith("patch_embed.") or name in ("cls_token", "mask_token", "pos_embed"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_scale(layer: int, depth: int, layer_decay: float) -> float:
    """What a layer's learning rate is multiplied by: layer_decay ^ (depth + 1 - layer)."""
    return float(layer_decay ** (depth + 1 - layer))


def has_weight_decay(name: str, parameter: torch.Tensor) -> bool:
    """Vectors, biases, positions and the class token are left alone."""
    return not (parameter.ndim == 1 or name.endswith(".bias") or name in NO_DECAY)


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None, depth: int = 0
) -> list[dict[str, Any]]:
    """AdamW groups of a model; each has `lr_scale`, and `names` to read them by.

    layer_decay: None for one rate for all (pre-training); 0.65 base and 0.75 large in the paper's
    fine-tuning, with the encoder's `depth`.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = has_weight_decay(name, parameter)
        layer = layer_id(name, depth) if layer_decay is not None else 0
        scale = layer_scale(layer, depth, layer_decay) if layer_decay is not None else 1.0
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "names": [],
                "lr_scale": scale,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(
    groups: list[dict[str, Any]] | list[nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW in one fused pass over each tensor; eps 1e-8. Groups may name their own weight decay."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def cosine_schedule(
    step: int, total_steps: int, warmup_steps: int, base: float, final: float, start: float = 0.0
) -> float:
    """The rate at a step: a line from `start` to `base`, reached with the last warm-up step, then half
    a cosine towards `final`, which is never quite reached."""
    if step < warmup_steps:
        return start + (base - start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the schedule's rate times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
