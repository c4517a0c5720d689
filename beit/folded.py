"""Blocks folded for answering on a processor: what can be known before a picture comes is in the weights.

LayerScale is multiplied into the layer before it. The value's bias leaves attention as it came, since a
row of attention sums to one, so it joins the projection's. In bf16 the weights are bf16; states between
blocks stay float32, as in bf16 logits were ten times as far from float32's (cosine 0.9997 for 0.99999).

Weights are kept in the order in which they are multiplied, by the operators that torch's own compiler
uses: MKL's for float32, which wants to know the rows, oneDNN's for bf16, which brings GELU along. Where
they are missing, or say something else than a plain product, the plain product it is.

Shapes: B, N, D, H as in `model`; rows are the B x N tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.model import Attention, Beit, Block, Mlp

FEW_TOKENS = 256  # of a picture: up to here bf16's narrow layers gain by another order too
Layer = Callable[[Tensor], Tensor]


def fold(model: Beit, precision: str) -> bool:
    """Replace a finished model's blocks by equal ones that answer faster, without gradients.

    precision: "fp32" or "bf16". The old blocks are spent. Returns whether weights are ordered for the
    rows of one picture, so that a batch is fastest picture by picture.
    """
    height, width = model.config.grid
    tokens = 1 + height * width
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            model.blocks[number] = FoldedBlock(block, precision, tokens)
    for parameter in model.parameters():  # or they would keep the whole file in memory that they lie in
        parameter.data = parameter.data.clone()
    return precision == "fp32" and is_right(by_mkl, torch.float32)


class FoldedBlock(nn.Module):
    """What `Block` computes in evaluation: (B, N, D) float32 -> (B, N, D) float32."""

    def __init__(self, block: Block, precision: str, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = FoldedAttention(block.attn, block.gamma_1, precision, tokens)
        self.mlp = FoldedMlp(block.mlp, block.gamma_2, precision, tokens)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class FoldedAttention(nn.Module):
    """`Attention` and its LayerScale: (B, N, D) -> (B, N, D)."""

    def __init__(self, attn: Attention, gamma: Tensor | None, precision: str, tokens: int) -> None:
        super().__init__()
        self.num_heads = attn.num_heads
        self.relative_position_bias_table = attn.relative_position_bias_table
        none = torch.zeros_like(attn.q_bias)
        qkv_bias = torch.cat([attn.q_bias, none, none])
        self.qkv = linear(attn.qkv.weight, qkv_bias, precision, tokens)
        bias = attn.proj.bias.double() + attn.proj.weight.double() @ attn.v_bias.double()
        self.proj = linear(*scaled(attn.proj.weight, bias, gamma), precision, tokens)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x.view(-1, width))
        q, k, v = qkv.view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, D/H)
        if bias is not None:
            bias = bias.to(q.dtype)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(heads.transpose(1, 2).reshape(-1, width)).view(x.shape)


class FoldedMlp(nn.Module):
    """`Mlp` and its LayerScale: (B, N, D) -> (B, N, D)."""

    def __init__(self, mlp: Mlp, gamma: Tensor | None, precision: str, tokens: int) -> None:
        super().__init__()
        self.fc1 = linear(mlp.fc1.weight, mlp.fc1.bias, precision, tokens, gelu=True)
        self.fc2 = linear(*scaled(mlp.fc2.weight, mlp.fc2.bias, gamma), precision, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.view(-1, x.shape[-1]))).view(x.shape)


def scaled(weight: Tensor, bias: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """The layer whose outputs are gamma times those of another."""
    if gamma is None:
        return weight, bias
    return weight.double() * gamma.double()[:, None], bias.double() * gamma.double()


# --- Products ------------------------------------------------------------------------------------


def linear(weight: Tensor, bias: Tensor, precision: str, tokens: int, gelu: bool = False) -> Layer:
    """(rows, K) -> (rows, M): a linear layer without gradients, with GELU after it where asked for."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weight, bias = weight.detach().to(dtype).contiguous(), bias.detach().to(dtype, copy=True)
    if precision == "bf16":
        is_wide = weight.shape[0] > weight.shape[1]
        if (is_wide or tokens <= FEW_TOKENS) and is_right(by_onednn, dtype):
            return by_onednn(weight, bias, tokens, gelu)
    elif is_right(by_mkl, dtype):
        return by_mkl(weight, bias, tokens, gelu)
    return plain(weight, bias, tokens, gelu)


def plain(weight: Tensor, bias: Tensor, tokens: int, gelu: bool) -> Layer:
    """The layer as everybody computes it."""

    def layer(rows: Tensor) -> Tensor:
        rows = F.linear(rows.to(weight.dtype), weight, bias)
        return F.gelu(rows) if gelu else rows

    return layer


def by_onednn(weight: Tensor, bias: Tensor, tokens: int, gelu: bool) -> Layer:
    """The layer in oneDNN's order, for any number of rows."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    after: tuple[Any, ...] = ("gelu", [], "none") if gelu else ("none", [], None)
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows.to(weight.dtype), packed, bias, *after)


def by_mkl(weight: Tensor, bias: Tensor, tokens: int, gelu: bool) -> Layer:
    """The layer in MKL's order for so many rows; any other number is filled up to a multiple."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, tokens)
    shape_alone = weight.new_zeros(1).expand(weight.shape)  # MKL multiplies what is packed

    def product(rows: Tensor) -> Tensor:
        rows = torch.ops.mkl._mkl_linear(rows, packed, shape_alone, bias, tokens)
        return torch.ops.aten.gelu_(rows) if gelu else rows

    def layer(rows: Tensor) -> Tensor:
        if len(rows) == tokens:
            return product(rows)
        full = F.pad(rows, (0, 0, 0, -len(rows) % tokens))
        return torch.cat([product(part) for part in full.split(tokens)])[: len(rows)]

    return layer


@cache
def is_right(kind: Callable[[Tensor, Tensor, int, bool], Layer], dtype: torch.dtype) -> bool:
    """Whether an operator that torch promises to nobody is there, and gives what a plain product gives."""
    noise = torch.Generator().manual_seed(0)
    weight, bias, rows = (
        torch.randn(shape, generator=noise).to(dtype) for shape in ((24, 16), (24,), (7, 16))
    )
    try:
        ours = kind(weight, bias, 5, True)(rows)
    except (AttributeError, RuntimeError, TypeError):
        return False
    theirs = plain(weight, bias, 5, True)(rows)
    few = 8 * torch.finfo(dtype).eps
    return torch.allclose(ours.float(), theirs.float(), rtol=few, atol=few)
