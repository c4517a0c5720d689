"""What moves the weights: parameter groups, layer-wise decay, the schedule, the update, the average.

Groups are those of the published code: no weight decay for vectors, biases, positions and the class
token (the mask token and the bias tables do decay); with layer-wise decay, one pair of groups a layer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

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
    """Vectors, biases, positions and class tokens are left alone."""
    last = name.rpartition(".")[2]  # VQ-KD has an `encoder.cls_token`
    return not (parameter.ndim == 1 or last == "bias" or last in NO_DECAY)


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
    a cosine towards `final`, which is never quite reached. A single warm-up step has the rate `start`."""
    if step < warmup_steps:
        return start + (base - start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the schedule's rate times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


class GradState(NamedTuple):
    """What an update saw, still on the device."""

    norm: Tensor  # () of all gradients together, before clipping
    skipped: Tensor  # () float32: 1 where nothing moved, else 0


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip_grad_norm: float = 0.0) -> GradState:
    """Clip the gradients, step, and forget them; where loss or norm is not finite, nothing moves.

    Weights, moments and step counters then stay as they are, bit for bit. The device decides by itself:
    nobody waits for it. The optimiser must be fused, as `adamw` is.

    loss: () of the step, the same in all processes (`distributed.mean`).
    clip_grad_norm: the largest norm; 0 turns clipping off.
    """
    moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm([p.grad for p in moved])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
    if clip_grad_norm:
        clip_grads_with_norm_(moved, clip_grad_norm, norm)
    skipped = 1.0 - (norm.isfinite() & loss.detach().isfinite()).float()
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by torch's fused optimisers
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.zero_grad()
    return GradState(norm, skipped)


class EMA:
    """A running average of a model's weights, and of its other floating tensors.

    average = decay * average + (1 - decay) * weights after each update, beginning as the weights;
    0.9999 is usual. Up to that the decay rises, (1 + step) / (10 + step), or a short run would end as it
    began. `tensors` has the names of the state dict.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay {decay} is not between 0 and 1; 0.9999 is usual")
        self.decay = decay
        self.tensors = {name: tensor.clone() for name, tensor in _floating(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move a little towards the weights of now, after so many updates before."""
        now = _floating(model)
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.tensors.values()), [now[name] for name in self.tensors], 1 - decay
        )

    def copy_to(self, model: nn.Module) -> None:
        """Give the average to another model of the same shape; tensors that are not floating stay."""
        model.load_state_dict(self.tensors, strict=False)


def _floating(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
