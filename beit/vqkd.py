"""VQ-KD, the tokenizer of BEiT v2: a ViT whose patches are quantised to what a teacher would say of them.

Unlike a dVAE it is not trained to give the picture back but the teacher's features (CLIP's, DINO's), so
its tokens name things, not colours; it cannot draw. Reading and encoding are here, with the published
parameter names; its training is not yet.

Shapes: B batch, (h, w) token grid = patch grid, V codes of width K, D width, T width of the teacher.

Peng et al.: BEiT v2, arXiv 2208.06366.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.model import BeitConfig, BeitForImageClassification
from beit.tokenizer import check_view


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


class EmbeddingEMA(nn.Module):
    """The codebook, unit vectors, with the statistics of the moving average that makes it."""

    def __init__(self, vocab_size: int, code_dim: int) -> None:
        super().__init__()
        weight = F.normalize(torch.randn(vocab_size, code_dim), dim=-1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(vocab_size), requires_grad=False)
        self.embed_avg = nn.Parameter(weight.clone(), requires_grad=False)
        self.register_buffer("initted", torch.zeros(1))


class NormEMAVectorQuantizer(nn.Module):
    """Nearest code on the unit sphere: (..., K) -> ids (...)."""

    def __init__(self, vocab_size: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = EmbeddingEMA(vocab_size, code_dim)
        self.register_buffer("cluster_size", torch.zeros(vocab_size))

    def forward(self, z: Tensor) -> Tensor:
        codes = self.embedding.weight
        distance = 1 + codes.square().sum(dim=-1) - 2 * F.normalize(z.float(), dim=-1) @ codes.T
        return distance.argmin(dim=-1)


class VQKD(nn.Module):
    """Pictures to the tokens BEiT v2 predicts: one a patch."""

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.config = config
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
        self.quantize = NormEMAVectorQuantizer(config.vocab_size, config.code_dim)
        self.encode_task_layer = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.code_dim)
        )
        self.decode_task_layer = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.teacher_dim)
        )

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
        return False

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids (B, h, w) of pictures (B, 3, H, W) in [0, 1]."""
        check_view(images, self.stride)
        return self.quantize(self.project(images)).unflatten(1, self.encoder.grid_of(images))

    def project(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] -> what is quantised, (B, L, K)."""
        return self.encode_task_layer(patch_tokens(self.encoder, 2 * images - 1))

    @torch.no_grad()
    def decode_features(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, h, w) -> what the teacher would say of each patch, (B, L, T)."""
        codes = self.quantize.embedding.weight[token_ids].permute(0, 3, 1, 2)  # (B, K, h, w)
        return self.decode_task_layer(patch_tokens(self.decoder, codes))

    def decode(self, token_ids: Tensor) -> Tensor:
        """There is no picture to give: these tokens stand for a teacher's features."""
        raise ValueError(
            "a VQ-KD tokenizer cannot draw; decode_features gives what its tokens stand for"
        )


def patch_tokens(vit: BeitForImageClassification, images: Tensor) -> Tensor:
    """The normed patch tokens (B, L, D), without pooling."""
    last = vit.layers(images, [vit.config.depth])[0]
    return vit.fc_norm(last[:, 1:])
