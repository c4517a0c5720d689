"""Visual tokenizers: pictures to grids of token ids, and back.

`DalleTokenizer` is the dVAE that BEiT was trained with (encoder and decoder of OpenAI's DALL-E);
`DiscreteVAE` is a small one to train on one's own pictures. Both keep the promise of `Tokenizer`, so
pre-training does not know which it was given.

Shapes: B batch, (H, W) pixels of the token view, (h, w) = (H, W) / stride token grid, V vocabulary,
K code width. Pictures go in and come out as float in [0, 1]; each tokenizer maps them for itself.

Ramesh et al.: arXiv 2102.12092 (dVAE); van den Oord et al.: arXiv 1711.00937 (vector quantisation).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Tokenizer(Protocol):
    """What pre-training asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """V; ids are 0 to V - 1."""

    @property
    def stride(self) -> int:
        """Pixels of the token view a token stands for, each way."""

    @property
    def view_size(self) -> tuple[int, int]:
        """(H, W) of the view it was made for, in pixels."""

    @property
    def can_draw(self) -> bool:
        """Whether `decode` gives pictures."""

    def encode(self, images: Tensor) -> Tensor:
        """Token ids (B, h, w) int64 of pictures (B, 3, H, W) in [0, 1]."""

    def decode(self, token_ids: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of token ids (B, h, w)."""


def check_view(images: Tensor, stride: int) -> None:
    """Refuse what is not a (B, 3, H, W) batch of whole tokens."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {tuple(images.shape)}; a tokenizer takes (B, 3, height, width)")
    for pixels in images.shape[2:]:
        if pixels % stride or pixels == 0:
            below = pixels // stride * stride
            nearest = f"{below} or {below + stride}" if below else f"{stride}"
            raise ValueError(
                f"a side of {pixels} pixels is not a multiple of the token stride {stride}; use {nearest}"
            )


class PixelTargets(nn.Module):
    """No tokens: a patch is guessed as pixels, each patch with its mean and deviation taken out.

    The paper's ablation (its table 4), with the normalisation that MAE (arXiv 2111.06377) found better.
    Stands where a tokenizer stands; `encode` gives (B, h, w, V) float32 of V = 3 * 8 * 8 numbers.
    """

    vocab_size, stride, view_size, can_draw = 192, 8, (112, 112), False

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> (B, h, w, 192): each patch's pixels, mean 0, variance 1."""
        patches, mean, deviation = self._patches(images)
        return (patches - mean) / deviation

    def decode(self, token_ids: Tensor) -> Tensor:
        """There is no picture to give: the patches' means are gone."""
        raise ValueError("pixel targets have no tokens to draw")

    @torch.no_grad()
    def draw(self, targets: Tensor, images: Tensor) -> Tensor:
        """Targets or guesses of them (B, h, w, 192) as pictures (B, 3, H, W) in [0, 1].

        Each patch gets back the mean and the deviation that it has in `images` (B, 3, H, W), as MAE shows
        its guesses.
        """
        _, mean, deviation = self._patches(images)
        patches = targets.float() * deviation + mean
        return F.pixel_shuffle(patches.permute(0, 3, 1, 2), self.stride).clamp(0, 1)

    def _patches(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, h, w, 192) of pictures (B, 3, H, W), their means and deviations (B, h, w, 1)."""
        check_view(images, self.stride)
        patches = F.pixel_unshuffle(images.float(), self.stride).permute(0, 2, 3, 1)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return patches, mean, (variance + 1e-6).sqrt()


# --- A codebook that is a moving average -----------------------------------------------------------

AT_ONCE = 1 << 13  # rows held against all codes; with 8,192 codes the cosines take 256 MiB


def nearest_codes(codes: Tensor, directions: Tensor) -> Tensor:
    """Ids (...) of the nearest codes (V, K) of unit vectors (..., K): the largest cosine.

    In float32 whatever the precision of the run: neighbouring codes differ by less than bf16 can
    tell, and under autocast two thirds of the tokens went to another code.
    """
    with torch.autocast(directions.device.type, enabled=False):
        parts = directions.float().flatten(0, -2).split(AT_ONCE)
        return torch.cat([(part @ codes.T).argmax(dim=-1) for part in parts]).view(directions.shape[:-1])


def count_tokens(token_ids: Tensor, vocab_size: int) -> Tensor:
    """(V,) int64: how often each token is among ids (...).

    `torch.bincount` looks for the largest first, which a GPU would have to be waited for.
    """
    token_ids = token_ids.flatten()
    return token_ids.new_zeros(vocab_size).scatter_add_(0, token_ids, torch.ones_like(token_ids))


@torch.no_grad()
def update_codes(codes: Tensor, directions: Tensor, token_ids: Tensor, decay: float) -> Tensor:
    """Turn each used code (V, K), in place, towards the mean of what took it on any rank.

    directions: (n, K) unit vectors of this rank; token_ids: (n,) what they took.
    Returns the counts (V,) over all ranks.
    """
    sums = torch.zeros_like(codes).index_add_(0, token_ids, directions)
    counts = count_tokens(token_ids, len(codes))
    if _world() > 1:
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    moved = F.normalize(decay * codes + (1 - decay) * F.normalize(sums, dim=-1), dim=-1)
    # A batch that is not finite moves nothing.
    codes.copy_(torch.where((counts > 0)[:, None] & moved.isfinite(), moved, codes))
    return counts


@torch.no_grad()
def revive_codes(
    codes: Tensor, unused_steps: Tensor, counts: Tensor, directions: Tensor, after: int
) -> None:
    """Put codes (V, K) that nothing took for `after` steps where something is; 0 never does.

    unused_steps: (V,) int64, counted here. counts: (V,) of this step. directions: (n, K).
    """
    unused_steps.copy_(torch.where(counts > 0, 0, unused_steps + 1))
    if after:
        rows = len(directions) * _world()
        idle = torch.nonzero(unused_steps >= after).flatten()[:rows]
        places = pick_directions(directions, len(idle))
        codes[idle] = torch.where(places.isfinite(), places, codes[idle])
        unused_steps[idle] = 0


def pick_directions(directions: Tensor, count: int) -> Tensor:
    """`count` random rows of every rank's (n, K), some twice if there are not so many; the same on each."""
    if count == 0:
        return directions[:0]
    world = _world()
    if world > 1:
        of_ranks = [torch.empty_like(directions) for _ in range(world)]
        dist.all_gather(of_ranks, directions.contiguous())
        directions = torch.cat(of_ranks)
    n, device = len(directions), directions.device
    rows = torch.randperm(n, device=device)[:count]
    if count > n:
        rows = torch.randint(n, (count,), device=device)
    picked = directions[rows]
    if world > 1:  # their dice differ
        dist.broadcast(picked, src=0)
    return picked


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# --- OpenAI's dVAE --------------------------------------------------------------------------------

LOGIT_LAPLACE_EPS = 0.1


def map_pixels(images: Tensor) -> Tensor:
    """[0, 1] to [0.1, 0.9], float32: the range the dVAE's logit-Laplace likelihood is defined on."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * images.float() + LOGIT_LAPLACE_EPS


def unmap_pixels(images: Tensor) -> Tensor:
    """[0.1, 0.9] back to [0, 1]; what lies outside is cut."""
    return ((images - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)


@dataclass(frozen=True)
class DalleConfig:
    """Sizes of the dVAE; the defaults are OpenAI's."""

    vocab_size: int = 8192
    n_hid: int = 256  # channels of the encoder's first and the decoder's last group
    n_init: int = 128  # channels the decoder starts with
    n_blk_per_group: int = 2
    img_size: int = 112  # the token view of BEiT: 112 / 8 = 14 tokens a side


class DalleConv2d(nn.Module):
    """A stride-1 convolution that keeps the size; its parameters are called `w` and `b`."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        assert kernel % 2 == 1, f"kernel {kernel} must be odd to keep the size"
        self.dtype = torch.float32  # what it computes in; the weights stay as they are
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / (n_in * kernel**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        x, w, b = x.to(self.dtype), self.w.to(self.dtype), self.b.to(self.dtype)
        return F.conv2d(x, w, b, padding=self.w.shape[-1] // 2)


class DalleBlock(nn.Module):
    """Residual bottleneck, ReLU first; the gain 1 / (number of blocks)^2 keeps a deep stack calm."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], num_blocks: int) -> None:
        super().__init__()
        hidden = n_out // 4
        widths = [n_in, hidden, hidden, hidden, n_out]
        self.post_gain = 1 / num_blocks**2
        self.id_path = DalleConv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            path[f"relu_{i + 1}"] = nn.ReLU()
            path[f"conv_{i + 1}"] = DalleConv2d(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


def _dalle_groups(
    widths: list[int], kernels: tuple[int, ...], per_group: int, between: tuple[str, nn.Module]
) -> OrderedDict[str, nn.Module]:
    """Groups of blocks from width to width, with a change of scale after each but the last."""
    groups: OrderedDict[str, nn.Module] = OrderedDict()
    count = len(widths) - 1
    for g in range(count):
        group: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(per_group):
            n_in = widths[g] if i == 0 else widths[g + 1]
            group[f"block_{i + 1}"] = DalleBlock(n_in, widths[g + 1], kernels, count * per_group)
        if g < count - 1:
            group[between[0]] = between[1]
        groups[f"group_{g + 1}"] = nn.Sequential(group)
    return groups


class DalleEncoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> token logits (B, V, H/8, W/8)."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        n = config.n_hid
        groups = _dalle_groups(
            [n, n, 2 * n, 4 * n, 8 * n],
            (3, 3, 3, 1),
            config.n_blk_per_group,
            ("pool", nn.MaxPool2d(2)),
        )
        head = OrderedDict(relu=nn.ReLU(), conv=DalleConv2d(8 * n, config.vocab_size, 1))
        self.blocks = nn.Sequential(
            OrderedDict(input=DalleConv2d(3, n, 7), **groups, output=nn.Sequential(head))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DalleDecoder(nn.Module):
    """One-hot tokens (B, V, h, w) -> (B, 6, 8h, 8w): three channels of location, three of scale."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        n = config.n_hid
        groups = _dalle_groups(
            [config.n_init, 8 * n, 4 * n, 2 * n, n],
            (1, 3, 3, 3),
            config.n_blk_per_group,
            ("upsample", nn.Upsample(scale_factor=2, mode="nearest")),
        )
        head = OrderedDict(relu=nn.ReLU(), conv=DalleConv2d(n, 6, 1))
        stem = DalleConv2d(config.vocab_size, config.n_init, 1)
        self.blocks = nn.Sequential(OrderedDict(input=stem, **groups, output=nn.Sequential(head)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DalleTokenizer(nn.Module):
    """The dVAE of DALL-E, in float32 unless `use_float16` was called.

    The decoder is only needed to see tokens as a picture.
    """

    def __init__(self, config: DalleConfig, with_decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.encoder = DalleEncoder(config)
        self.decoder = DalleDecoder(config) if with_decoder else None

    def use_float16(self, on: bool = True) -> DalleTokenizer:
        """Compute as the original does on a GPU: every convolution in fp16, and what passes between
        them, but for the encoder's last and the decoder's first. Weights stay float32."""
        in_float32 = {"encoder.blocks.output.conv", "decoder.blocks.input"}
        for name, module in self.named_modules():
            if isinstance(module, DalleConv2d):
                module.dtype = torch.float16 if on and name not in in_float32 else torch.float32
        return self

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def stride(self) -> int:
        return 8

    @property
    def view_size(self) -> tuple[int, int]:
        return self.config.img_size, self.config.img_size

    @property
    def can_draw(self) -> bool:
        return self.decoder is not None

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids (B, h, w) of pictures (B, 3, H, W) in [0, 1]: the likeliest token of each place."""
        check_view(images, self.stride)
        return self.encoder(map_pixels(images)).argmax(dim=1)

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of token ids (B, h, w)."""
        if self.decoder is None:
            raise ValueError("this tokenizer was loaded without its decoder, so it cannot draw tokens")
        one_hot = F.one_hot(token_ids, self.vocab_size).permute(0, 3, 1, 2).float()
        return unmap_pixels(self.decoder(one_hot)[:, :3].float().sigmoid())


# --- Our own --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscreteVAEConfig:
    """Sizes of a `DiscreteVAE`, and what keeps its codes alive."""

    img_size: int = 112  # pixels of the token view
    vocab_size: int = 8192
    code_dim: int = 16  # K
    hidden_dim: int = 128  # channels
    num_layers: int = 3  # each halves the picture: stride 2^num_layers
    quantizer: Literal["vq", "gumbel"] = "vq"
    codebook_decay: float = 0.95  # vq: of the moving average that is the codebook
    revive_after_steps: int = 20  # vq: a code unused this long takes a fresh place; 0 never
    temperature: float = 0.9  # gumbel: of the softmax

    def __post_init__(self) -> None:
        stride = 2**self.num_layers
        if self.img_size % stride or self.img_size <= 0:
            raise ValueError(
                f"img_size {self.img_size} is not a multiple of the token stride {stride} "
                f"(2^num_layers); use {max(self.img_size // stride, 1) * stride}"
            )


class DiscreteVAEOutput(NamedTuple):
    """A training step's view of a batch."""

    loss: Tensor  # scalar: mean squared error of pixels in [0, 1]
    reconstruction: Tensor  # (B, 3, H, W), about [0, 1]
    token_ids: Tensor  # (B, h, w)
    directions: Tensor  # (B, h, w, K) what took the tokens, for `update_codebook`; gumbel: K = 0

    @property
    def error(self) -> Tensor:
        """What a run is judged by: the loss."""
        return self.loss


class ResBlock(nn.Module):
    """Three convolutions beside a straight way: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x


class DiscreteVAE(nn.Module):
    """A convolutional autoencoder whose bottleneck is a grid of ids: our own tokenizer.

    `quantizer="vq"` (ours): encoder outputs, put on the unit sphere, take the nearest code; the codebook
    is a moving average of what it was given, and a code that nothing takes is put where something is.
    In training mode `forward` updates it, as a batch norm updates its statistics. There is no commitment
    loss: any weight that matters makes the encoder constant (measured, see docs/log.md).
    `quantizer="gumbel"`: the published alternative, a softmax over the codes with Gumbel noise.
    """

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.config = config
        c, k = config.hidden_dim, config.code_dim
        vq = config.quantizer == "vq"
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for i in range(config.num_layers):
            down = nn.Conv2d(3 if i == 0 else c, c, 4, stride=2, padding=1)
            up = nn.ConvTranspose2d(k if i == 0 else c, c, 4, stride=2, padding=1)
            encoder += [nn.Sequential(down, nn.ReLU()), ResBlock(c)]
            decoder += [nn.Sequential(up, nn.ReLU()), ResBlock(c)]
        encoder.append(nn.Conv2d(c, k if vq else config.vocab_size, 1))
        decoder.append(nn.Conv2d(c, 3, 1))
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)
        self.codebook = nn.Embedding(config.vocab_size, k)
        if vq:
            self.codebook.weight.requires_grad_(False)
            self.codebook.weight.data = F.normalize(self.codebook.weight.data, dim=-1)
            self.register_buffer("unused_steps", torch.zeros(config.vocab_size, dtype=torch.int64))

    unused_steps: Tensor

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def stride(self) -> int:
        return int(2**self.config.num_layers)

    @property
    def view_size(self) -> tuple[int, int]:
        return self.config.img_size, self.config.img_size

    @property
    def can_draw(self) -> bool:
        return True

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids (B, h, w) of pictures (B, 3, H, W) in [0, 1]."""
        check_view(images, self.stride)
        z = self.encoder(2 * images - 1)
        return z.argmax(dim=1) if self.config.quantizer == "gumbel" else self.nearest(self.directions(z))

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of token ids (B, h, w)."""
        return self.draw(self.codebook(token_ids).permute(0, 3, 1, 2)).clamp(0, 1)

    def forward(self, images: Tensor, moves_codebook: bool = True) -> DiscreteVAEOutput:
        """Encode, quantise, decode, compare.

        images: (B, 3, H, W) in [0, 1]. moves_codebook: in training, by this batch, which is drawn with the
        codes it has moved. Without it the caller gives `update_codebook` what the parts of a step took,
        once a step.
        """
        check_view(images, self.stride)
        z = self.encoder(2 * images - 1)
        if self.config.quantizer == "gumbel":
            codes, token_ids, directions = self.quantise_gumbel(z)
        else:
            codes, token_ids, directions = self.quantise_vq(z, moves_codebook)
        reconstruction = self.draw(codes)
        loss = F.mse_loss(reconstruction.float(), images)
        return DiscreteVAEOutput(loss, reconstruction, token_ids, directions)

    def draw(self, codes: Tensor) -> Tensor:
        """Code vectors (B, K, h, w) -> pixels (B, 3, H, W), not cut to [0, 1]."""
        return (self.decoder(codes) + 1) / 2

    def quantise_gumbel(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A soft mixture of codes in training, the likeliest code otherwise; ids; no directions."""
        token_ids = z.argmax(dim=1)
        nowhere = z.new_empty(*token_ids.shape, 0)
        if not self.training:
            return self.codebook(token_ids).permute(0, 3, 1, 2), token_ids, nowhere
        weights = F.gumbel_softmax(z.float(), tau=self.config.temperature, dim=1)  # (B, V, h, w)
        return torch.einsum("bvhw,vk->bkhw", weights, self.codebook.weight), token_ids, nowhere

    def quantise_vq(self, z: Tensor, moves_codebook: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest codes, whose gradient goes straight through to the encoder; ids; directions."""
        directions = self.directions(z)  # (B, h, w, K)
        token_ids = self.nearest(directions)
        if self.training and moves_codebook:
            self.update_codebook(directions.detach(), token_ids)
        codes = directions + (self.codebook(token_ids) - directions).detach()
        return codes.permute(0, 3, 1, 2), token_ids, directions.detach()

    def directions(self, z: Tensor) -> Tensor:
        """Encoder outputs (B, K, h, w) as unit vectors (B, h, w, K), float32."""
        return F.normalize(z.float().permute(0, 2, 3, 1), dim=-1)

    def nearest(self, directions: Tensor) -> Tensor:
        """Ids (...) of the nearest codes of unit vectors (..., K)."""
        return nearest_codes(self.codebook.weight, directions)

    def update_codebook(self, directions: Tensor, token_ids: Tensor) -> None:
        """Move used codes towards what they were given; put idle ones where something is.

        directions: (..., K) unit vectors; token_ids: (...) what they took. Gumbel's learns by gradient.
        """
        if self.config.quantizer == "gumbel":
            return
        directions, token_ids = directions.flatten(0, -2), token_ids.flatten()
        codes = self.codebook.weight
        counts = update_codes(codes, directions, token_ids, self.config.codebook_decay)
        revive_codes(codes, self.unused_steps, counts, directions, self.config.revive_after_steps)
