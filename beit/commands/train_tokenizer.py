"""`beit train-tokenizer`: learn a vocabulary of visual tokens from one's own pictures."""

from __future__ import annotations

import sys
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from beit.augment import CropAndFlip, to_unit
from beit.checkpoints import save_tokenizer
from beit.data import ImageSource, batch_at, load_ahead, open_source, sample_rng
from beit.image import ImageSpec, resize_and_crop
from beit.metrics import CodebookUse, codebook_use, psnr
from beit.optim import adamw, cosine_schedule
from beit.precision import Precision, autocast, pick_device
from beit.run import Run
from beit.tokenizer import DiscreteVAE, DiscreteVAEConfig
from beit.visualize import png_bytes, strip, to_bytes


@Parameter(name="*")
@dataclass(frozen=True)
class TrainTokenizer:
    data: Path
    """Folder of pictures (or .csv, .txt); labels are not used."""
    _: KW_ONLY
    out: Annotated[Path, Parameter(alias="-o")]
    """Run folder; becomes the tokenizer that `pretrain --tokenizer` takes."""
    img_size: PositiveInt = 112
    """Token view in pixels; BEiT's 224-pixel pictures are seen at 112."""
    vocab_size: PositiveInt = 8192
    """Number of visual tokens; fewer for little data."""
    code_dim: PositiveInt = 16
    """Width of a code."""
    hidden_dim: PositiveInt = 128
    """Channels of encoder and decoder."""
    num_layers: PositiveInt = 3
    """Halvings: a token stands for 2^num_layers pixels each way."""
    quantizer: Literal["vq", "gumbel"] = "vq"
    """How a code is chosen; `vq` keeps more of them alive."""
    epochs: PositiveInt = 20
    """Passes over the pictures."""
    steps: NonNegativeInt = 0
    """Training steps; 0 follows `epochs`."""
    batch_size: PositiveInt = 64
    lr: NonNegativeFloat = 1e-3
    """Peak learning rate of AdamW."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of a picture's area that a training crop covers."""
    hflip: float = 0.5
    """Probability of mirroring; 0 for writing and signs."""
    seed: int = 0
    precision: Precision = "auto"
    """bf16 where the processor has it (auto), or fp32."""
    device: str = "auto"
    workers: NonNegativeInt = 2
    """Threads that prepare pictures."""
    log_every: PositiveInt = 50
    """Steps between lines of metrics.jsonl."""
    save_every: PositiveInt = 500
    """Steps between checkpoints."""
    overwrite: bool = False
    """Begin again where the folder holds a run."""


def train_tokenizer(settings: TrainTokenizer) -> dict[str, float]:
    """Train a visual tokenizer on your own pictures."""
    source = open_source(settings.data)
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    tokenizer = DiscreteVAE(
        DiscreteVAEConfig(
            img_size=settings.img_size,
            vocab_size=settings.vocab_size,
            code_dim=settings.code_dim,
            hidden_dim=settings.hidden_dim,
            num_layers=settings.num_layers,
            quantizer=settings.quantizer,
        )
    )
    tokenizer = tokenizer.to(device)
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a sixth faster
    run = Run(settings.out, settings, settings.overwrite)
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = adamw(trained, settings.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    view = CropAndFlip(settings.img_size, settings.crop_scale, hflip=settings.hflip)
    total = settings.steps or settings.epochs * max(len(source) // settings.batch_size, 1)

    def batch(step: int) -> list[np.ndarray]:
        chosen = batch_at(step, len(source), settings.batch_size, settings.seed)
        return [view(source.read(i), sample_rng(settings.seed, epoch, i)) for epoch, i in chosen]

    counts = torch.zeros(settings.vocab_size, dtype=torch.int64)
    errors: list[Tensor] = []
    started, seen = time.monotonic(), 0
    tokenizer.train()
    for step, pictures in run.steps(
        tokenizer,
        optimizer,
        total,
        lambda steps: load_ahead(batch, steps, settings.workers),
        settings.save_every,
        settings.seed,
    ):
        lr = cosine_schedule(step, total, min(100, total // 10), settings.lr, settings.lr / 100)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = to_unit(pictures, device)
        with autocast(settings.precision, device):
            output = tokenizer(images)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()

        counts += torch.bincount(output.token_ids.flatten().cpu(), minlength=settings.vocab_size)
        errors.append(output.loss.detach())
        seen += len(images)
        if (step + 1) % settings.log_every == 0 or step + 1 == total:
            use = codebook_use(counts.numpy())
            run.log(
                step + 1,
                psnr_db=psnr(torch.stack(errors).mean().item()),
                live_codes=use.live,
                perplexity=use.perplexity,
                lr=lr,
                images_per_second=seen / (time.monotonic() - started),
            )
            counts.zero_()
            errors.clear()
            started, seen = time.monotonic(), 0

    use, error_db, sheet = judge(tokenizer.eval(), source, device)
    (run.out / "reconstructions.png").write_bytes(png_bytes(strip(sheet)))
    result = {"live_codes": use.live, "perplexity": use.perplexity, "psnr_db": error_db, "steps": total}
    save_tokenizer(tokenizer, run.out, {**result, "pictures": len(source), "seed": settings.seed})
    print(
        f"{run.out}: {use.live:.1%} of {settings.vocab_size} codes alive, perplexity "
        f"{use.perplexity:.0f}, reconstruction {error_db:.1f} dB PSNR",
        file=sys.stderr,
    )
    if use.live < 0.5:
        print(
            f"warning: only {use.live:.0%} of the codes are alive, so most tokens mean nothing. Train "
            f"longer, or with fewer: --vocab-size {max(16, settings.vocab_size // 4)}",
            file=sys.stderr,
        )
    return result


def judge(
    tokenizer: DiscreteVAE, source: ImageSource, device: torch.device, most: int = 4096
) -> tuple[CodebookUse, float, list[list[np.ndarray]]]:
    """Code use and PSNR over up to `most` whole pictures, and a sheet: originals over reconstructions."""
    size = tokenizer.config.img_size
    spec = ImageSpec(size=(size, size), crop_ratio=1.0)
    chosen = np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    squared = 0.0
    shown: list[tuple[np.ndarray, np.ndarray]] = []  # a picture of each batch

    for part in np.array_split(chosen, max(10, -(-len(chosen) // 64))):
        if not len(part):
            continue
        images = to_unit([resize_and_crop(source.read(int(i)), spec) for i in part], device)
        token_ids = tokenizer.encode(images)
        drawn = tokenizer.decode(token_ids)
        counts += np.bincount(token_ids.flatten().cpu().numpy(), minlength=tokenizer.vocab_size)
        squared += float((drawn.double() - images).square().mean(dim=(1, 2, 3)).sum())
        shown.append((to_bytes(images[:1])[0], to_bytes(drawn[:1])[0]))
    some = [shown[i] for i in np.linspace(0, len(shown) - 1, min(10, len(shown))).astype(int)]
    sheet = [[original for original, _ in some], [drawn for _, drawn in some]]
    return codebook_use(counts), psnr(squared / len(chosen)), sheet
