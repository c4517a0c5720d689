"""A pre-training step against the method written down once more, plainly, in float64.

Loops over pictures, heads and patches; no fused attention, no shared code but the parameters' names.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from beit.commands.pretrain import MaskedLogits, masked_loss
from beit.model import BeitConfig, BeitForMaskedImageModeling

SIDE, PATCH, WIDTH, HEADS, VOCABULARY = 4, 4, 24, 3, 11
V1 = BeitConfig(
    img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=3, num_heads=HEADS, mlp_ratio=2,
    init_values=0.1,
).for_pretraining(VOCABULARY)  # fmt: skip
V2 = BeitConfig(
    img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=3, num_heads=HEADS, mlp_ratio=2,
    init_values=0.1, early_layer=2, head_layers=2,
).for_pretraining(VOCABULARY)  # fmt: skip

Parameters = dict[str, Tensor]


def norm(x: Tensor, p: Parameters, name: str, eps: float) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def place_in_table(i: int, j: int) -> int:
    """The row of the bias table for token i looking at token j; token 0 is the class token."""
    span = 2 * SIDE - 1
    if i == 0 and j == 0:
        return span**2 + 2
    if i == 0:
        return span**2
    if j == 0:
        return span**2 + 1
    (y, x), (v, u) = divmod(i - 1, SIDE), divmod(j - 1, SIDE)
    return (y - v + SIDE - 1) * span + (x - u + SIDE - 1)


def block(x: Tensor, p: Parameters, name: str, eps: float) -> Tensor:
    """One picture's tokens (N, D) through one block."""
    table = p["rel_pos_bias.relative_position_bias_table"]
    normed, size = norm(x, p, f"{name}.norm1", eps), WIDTH // HEADS
    bias = torch.cat(
        [p[f"{name}.attn.q_bias"], torch.zeros(WIDTH, dtype=x.dtype), p[f"{name}.attn.v_bias"]]
    )
    q, k, v = (normed @ p[f"{name}.attn.qkv.weight"].T + bias).split(WIDTH, dim=1)
    heads = []
    for h in range(HEADS):
        some = slice(h * size, (h + 1) * size)
        scores = q[:, some] @ k[:, some].T / math.sqrt(size)
        rows = [[table[place_in_table(i, j), h] for j in range(len(x))] for i in range(len(x))]
        scores = scores + torch.stack([torch.stack(row) for row in rows])
        weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        heads.append(weights @ v[:, some])
    attended = torch.cat(heads, dim=1) @ p[f"{name}.attn.proj.weight"].T + p[f"{name}.attn.proj.bias"]
    x = x + p[f"{name}.gamma_1"] * attended
    hidden = norm(x, p, f"{name}.norm2", eps) @ p[f"{name}.mlp.fc1.weight"].T + p[f"{name}.mlp.fc1.bias"]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + p[f"{name}.gamma_2"] * (
        hidden @ p[f"{name}.mlp.fc2.weight"].T + p[f"{name}.mlp.fc2.bias"]
    )


def plain_loss(
    p: Parameters, config: BeitConfig, images: Tensor, masks: Tensor, token_ids: Tensor
) -> Tensor:
    """Mean cross-entropy over the hidden patches of the batch; v2 adds the aggregated class token's."""
    losses = []
    for image, mask, tokens in zip(images, masks, token_ids, strict=True):
        x = [p["cls_token"][0, 0]]
        for y in range(SIDE):
            for u in range(SIDE):
                patch = image[:, y * PATCH : (y + 1) * PATCH, u * PATCH : (u + 1) * PATCH]
                seen = (p["patch_embed.proj.weight"] * patch).sum(dim=(1, 2, 3))
                seen = seen + p["patch_embed.proj.bias"]
                x.append(p["mask_token"][0, 0] if mask[y, u] else seen)
        states = [torch.stack(x)]
        for number in range(config.depth):
            states.append(block(states[-1], p, f"blocks.{number}", config.layer_norm_eps))
        ends = [states[-1]]
        if config.early_layer:
            end = torch.cat([states[-1][:1], states[config.early_layer][1:]])
            for number in range(config.head_layers):
                end = block(end, p, f"cls_pt_layers.{number}", config.layer_norm_eps)
            ends.append(end)
        for end in ends:
            logits = (
                norm(end, p, "norm", config.layer_norm_eps) @ p["lm_head.weight"].T + p["lm_head.bias"]
            )
            likely = logits - logits.exp().sum(dim=1, keepdim=True).log()
            for place in torch.nonzero(mask.flatten()).flatten().tolist():
                losses.append(-likely[1 + place, tokens.flatten()[place]])
    return torch.stack(losses).sum() / masks.sum()


@pytest.mark.parametrize("config", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_step_is_the_method_written_down(
    config: BeitConfig, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones
            parameter += 0.1 * torch.randn_like(parameter)
    images = torch.randn(3, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
    masks = torch.rand(3, SIDE, SIDE) < torch.tensor([0.2, 0.5, 0.8])[:, None, None]  # of unlike sizes
    token_ids = torch.randint(0, VOCABULARY, (3, SIDE, SIDE))
    parameters = dict(model.named_parameters())
    expected = plain_loss(parameters, config, images, masks, token_ids)
    wanted = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))

    model.to(dtype)
    logits = MaskedLogits(model)(images.to(dtype), masks)
    targets = token_ids[masks]
    # `masked_loss` computes in float32 as training does; in float64 the formula itself.
    loss = (
        torch.stack([masked_loss(each, targets) for each in logits])
        if dtype == torch.float32
        else torch.stack(
            [torch.nn.functional.cross_entropy(each, targets, reduction="sum") for each in logits]
        )
    ).sum() / masks.sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad.double(), wanted[name], atol=tolerance * max(scale, 1e-3), rtol=0, msg=name
        )
