"""VQ-KD, the tokenizer of BEiT v2: a ViT whose patches are quantised to what a teacher would say of them.

Unlike a dVAE it is not trained to give the picture back but the teacher's features (CLIP's, DINO's), so
its tokens name things, not colours. What they look like, the mean of the patches that took each, is
counted afterwards; without it there is nothing to draw. Parameter names are the published ones. The
codebook is a moving average, begun by k-means on the first batch, of what all ranks give it.

A teacher is any function of pictures (B, 3, H, W) in [0, 1] to features (B, L, T), one row a token.

Shapes: B batch, (h, w) token grid = patch grid, L = h*w, V codes of width K, D width, T width of the
teacher, p pixels of a patch each way.

Peng et al.: BEiT v2, arXiv 2208.06366.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.model import BeitConfig, BeitForImageClassification
from beit.tokenizer import check_view, nearest_codes, pick_directions, revive_codes, update_codes

KMEANS_ITERATIONS = 10


@dataclass(frozen=True)
class VQKDConfig:
    """Sizes of the tokenizer; the defaults are those of the released CLIP ones, decoder depth 3."""

    img_size: int = 224  # pixels of the token view
    patch_size: int = 16
    embed_dim: int = 768
    encoder_depth: int = 12
    decoder_depth: int = 3
    num_heads: int = 12
    vocab_size: int = 8192
    code_dim: int = 32
    teacher_dim: int = 512  # 512 CLIP, 768 DINO
    layer_norm_eps: float = 1e-6
    codebook_decay: float = 0.99  # of the moving average that is the codebook
    revive_after_steps: int = 0  # ours: a code unused this long takes a fresh place; 0 never


class EmbeddingEMA(nn.Module):
    """The codebook, unit vectors; nothing reads `cluster_size` and `embed_avg` of the published file."""

    initted: Tensor

    def __init__(self, vocab_size: int, code_dim: int) -> None:
        super().__init__()
        weight = F.normalize(torch.randn(vocab_size, code_dim), dim=-1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(vocab_size), requires_grad=False)
        self.embed_avg = nn.Parameter(weight.clone(), requires_grad=False)
        self.register_buffer("initted", torch.zeros(1))


class Quantised(NamedTuple):
    """What became of the encoder's outputs (..., K)."""

    codes: Tensor  # (..., K), whose gradient goes straight through to the encoder
    token_ids: Tensor  # (...)
    directions: Tensor  # (..., K) the unit vectors that took them, for `update`
    commitment: Tensor  # scalar: mean squared error to the code, over all elements


class NormEMAVectorQuantizer(nn.Module):
    """Nearest code on the unit sphere. In training mode each step moves the codebook, as a batch norm
    moves its statistics; in float32 also under autocast."""

    cluster_size: Tensor
    unused_steps: Tensor

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.decay, self.revive_after_steps = config.codebook_decay, config.revive_after_steps
        self.embedding = EmbeddingEMA(config.vocab_size, config.code_dim)
        self.register_buffer("cluster_size", torch.zeros(config.vocab_size))  # average use a step
        if self.revive_after_steps:  # a published file has no such buffer
            self.register_buffer("unused_steps", torch.zeros(config.vocab_size, dtype=torch.int64))

    def forward(self, z: Tensor, moves_codebook: bool = True) -> Quantised:
        """(..., K) -> what became of them, by the codes before the step moves them."""
        directions = F.normalize(z.float(), dim=-1)
        taken = directions.detach()
        if self.training and moves_codebook and not self.embedding.initted:
            self.begin(taken)
        token_ids = nearest_codes(self.embedding.weight, taken)
        codes = self.embedding.weight[token_ids]
        if self.training and moves_codebook:
            self.update(taken, token_ids)
        commitment = F.mse_loss(directions, codes)
        return Quantised(directions + (codes - directions).detach(), token_ids, taken, commitment)

    @torch.no_grad()
    def begin(self, directions: Tensor) -> None:
        """Make the codebook by k-means of unit vectors (..., K), by cosine, over all ranks."""
        directions, codes = directions.flatten(0, -2), self.embedding.weight
        codes.copy_(pick_directions(directions, len(codes)))
        for _ in range(KMEANS_ITERATIONS):
            counts = update_codes(codes, directions, nearest_codes(codes, directions), decay=0)
        self.embedding.cluster_size.copy_(counts)
        self.embedding.initted.fill_(1)

    @torch.no_grad()
    def update(self, directions: Tensor, token_ids: Tensor) -> None:
        """Move used codes towards what took them; directions (..., K), token_ids (...)."""
        directions, token_ids = directions.flatten(0, -2), token_ids.flatten()
        codes = self.embedding.weight
        counts = update_codes(codes, directions, token_ids, self.decay)
        self.count(counts)
        if self.revive_after_steps:
            revive_codes(codes, self.unused_steps, counts, directions, self.revive_after_steps)

    @torch.no_grad()
    def count(self, counts: Tensor) -> None:
        """Take a step's counts (V,) into the average use of each code."""
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - self.decay)


class VQKDOutput(NamedTuple):
    """A training step's view of a batch."""

    loss: Tensor  # scalar: commitment and `error`
    error: Tensor  # scalar: 1 - cosine of what was said to what the teacher says, mean over tokens
    token_ids: Tensor  # (B, h, w)
    directions: Tensor  # (B, L, K) what took the tokens, for `update_codebook`


class VQKD(nn.Module):
    """Pictures to the tokens BEiT v2 predicts: one a patch."""

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.config = config
        self.mean_patches: Tensor | None = None  # uint8 (V, 3, p, p), to draw by; no part of the weights
        on_pictures = BeitConfig(  # a plain ViT
            img_size=config.img_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.encoder_depth,
            num_heads=config.num_heads,
            init_values=0.0,
            rel_pos_bias="none",
            use_abs_pos_emb=True,
            layer_norm_eps=config.layer_norm_eps,
            num_classes=0,
        )
        on_codes = replace(
            on_pictures,
            img_size=config.img_size // config.patch_size,
            patch_size=1,
            in_chans=config.code_dim,
            depth=config.decoder_depth,
        )
        width = config.embed_dim
        self.encoder = BeitForImageClassification(on_pictures)
        self.decoder = BeitForImageClassification(on_codes)
        self.quantize = NormEMAVectorQuantizer(config)
        self.encode_task_layer = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.code_dim)
        )
        self.decode_task_layer = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.teacher_dim)
        )
        for layer in (*self.encode_task_layer, *self.decode_task_layer):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def stride(self) -> int:
        return self.config.patch_size

    @property
    def view_size(self) -> tuple[int, int]:
        return self.config.img_size, self.config.img_size

    @property
    def can_draw(self) -> bool:
        return self.mean_patches is not None

    def forward(self, images: Tensor, target: Tensor, moves_codebook: bool = True) -> VQKDOutput:
        """Encode, quantise, decode, compare.

        images: (B, 3, H, W) in [0, 1]. target: (B, L, T), the teacher's features of them.
        moves_codebook: in training, by this batch, and begins it. Without it the caller gives
        `begin_codebook` all parts of the first step, and `update_codebook` what those of each step took.
        """
        check_view(images, self.stride)
        codes, token_ids, directions, commitment = self.quantize(self.project(images), moves_codebook)
        grid = self.encoder.grid_of(images)
        said = self.say(codes.unflatten(1, grid))
        error = (1 - F.cosine_similarity(said.float(), target.float(), dim=-1)).mean()
        return VQKDOutput(commitment + error, error, token_ids.unflatten(1, grid), directions)

    @torch.no_grad()
    def begin_codebook(self, batches: Iterable[Tensor]) -> None:
        """Unless that was done, make the codebook of pictures, (B, 3, H, W) in [0, 1] at a time."""
        if not self.quantize.embedding.initted:
            directions = [F.normalize(self.project(images), dim=-1) for images in batches]
            self.quantize.begin(torch.cat(directions))

    def update_codebook(self, directions: Tensor, token_ids: Tensor) -> None:
        """Move used codes towards what took them; directions (..., K), token_ids (...)."""
        self.quantize.update(directions, token_ids)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids (B, h, w) of pictures (B, 3, H, W) in [0, 1]."""
        check_view(images, self.stride)
        directions = F.normalize(self.project(images), dim=-1)
        token_ids = nearest_codes(self.quantize.embedding.weight, directions)
        return token_ids.unflatten(1, self.encoder.grid_of(images))

    def project(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] -> what is quantised, (B, L, K) float32, also under autocast."""
        tokens = patch_tokens(self.encoder, 2 * images - 1)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.encode_task_layer(tokens.float())

    def say(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w, K) -> what the teacher would say of each patch, (B, L, T)."""
        return self.decode_task_layer(patch_tokens(self.decoder, codes.permute(0, 3, 1, 2)))

    @torch.no_grad()
    def decode_features(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, h, w) -> what the teacher would say of each patch, (B, L, T)."""
        return self.say(self.quantize.embedding.weight[token_ids])

    def decode(self, token_ids: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of token ids (B, h, w): the mean patch of each token.

        Raises ValueError where nobody has counted them: these tokens stand for a teacher's features.
        """
        if self.mean_patches is None:
            raise ValueError(
                "a VQ-KD tokenizer without mean_patches cannot draw; decode_features gives what its "
                "tokens stand for"
            )
        patches = self.mean_patches.to(token_ids.device)[token_ids].float() / 255  # (B, h, w, 3, p, p)
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def patch_pixels(images: Tensor, patch_size: int) -> Tensor:
    """A teacher for those who have none: the pixels of each patch, (B, L, 3 * patch_size^2).

    images: (B, 3, H, W) in [0, 1]; 0.45 and 0.27 are the mean and the deviation of photographs, so that
    the cosine of two patches tells their colours as well as their edges.
    """
    return F.pixel_unshuffle((images.float() - 0.45) / 0.27, patch_size).flatten(2).transpose(1, 2)


def mean_patches(sums: Tensor, counts: Tensor) -> Tensor:
    """What tokens look like: the mean of the patches that took each, uint8 (V, 3, p, p).

    sums: (V, 3 * p^2) of pixels in [0, 1]; counts: (V,). A token that none took has the mean colour of all.
    """
    side = math.isqrt(sums.shape[1] // 3)
    means = (sums / counts.clamp(min=1)[:, None]).unflatten(1, (3, side, side))
    colour = sums.sum(dim=0).view(3, -1).mean(dim=1) / counts.sum().clamp(min=1)
    means = torch.where((counts > 0).view(-1, 1, 1, 1), means, colour.view(1, 3, 1, 1))
    return means.mul(255).round().byte()


def patch_tokens(vit: BeitForImageClassification, images: Tensor) -> Tensor:
    """The normed patch tokens (B, L, D), without pooling."""
    last = vit.layers(images, [vit.config.depth])[0]
    return vit.fc_norm(last[:, 1:])
