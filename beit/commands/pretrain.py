"""`beit pretrain`: masked image modelling, BEiT's own pre-training (paper §2)."""

from __future__ import annotations

import sys
import time
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt

from beit.augment import TwoViews, normalise, to_unit
from beit.checkpoints import load_tokenizer, save
from beit.data import batch_at, load_ahead, open_source, sample_rng
from beit.image import unilm_spec
from beit.masking import sample_mask
from beit.metrics import codebook_use
from beit.model import BeitForMaskedImageModeling, variant
from beit.optim import adamw, cosine_schedule, param_groups, set_learning_rate
from beit.precision import Precision, autocast, pick_device
from beit.run import Run
from beit.tokenizer import Tokenizer
from beit.visualize import hide_patches, png_bytes, strip, to_bytes


@Parameter(name="*")
@dataclass(frozen=True)
class Pretrain:
    data: Path
    """Folder of pictures (or .csv, .txt); labels are not used."""
    _: KW_ONLY
    tokenizer: Path
    """Tokenizer folder, as `train-tokenizer` leaves it."""
    out: Annotated[Path, Parameter(alias="-o")]
    """Run folder; becomes the model that `finetune -m` takes."""
    model: Annotated[str, Parameter(alias="-m")] = "beit_base_patch16_224"
    """Size of the encoder, by name."""
    img_size: PositiveInt | None = None
    """Patch view in pixels; the model's own where not given."""
    crop_ratio: float | None = None
    """Centre that evaluation looks at; 0.875 below 384 pixels where not given, 1 shows all."""
    init_values: float | None = None
    """LayerScale at the start; the model's own where not given."""
    drop_path: float = 0.1
    """Stochastic depth of the last block."""
    num_mask_patches: int | None = None
    """Patches to hide; the paper's share (75 of 196) where not given."""
    min_block: int | None = None
    """Smallest block in patches; the paper's share (16 of 196) where not given."""
    epochs: PositiveInt = 800
    """Passes over the pictures."""
    steps: NonNegativeInt = 0
    """Training steps; 0 follows `epochs`."""
    warmup_epochs: NonNegativeFloat = 10.0
    batch_size: PositiveInt = 256
    lr: NonNegativeFloat = 1.5e-3
    """Peak learning rate; the paper's 1.5e-3 is for a batch of 2048."""
    min_lr: NonNegativeFloat = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.05
    clip_grad_norm: NonNegativeFloat = 3.0
    """0 turns clipping off."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of a picture's area that a crop covers."""
    hflip: float = 0.5
    """Probability of mirroring; 0 for writing and signs."""
    color_jitter: float = 0.4
    """Strength of changes in brightness, contrast and saturation; 0 turns them off."""
    seed: int = 0
    precision: Precision = "auto"
    """bf16 where the processor has it (auto), or fp32."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    device: str = "auto"
    workers: NonNegativeInt = 2
    """Threads that prepare pictures."""
    log_every: PositiveInt = 50
    """Steps between lines of metrics.jsonl."""
    save_every: PositiveInt = 500
    """Steps between checkpoints."""
    overwrite: bool = False
    """Begin again where the folder holds a run."""


class Batch(NamedTuple):
    """What a step sees, still on the CPU."""

    patch_views: list[np.ndarray]  # uint8 (img_size, img_size, 3)
    token_views: list[np.ndarray]  # uint8 (token_size, token_size, 3)
    masks: np.ndarray  # bool (B, h, w)


def pretrain(settings: Pretrain) -> dict[str, float]:
    """Pre-train a BEiT on pictures without labels."""
    source = open_source(settings.data)
    tokenizer = load_tokenizer(settings.tokenizer)
    device = pick_device(settings.device)
    tokenizer.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    config = variant(settings.model).for_pretraining(tokenizer.vocab_size)
    config = replace(
        config,
        img_size=settings.img_size or config.img_size,
        init_values=config.init_values if settings.init_values is None else settings.init_values,
        drop_path_rate=settings.drop_path,
    )
    torch.manual_seed(settings.seed)
    model = BeitForMaskedImageModeling(config).to(device).train()
    model.gradient_checkpointing = settings.gradient_checkpointing
    height, width = config.grid
    assert height == width, "every variant is square"
    spec = unilm_spec(config.image_height_width[0])
    if settings.crop_ratio is not None:
        spec = replace(spec, crop_ratio=settings.crop_ratio)
    model.image_spec = spec
    num_masked = settings.num_mask_patches or round(75 / 196 * height * width)
    min_block = settings.min_block or max(1, round(16 / 196 * height * width))
    views = TwoViews(
        img_size=config.image_height_width[0],
        token_size=height * tokenizer.stride,  # so that each patch has its token
        crop_scale=settings.crop_scale,
        hflip=settings.hflip,
        color_jitter=settings.color_jitter,
    )

    sample_mask(config.grid, num_masked, np.random.default_rng(0), min_block)  # refuses what cannot be
    run = Run(settings.out, settings, settings.overwrite)
    optimizer = adamw(param_groups(model, settings.weight_decay), settings.lr, settings.betas)
    steps_per_epoch = max(len(source) // settings.batch_size, 1)
    total = settings.steps or settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 2)

    def batch(step: int) -> Batch:
        chosen = batch_at(step, len(source), settings.batch_size, settings.seed)
        rngs = [sample_rng(settings.seed, epoch, index) for epoch, index in chosen]
        pairs = [views(source.read(i), rng) for (_, i), rng in zip(chosen, rngs, strict=True)]
        masks = [sample_mask(config.grid, num_masked, rng, min_block) for rng in rngs]
        return Batch([p for p, _ in pairs], [t for _, t in pairs], np.stack(masks))

    started, seen, last = time.monotonic(), 0, {}
    for step, views_and_masks in run.steps(
        model,
        optimizer,
        total,
        lambda steps: load_ahead(batch, steps, settings.workers),
        settings.save_every,
        settings.seed,
    ):
        lr = cosine_schedule(step, total, warmup, settings.lr, settings.min_lr)
        set_learning_rate(optimizer, lr)
        images = normalise(to_unit(views_and_masks.patch_views, device), spec)
        masks = torch.from_numpy(views_and_masks.masks).to(device)  # (B, h, w)
        token_ids = tokenizer.encode(to_unit(views_and_masks.token_views, device))  # (B, h, w)
        targets = token_ids[masks]  # (M,), in the order of the logits

        with autocast(settings.precision, device):
            logits = model(images, masks)  # (M, V)
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), settings.clip_grad_norm or float("inf")
        )
        optimizer.step()

        seen += len(images)
        if (step + 1) % settings.log_every == 0 or step + 1 == total:
            used = codebook_use(np.bincount(token_ids.flatten().cpu(), minlength=tokenizer.vocab_size))
            last = {
                "loss": loss.item(),
                "token_accuracy": (logits.argmax(dim=-1) == targets).float().mean().item(),
                "masked_ratio": masks.float().mean().item(),
                "target_perplexity": used.perplexity,
                "lr": lr,
                "grad_norm": norm.item(),
            }
            run.log(step + 1, **last, images_per_second=seen / (time.monotonic() - started))
            started, seen = time.monotonic(), 0

    model.eval()
    if tokenizer.can_draw:
        sheet = strip(draw_predictions(model, tokenizer, batch(total - 1), device))
        (run.out / "predictions.png").write_bytes(png_bytes(sheet))
    provenance: dict[str, Any] = {
        "made_by": "beit pretrain",
        "pictures": len(source),
        "steps": total,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    save(model, run.out, provenance)
    metrics = run.read_metrics()
    last = {key: value for key, value in metrics[-1].items() if isinstance(value, (int, float))}
    print(
        f"{run.out}: {total} steps, loss {last['loss']:.3f}, {last['token_accuracy']:.1%} of masked "
        f"tokens guessed, chance {1 / tokenizer.vocab_size:.2%}"
        + ("; about 5 % is normal for 8192 tokens" if tokenizer.vocab_size == 8192 else ""),
        file=sys.stderr,
    )
    return last


@torch.no_grad()
def draw_predictions(
    model: BeitForMaskedImageModeling,
    tokenizer: Tokenizer,
    batch: Batch,
    device: torch.device,
    most: int = 8,
) -> list[list[np.ndarray]]:
    """Rows of pictures: the patch view, what is left of it, its tokens drawn, and drawn again with
    the masked ones as the model guesses them."""
    count = min(most, len(batch.patch_views))
    images = normalise(to_unit(batch.patch_views[:count], device), model.image_spec)
    masks = torch.from_numpy(batch.masks[:count]).to(device)
    truth = tokenizer.encode(to_unit(batch.token_views[:count], device))
    guessed = truth.clone()
    guessed[masks] = model(images, masks).argmax(dim=-1)
    drawn = zip(to_bytes(tokenizer.decode(truth)), to_bytes(tokenizer.decode(guessed)), strict=True)
    return [
        [batch.patch_views[i], hide_patches(batch.patch_views[i], batch.masks[i]), true, guess]
        for i, (true, guess) in enumerate(drawn)
    ]
