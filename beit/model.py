"""The BEiT encoder and its two heads: masked image modelling and classification.

A ViT, except that: positions come as a relative bias inside attention (one table for all blocks in
pre-training, one a block after it) instead of being added to the input; keys have no bias; each
residual branch is scaled by a learned vector (LayerScale); and a picture is classified from the mean
of its patches, not from the class token. Parameter names are those of the published checkpoints.

Shapes: B batch, L = h*w patches of a grid (h, w), N = 1 + L tokens (class token first), D width,
H heads, V visual vocabulary, C classes.

Bao, Dong, Wei: BEiT, arXiv 2106.08254; Peng et al.: BEiT v2, arXiv 2208.06366 (patch aggregation).
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from beit.image import ImageSpec, unilm_spec
from beit.relative_position import (
    Grid,
    RelativePositionBias,
    aligned,
    gather_bias,
    num_relative_distance,
    relative_position_index,
    resize_bias_table,
)

RelPosBias = Literal["per_block", "shared", "none"]
Pooling = Literal["mean", "cls"]
KEPT_GRIDS = 4  # whose gathered biases are kept for evaluation


@dataclass(frozen=True)
class BeitConfig:
    """Everything that decides the shapes and the arithmetic of a BEiT. Saved with the weights."""

    img_size: int | tuple[int, int] = 224  # pixels, (height, width) where they differ
    patch_size: int = 16  # pixels
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    init_values: float = 0.1  # LayerScale at the start; 0 builds no LayerScale
    rel_pos_bias: RelPosBias = "per_block"
    use_abs_pos_emb: bool = False
    use_mask_token: bool = False
    pooling: Pooling = "mean"
    layer_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0  # of the last block; rises linearly from 0
    num_classes: int = 1000  # 0 builds no classifier
    several_labels: bool = False  # a picture may show several classes: sigmoids, not one softmax
    vocab_size: int = 8192
    early_layer: int = 0  # v2: class token meets the patches of this block again; 0 turns it off
    head_layers: int = 2  # v2: the extra blocks in which it does

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if not isinstance(self.img_size, int):  # a list from JSON is a tuple here
            object.__setattr__(self, "img_size", tuple(self.img_size))
        for name, allowed in (("rel_pos_bias", RelPosBias), ("pooling", Pooling)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(allowed))}"
                )
        if self.depth < 1 or self.patch_size < 1:
            raise ValueError(f"depth {self.depth} and patch_size {self.patch_size} must be 1 or more")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path {self.drop_path_rate} is not from 0 to below 1; 0.1 is usual")
        if not 0 <= self.early_layer <= self.depth:
            raise ValueError(f"early_layer {self.early_layer} is not a block of depth {self.depth}")
        if self.early_layer and self.head_layers < 1:
            raise ValueError(f"head_layers {self.head_layers} must be 1 or more; 2 are usual")
        check_size(self.image_height_width, self.patch_size)

    @property
    def image_height_width(self) -> tuple[int, int]:
        """The image size in pixels, (height, width)."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid(self) -> Grid:
        """The patch grid (h, w)."""
        height, width = self.image_height_width
        return height // self.patch_size, width // self.patch_size

    def for_pretraining(self, vocab_size: int = 8192) -> BeitConfig:
        """The same encoder as it is pre-trained: shared bias, mask token, a head over V tokens."""
        shared: RelPosBias = "none" if self.rel_pos_bias == "none" else "shared"
        return replace(
            self, rel_pos_bias=shared, use_mask_token=True, vocab_size=vocab_size, num_classes=0
        )

    def for_classification(self, num_classes: int) -> BeitConfig:
        """The same encoder as it is fine-tuned: one bias table a block, no mask token, C classes."""
        per_block: RelPosBias = "none" if self.rel_pos_bias == "none" else "per_block"
        return replace(
            self,
            rel_pos_bias=per_block,
            use_mask_token=False,
            num_classes=num_classes,
            early_layer=0,
        )


def check_size(size: tuple[int, int], patch_size: int) -> None:
    """Refuse a (height, width) in pixels that is not a whole number of patches, naming the nearest."""
    for pixels in size:
        if pixels % patch_size or pixels <= 0:
            below = pixels // patch_size * patch_size
            nearest = f"{below} or {below + patch_size}" if below > 0 else f"{patch_size}"
            raise ValueError(
                f"img_size {pixels} is not a multiple of patch_size {patch_size}; use {nearest}"
            )


_BASE = BeitConfig()
_LARGE = BeitConfig(embed_dim=1024, depth=24, num_heads=16, init_values=1e-5)
_V2_BASE = replace(_BASE, early_layer=9)
_V2_LARGE = replace(_LARGE, early_layer=21)
# Plain ViT, the other BEiT of the paper: absolute positions, no bias, no LayerScale.
_PLAIN = replace(_BASE, rel_pos_bias="none", use_abs_pos_emb=True, init_values=0.0)
_PLAIN_LARGE = replace(_PLAIN, embed_dim=1024, depth=24, num_heads=16)
_TINY = BeitConfig(embed_dim=192, num_heads=3)
_SMALL = BeitConfig(embed_dim=384, num_heads=6)

# Published sizes under their published names (`_8k_vocab`: as pre-trained), then ours for own data.
VARIANTS: dict[str, BeitConfig] = {
    "beit_base_patch16_224": _BASE,
    "beit_base_patch16_384": replace(_BASE, img_size=384),
    "beit_base_patch16_512": replace(_BASE, img_size=512),
    "beit_large_patch16_224": _LARGE,
    "beit_large_patch16_384": replace(_LARGE, img_size=384),
    "beit_large_patch16_512": replace(_LARGE, img_size=512),
    "beit_base_patch16_224_in22k": replace(_BASE, num_classes=21841),
    "beit_large_patch16_224_in22k": replace(_LARGE, num_classes=21841),
    "beit_base_patch16_224_8k_vocab": _BASE.for_pretraining(),
    "beit_large_patch16_224_8k_vocab": _LARGE.for_pretraining(),
    "beit_base_patch16_224_pt1k": _PLAIN,
    "beit_base_patch16_224_pt1k_8k_vocab": _PLAIN.for_pretraining(),
    "beit_large_patch16_224_pt1k_8k_vocab": _PLAIN_LARGE.for_pretraining(),
    "beitv2_base_patch16_224": _BASE,
    "beitv2_large_patch16_224": _LARGE,
    "beitv2_base_patch16_224_in22k": replace(_BASE, num_classes=21841),
    "beitv2_large_patch16_224_in22k": replace(_LARGE, num_classes=21841),
    "beitv2_base_patch16_224_8k_vocab": _V2_BASE.for_pretraining(),
    "beitv2_large_patch16_224_8k_vocab": _V2_LARGE.for_pretraining(),
    "beit_small_patch16_224": _SMALL,
    "beit_tiny_patch16_224": _TINY,
    "beit_tiny_patch8_64": replace(_TINY, img_size=64, patch_size=8, depth=6),
    "beit_mini_patch8_32": BeitConfig(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4),
}


def variant(name: str, others: Iterable[str] = ()) -> BeitConfig:
    """The config of a named size, or a ValueError that names the nearest ones.

    others: what else could have been given, where sizes are not all.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    near = difflib.get_close_matches(name, [*VARIANTS, *others], n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"model {name!r} is not known; {hint}`beit models` lists models and sizes")


# M tokens of a batch: the number of the picture and of the token in it, int64 (M,) each.
Tokens = tuple[Tensor, Tensor]


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each to width D: (B, 3, H, W) -> (B, L, D), row by row."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with a bias for each pair of tokens. Keys have no bias of their own."""

    relative_position_bias_table: nn.Parameter | None

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.relative_position_bias_table = None
        if config.rel_pos_bias == "per_block":
            rows = num_relative_distance(config.grid)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, config.num_heads))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None, at: Tokens | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        q, k, v = qkv.view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, D/H)
        if bias is not None:
            bias = bias.to(q.dtype)
        if bias is not None and bias.requires_grad and bias.device.type == "cpu":
            # A bias that learns keeps torch off its fused kernel: in bf16 2.7 times the time of this.
            x = ((q * q.shape[-1] ** -0.5) @ k.mT + bias).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x.transpose(1, 2)  # (B, N, H, D/H)
        return self.proj(x.reshape(batch, tokens, width) if at is None else x[at].flatten(1))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth: (B, N, D) -> (B, N, D).

    at: tokens whose states alone are wanted, (B, N, D) -> (M, D). They look at all others still.
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, config: BeitConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.gamma_1 = self.gamma_2 = None
        if config.init_values > 0:
            self.gamma_1 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))
            self.gamma_2 = nn.Parameter(torch.full((config.embed_dim,), config.init_values))

    def forward(self, x: Tensor, bias: Tensor | None, at: Tokens | None = None) -> Tensor:
        batch = x.shape[0]
        seen = self.attn(self.norm1(x), bias, at)
        x = x if at is None else x[at]
        x = x + self.drop_path(_scaled(seen, self.gamma_1), batch, at)
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma_2), batch, at)

    def drop_path(self, x: Tensor, batch: int | None = None, at: Tokens | None = None) -> Tensor:
        """Stochastic depth: in training, leave a branch out for some samples and scale up the rest."""
        if not self.training or self.drop_path_rate == 0.0:
            return x
        keep = 1.0 - self.drop_path_rate
        kept = torch.floor(keep + torch.rand(batch or x.shape[0], 1, 1, device=x.device))
        kept = kept if at is None else kept[at[0], 0]
        return x * (kept.to(x.dtype) / keep)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else branch * gamma


class Beit(nn.Module):
    """The encoder. Images of any size that is a whole number of patches, rectangles too.

    The bias for a grid other than the config's is resized on the fly (geometric, cubic).
    Set `gradient_checkpointing` to trade time for memory in training.

    image_spec: how its pictures were prepared; id2label: its classes, empty where it has none. Both
    are saved with the weights. load_report, provenance: of a loaded one, where it came from.
    """

    image_spec: ImageSpec
    id2label: dict[int, str]
    load_report: Any  # a handover.LoadReport where the weights came from a file, else None
    provenance: dict[str, Any]
    cls_token: nn.Parameter
    mask_token: nn.Parameter | None
    pos_embed: nn.Parameter | None
    rel_pos_bias: RelativePositionBias | None
    relative_position_index: Tensor
    norm: nn.LayerNorm | nn.Identity

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        self.image_spec = replace(
            unilm_spec(max(config.image_height_width)), size=config.image_height_width
        )
        self.id2label = {}
        self.load_report = None
        self.provenance = {}
        self.gradient_checkpointing = False
        width, grid = config.embed_dim, config.grid
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_mask_token else None
        self.pos_embed = None
        if config.use_abs_pos_emb:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        shared = config.rel_pos_bias == "shared"
        self.rel_pos_bias = RelativePositionBias(grid, config.num_heads) if shared else None
        # Recomputed, never stored: the published files carry it up to 24 times. Where only shapes are
        # wanted nothing is computed: arithmetic on "meta" is done in Python and loads torch's compiler.
        only_shapes = self.cls_token.is_meta
        h, w = grid if config.rel_pos_bias != "none" else (1, 1)
        shape = (1 + h * w, 1 + h * w)
        index = torch.empty(shape, dtype=torch.int64) if only_shapes else relative_position_index((h, w))
        self.register_buffer("relative_position_index", index, persistent=False)
        rates = _linspace(config.drop_path_rate, config.depth)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.build_head()
        if not only_shapes:
            self.init_weights()
        self._bias_cache: dict[Grid, tuple[Tensor, list[Tensor]]] = {}

    def build_head(self) -> None:
        """What follows the blocks; here the final norm. A head overrides this."""
        self.norm = nn.LayerNorm(self.config.embed_dim, eps=self.config.layer_norm_eps)

    def forward(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Encode images into tokens.

        images: (B, 3, H, W), normalised as the checkpoint says.
        bool_masked_pos: (B, L) or (B, h, w) bool, on any device; True patches are replaced by `mask_token`.
        Returns (B, 1 + L, D); token 0 is the class token.
        """
        return self.norm(self.layers(images, [self.config.depth], bool_masked_pos)[0])

    def layers(
        self,
        images: Tensor,
        indices: Sequence[int],
        bool_masked_pos: Tensor | None = None,
        at: Tokens | None = None,
    ) -> list[Tensor]:
        """The (B, 1 + L, D) states after chosen blocks, in the order asked for, without a norm.

        indices: 0 is the input of the first block, k the output of the k-th, `depth` the last;
        negative ones count from the end. Blocks after the largest are not run.
        at: tokens that are wanted of the last block, whose states are then (M, D).
        """
        depth = self.config.depth
        wanted = [index + depth + 1 if index < 0 else index for index in indices]
        for index, given in zip(wanted, indices, strict=True):
            if not 0 <= index <= depth:
                raise ValueError(f"layer {given} does not exist; this model has layers 0 to {depth}")
        grid = self.grid_of(images)
        x = self.embed(images, bool_masked_pos)
        states = {0: x}
        biases = self.relative_position_biases(grid)
        for number in range(1, max(wanted, default=0) + 1):
            bias = biases[number - 1] if biases else None
            x = self.run_block(self.blocks[number - 1], x, bias, at if number == depth else None)
            if number in wanted:
                states[number] = x
        return [states[index] for index in wanted]

    def embed(self, images: Tensor, bool_masked_pos: Tensor | None) -> Tensor:
        """Patches, some replaced by the mask token, behind the class token: (B, 1 + L, D)."""
        x = self.patch_embed(images)
        if bool_masked_pos is not None:
            masked = self.flat_mask(images, bool_masked_pos).to(x.device, non_blocking=True)
            assert self.mask_token is not None
            x = torch.where(masked.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.positions(self.grid_of(images))
        return x

    def flat_mask(self, images: Tensor, bool_masked_pos: Tensor) -> Tensor:
        """A mask as (B, L) bool, where it is; or a ValueError that says what fits."""
        if self.mask_token is None:
            raise ValueError(
                "this model has no mask token, so it cannot take bool_masked_pos; "
                "build it from config.for_pretraining()"
            )
        h, w = self.grid_of(images)
        allowed = (images.shape[0], h * w), (images.shape[0], h, w)
        if tuple(bool_masked_pos.shape) not in allowed or bool_masked_pos.dtype != torch.bool:
            raise ValueError(
                f"bool_masked_pos is {bool_masked_pos.dtype} {tuple(bool_masked_pos.shape)}; "
                f"these images need torch.bool {allowed[0]} or {allowed[1]}"
            )
        return bool_masked_pos.flatten(1)

    def run_block(
        self, block: nn.Module, x: Tensor, bias: Tensor | None, at: Tokens | None = None
    ) -> Tensor:
        """One block, its activations computed anew in the backward pass where that was asked for."""
        inputs = (x, bias) if at is None else (x, bias, at)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def grid_of(self, images: Tensor) -> Grid:
        """The patch grid (h, w) of a batch of images, or a ValueError that says what fits."""
        if images.ndim != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(
                f"images are {tuple(images.shape)}; expected (B, {self.config.in_chans}, height, width)"
            )
        height, width = images.shape[2:]
        check_size((height, width), self.config.patch_size)
        # `index` makes them constants of a compiled graph: tables and positions differ by grid.
        size = self.config.patch_size
        return operator.index(height // size), operator.index(width // size)

    def positions(self, grid: Grid) -> Tensor:
        """The absolute positions (1, 1 + L, D) for a grid, of a model that has them."""
        assert self.pos_embed is not None
        return resize_positions(self.pos_embed, self.config.grid, grid)

    def relative_position_biases(self, grid: Grid) -> list[Tensor]:
        """The (1, H, N, N) bias of every block for a grid; empty for a model without bias.

        In evaluation mode without gradients it is gathered once a grid and kept, until a table changes.
        """
        tables = self._bias_tables()
        idle = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if idle or capturing or not tables:
            return self._gather_biases(tables, grid)
        # The numbers themselves are compared: fused optimisers and `.data` raise no version, and a
        # dtype there and back may land on the old address. 0.4 MB for a base model, tens of µs.
        now = torch.stack(tables)
        kept = self._bias_cache.get(grid)
        same = kept is not None and (kept[0].dtype, kept[0].device) == (now.dtype, now.device)
        if kept is None or not same or not torch.equal(kept[0], now):
            if len(self._bias_cache) >= KEPT_GRIDS:
                self._bias_cache.pop(next(iter(self._bias_cache)))
            kept = self._bias_cache[grid] = (now, self._gather_biases(tables, grid, align=now.is_cuda))
        return kept[1]

    def _bias_tables(self) -> list[Tensor]:
        if self.rel_pos_bias is not None:
            return [self.rel_pos_bias.relative_position_bias_table]
        if self.config.rel_pos_bias == "none":
            return []
        return [block.attn.relative_position_bias_table for block in self.blocks]  # type: ignore[union-attr,misc]

    def _gather_biases(self, tables: list[Tensor], grid: Grid, align: bool = False) -> list[Tensor]:
        if not tables:
            return []
        native = grid == self.config.grid
        index = self.relative_position_index
        if not native:
            index = relative_position_index(grid).to(index.device)
        biases = [
            gather_bias(resize_bias_table(table, self.config.grid, grid), index).unsqueeze(0)
            for table in tables
        ]
        if align:
            biases = [aligned(bias) for bias in biases]
        return biases * self.config.depth if self.rel_pos_bias is not None else biases

    def train(self, mode: bool = True) -> Self:
        self._bias_cache = {}
        return super().train(mode)

    def init_weights(self) -> None:
        """Initialise every parameter (paper §2.5; the two published classes differ in three rows).

        what                           pre-training             classification
        Linear weights                 normal 0.02, cut ±0.02   normal 0.02
        cls, mask token, pos_embed     normal 0.02, cut ±0.02   normal 0.02
        patch_embed.proj               same, bias 0             torch's default
        Linear bias, q/v bias, tables  0                        0
        attn.proj, mlp.fc2 of block l  / sqrt(2 l)              / sqrt(2 l)
        head                                                    x 0.001

        LayerNorms start at 1 and 0 and LayerScale at `init_values`, as they are built. v2's extra
        blocks keep torch's default for Linear and are only rescaled, as published.
        """
        pretraining = not isinstance(self, BeitForImageClassification)
        std, cut = 0.02, 0.02 if pretraining else math.inf
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear) and not name.startswith("cls_pt_layers"):
                    _trunc_normal_(module.weight, std, cut)
                    if module.bias is not None:
                        module.bias.zero_()
            if pretraining:
                _trunc_normal_(self.patch_embed.proj.weight, std, cut)
                assert self.patch_embed.proj.bias is not None
                self.patch_embed.proj.bias.zero_()
            for token in (self.cls_token, self.mask_token, self.pos_embed):
                if token is not None:
                    _trunc_normal_(token, std, cut)
            extra = getattr(self, "cls_pt_layers", [])
            numbered = [*enumerate(self.blocks, 1), *enumerate(extra, self.config.early_layer + 1)]
            for number, block in numbered:
                block.attn.proj.weight /= math.sqrt(2 * number)
                block.mlp.fc2.weight /= math.sqrt(2 * number)
            if isinstance(self, BeitForImageClassification) and isinstance(self.head, nn.Linear):
                self.head.weight *= 0.001


class BeitForMaskedImageModeling(Beit):
    """BEiT as it is pre-trained: guess the visual tokens of the masked patches."""

    def build_head(self) -> None:
        config = self.config
        super().build_head()
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size)
        if config.early_layer:
            count = max(config.depth, config.early_layer + config.head_layers)
            rates = _linspace(config.drop_path_rate, count)[config.early_layer :]
            self.cls_pt_layers = nn.ModuleList(
                Block(config, rates[i]) for i in range(config.head_layers)
            )

    def forward(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Logits over the visual vocabulary.

        images: (B, 3, H, W), normalised. bool_masked_pos: (B, L) or (B, h, w) bool, True = masked.
        Returns (M, V), one row for each masked patch of the batch, image by image and row by row;
        without a mask (B, L, V), all patches.
        """
        if bool_masked_pos is None:
            return self.logits(super().forward(images))
        hidden = self._hidden(images, bool_masked_pos)
        (states,) = self.layers(images, [self.config.depth], bool_masked_pos, hidden)
        return self.lm_head(self.norm(states))

    def forward_aggregated(self, images: Tensor, bool_masked_pos: Tensor) -> tuple[Tensor, Tensor]:
        """v2's two sets of (M, V) logits: the usual ones, and those of the aggregated class token.

        The second set sees the patches as they were after block `early_layer` beside the last class
        token, so what `head_layers` blocks can still tell must have passed through that token.
        """
        config = self.config
        if not config.early_layer:
            raise ValueError("this model has no extra blocks; set early_layer (9 base, 21 large)")
        batch, hidden = images.shape[0], self._hidden(images, bool_masked_pos)
        pictures = torch.arange(batch, device=images.device)
        at = torch.cat([pictures, hidden[0]]), torch.cat([torch.zeros_like(pictures), hidden[1]])
        if config.early_layer == config.depth:  # its states are wanted whole
            early = self.layers(images, [config.depth], bool_masked_pos)[0]
            last = early[at]
        else:
            early, last = self.layers(images, [config.early_layer, config.depth], bool_masked_pos, at)
        biases = self.relative_position_biases(self.grid_of(images))
        x = torch.cat([last[:batch, None], early[:, 1:]], dim=1)
        *others, final = self.cls_pt_layers
        for block in others:
            x = self.run_block(block, x, biases[0] if biases else None)
        x = self.run_block(final, x, biases[0] if biases else None, hidden)
        return self.lm_head(self.norm(last[batch:])), self.lm_head(self.norm(x))

    def logits(self, tokens: Tensor) -> Tensor:
        """Normalised tokens (B, 1 + L, D) -> logits (B, L, V) of all patches."""
        return self.lm_head(tokens[:, 1:])

    def _hidden(self, images: Tensor, bool_masked_pos: Tensor) -> Tokens:
        """The masked patches: the loss sees no others, so the last block need not finish them."""
        pictures, patches = self.flat_mask(images, bool_masked_pos).nonzero(as_tuple=True)
        device = self.cls_token.device
        return pictures.to(device, non_blocking=True), (patches + 1).to(device, non_blocking=True)


class BeitForImageClassification(Beit):
    """BEiT as it is fine-tuned: classify from the mean of the patches, or from the class token."""

    head: nn.Linear | nn.Identity

    def build_head(self) -> None:
        config = self.config
        norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        if config.pooling == "mean":
            self.norm, self.fc_norm = nn.Identity(), norm
        else:
            self.norm = norm
        classes = config.num_classes
        self.head = nn.Linear(config.embed_dim, classes) if classes else nn.Identity()

    def forward(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Class logits (B, C) of normalised images (B, 3, H, W); (B, D) features if C is 0."""
        return self.head(self.pool(super().forward(images, bool_masked_pos)))

    def pool(self, tokens: Tensor) -> Tensor:
        """What the head gets: (B, 1 + L, D) -> (B, D)."""
        if self.config.pooling == "mean":
            return self.fc_norm(tokens[:, 1:].mean(dim=1))
        return tokens[:, 0]


def masked_of(values: Tensor, bool_masked_pos: Tensor) -> Tensor:
    """Values (B, L, ...) or (B, h, w, ...) at the masked patches: (M, ...), in the order of the logits.

    bool_masked_pos: (B, L) or (B, h, w), best on the CPU: how many patches it masks is known there, and
    would have to be waited for on a GPU.
    """
    places = bool_masked_pos.nonzero(as_tuple=True)
    return values[tuple(each.to(values.device, non_blocking=True) for each in places)]


def resize_positions(pos_embed: Tensor, source: Grid, target: Grid) -> Tensor:
    """Absolute positions (1, 1 + L, D) for another grid: bicubic, the class token's row kept."""
    if source == target:
        return pos_embed
    patches = pos_embed[:, 1:].unflatten(1, source).permute(0, 3, 1, 2)  # (1, D, h, w)
    patches = F.interpolate(patches, size=target, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def _linspace(rate: float, count: int) -> list[float]:
    """Stochastic depth rates: 0 for the first block, `rate` for the last."""
    return torch.linspace(0, rate, count, device="cpu").tolist()


def _trunc_normal_(tensor: Tensor, std: float, cut: float) -> None:
    """Fill with a normal of this std, cut at ±cut (not rescaled), in one pass through its inverse."""
    if cut == math.inf:
        tensor.normal_(0.0, std)
        return
    edge = math.erf(cut / std / math.sqrt(2))
    tensor.uniform_(-edge, edge).erfinv_().mul_(std * math.sqrt(2)).clamp_(-cut, cut)


def check_whole(model: Beit) -> None:
    """Raise ValueError for a model whose tensors are not those of its config, as an engine's, joined for
    speed, are not."""
    with torch.device("meta"):
        own = type(model)(model.config).state_dict().keys()
    if own != model.state_dict().keys():
        raise ValueError(
            "this model's tensors are not those of its config: an engine changes its own for speed; take "
            "the model of `beit.load`"
        )
