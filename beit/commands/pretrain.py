"""`beit pretrain`: masked image modelling, BEiT's own pre-training (paper §2)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from beit.augment import Filter, TwoViews, normalise, to_unit
from beit.checkpoints import load_model, load_tokenizer, save
from beit.data import BadImages, Loader, open_source
from beit.handover import hand_over
from beit.hub import is_remote
from beit.image import HALF, IMAGENET_MEAN, IMAGENET_STD, OpenImage, unilm_spec
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
    """Folder of pictures, tar shards, Parquet, .csv or .txt; labels are not used."""
    _: KW_ONLY
    tokenizer: Path
    """Tokenizer folder, as `train-tokenizer` leaves it; OpenAI's encoder.pkl, or a VQ-KD file."""
    out: Annotated[Path, Parameter(alias="-o")]
    """Run folder; becomes the model that `finetune -m` takes."""
    model: Annotated[str, Parameter(alias="-m")] = "beit_base_patch16_224"
    """Size of the encoder, by name; or a trained BEiT of any format to go on from."""
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
    exact_masks: bool = False
    """Hide just so many, as BEiT v2 does; v1 hides at most so many."""
    epochs: PositiveInt = 800
    """Passes over the pictures."""
    steps: NonNegativeInt = 0
    """Training steps; 0 follows `epochs`."""
    warmup_epochs: NonNegativeFloat = 10.0
    warmup_steps: NonNegativeInt = 0
    """0 follows `warmup_epochs`."""
    batch_size: PositiveInt = 256
    """Pictures a step, over all that take part in it."""
    device_batch_size: NonNegativeInt = 0
    """At most so many at once, and as often as it takes; 0: all of a step together."""
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
    token_filter: Filter = "lanczos"
    """How the tokenizer's view is resized: lanczos in v1, bicubic in v2."""
    statistics: Literal["half", "imagenet"] = "half"
    """Mean and deviation of the encoder's pictures: 0.5 in v1's ImageNet-22k runs, ImageNet's else."""
    seed: int = 0
    precision: Precision = "auto"
    """bf16 where the processor has it (auto), or fp32."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    compile: bool = False
    """Compile each block with torch.compile."""
    device: str = "auto"
    workers: NonNegativeInt = 2
    """Processes that prepare pictures; 0 leaves it to the run's own."""
    max_bad_images: float = 0.01
    """Share of the pictures that may be unreadable; more stops the run with exit code 4."""
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

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in parts of at most `size` pictures; 0 leaves it whole."""
        size = size or len(self.masks)
        for start in range(0, len(self.masks), size):
            some = slice(start, start + size)
            yield Batch(self.patch_views[some], self.token_views[some], self.masks[some])


def pretrain(settings: Pretrain) -> dict[str, float]:
    """Pre-train a BEiT on pictures without labels."""
    source = open_source(settings.data)
    tokenizer = load_tokenizer(settings.tokenizer)
    device = pick_device(settings.device)
    tokenizer.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    model = starting_model(settings, tokenizer.vocab_size).to(device).train()
    model.gradient_checkpointing = settings.gradient_checkpointing
    config, spec = model.config, model.image_spec
    height, width = config.grid
    num_masked = settings.num_mask_patches or round(75 / 196 * height * width)
    min_block = settings.min_block or max(1, round(16 / 196 * height * width))
    views = TwoViews(
        img_size=config.image_height_width[0],
        token_size=height * tokenizer.stride,  # so that each patch has its token
        crop_scale=settings.crop_scale,
        hflip=settings.hflip,
        color_jitter=settings.color_jitter,
        token_filter=settings.token_filter,
    )
    mask_of = partial(
        sample_mask, config.grid, num_masked, min_block=min_block, exact=settings.exact_masks
    )
    mask_of(np.random.default_rng(0))  # refuses what cannot be

    run = Run(settings.out, settings, settings.overwrite)
    optimizer = adamw(param_groups(model, settings.weight_decay), settings.lr, settings.betas)
    loader = Loader(
        source,
        settings.batch_size,
        settings.seed,
        settings.workers,
        BadImages(run.out / "bad_images.csv", len(source), settings.max_bad_images),
    )
    steps_per_epoch = loader.steps_per_epoch
    total = settings.steps or settings.epochs * steps_per_epoch
    warmup = min(settings.warmup_steps or round(settings.warmup_epochs * steps_per_epoch), total // 2)
    if settings.compile:
        for block in model.blocks:
            block.compile()

    def prepare(picture: OpenImage, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return *views(picture, rng), mask_of(rng)

    def batches(steps: range) -> Iterator[Batch]:
        for samples in loader.batches(steps, prepare):
            patch_views, token_views, masks = zip(*(value for _, value in samples), strict=True)
            yield Batch(list(patch_views), list(token_views), np.stack(masks))

    started, seen, last = time.monotonic(), 0, {}
    for step, views_and_masks in run.steps(
        model,
        optimizer,
        total,
        batches,
        settings.save_every,
        settings.seed,
    ):
        lr = cosine_schedule(step, total, warmup, settings.lr, settings.min_lr)
        set_learning_rate(optimizer, lr)
        optimizer.zero_grad()
        count = float(views_and_masks.masks.sum())  # of masked patches: the loss is their mean
        loss, right = torch.zeros(2, device=device)
        used = torch.zeros(tokenizer.vocab_size, dtype=torch.int64, device=device)
        for part in views_and_masks.parts(settings.device_batch_size):
            images = normalise(to_unit(part.patch_views, device), spec)
            masks = torch.from_numpy(part.masks).to(device)  # (B, h, w)
            token_ids = tokenizer.encode(to_unit(part.token_views, device))  # (B, h, w)
            targets = token_ids[masks]  # (M,), in the order of the logits
            with autocast(settings.precision, device):
                logits = masked_logits(model, images, masks)
            part_loss = torch.stack([masked_loss(each, targets) for each in logits]).sum() / count
            part_loss.backward()
            loss += part_loss.detach()
            right += (logits[0].argmax(dim=-1) == targets).sum()
            used += torch.bincount(token_ids.flatten(), minlength=len(used))
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), settings.clip_grad_norm or float("inf")
        )
        optimizer.step()

        seen += len(views_and_masks.masks)
        if (step + 1) % settings.log_every == 0 or step + 1 == total:
            last = {
                "loss": loss.item(),
                "token_accuracy": right.item() / count,
                "masked_ratio": count / views_and_masks.masks.size,
                "target_perplexity": codebook_use(used.cpu().numpy()).perplexity,
                "lr": lr,
                "grad_norm": norm.item(),
            }
            run.log(step + 1, **last, images_per_second=seen / (time.monotonic() - started))
            started, seen = time.monotonic(), 0

    if loader.bad_images.found:
        print(f"{run.out}: {loader.bad_images}", file=sys.stderr)
    model.eval()
    if tokenizer.can_draw:
        sheet = strip(draw_predictions(model, tokenizer, next(batches(range(total - 1, total))), device))
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


def starting_model(settings: Pretrain, vocab_size: int) -> BeitForMaskedImageModeling:
    """A fresh encoder of a named size, or the encoder of a trained model; both to guess V tokens."""
    torch.manual_seed(settings.seed)
    if "/" not in settings.model and not Path(settings.model).exists() and not is_remote(settings.model):
        config, start = variant(settings.model).for_pretraining(vocab_size), None
    else:
        start = load_model(settings.model, dtype=torch.float32)
        config = replace(start.config, use_mask_token=True, vocab_size=vocab_size, num_classes=0)
    if settings.init_values is not None:
        config = replace(config, init_values=settings.init_values)
    model = BeitForMaskedImageModeling(
        replace(config, img_size=settings.img_size or config.img_size, drop_path_rate=settings.drop_path)
    )
    size = model.config.image_height_width
    if size[0] != size[1]:
        raise ValueError(
            f"{settings.model} takes pictures of {size}; pre-training takes squares: --img-size"
        )
    mean, std = (HALF, HALF) if settings.statistics == "half" else (IMAGENET_MEAN, IMAGENET_STD)
    model.image_spec = replace(unilm_spec(size[0]), mean=mean, std=std)
    if settings.crop_ratio is not None:
        model.image_spec = replace(model.image_spec, crop_ratio=settings.crop_ratio)
    if start is not None:
        same_tokens = start.config.vocab_size == vocab_size
        tensors = {
            name: tensor
            for name, tensor in start.state_dict().items()
            if same_tokens or not name.startswith("lm_head.")
        }
        taken, report, _ = hand_over(tensors, start.config, model)
        model.load_state_dict(taken, strict=False)
        print(f"{settings.model}: {report}", file=sys.stderr)
    return model


def masked_logits(
    model: BeitForMaskedImageModeling, images: Tensor, masks: Tensor
) -> tuple[Tensor, ...]:
    """The (M, V) logits of the masked patches; two sets of them where v2's extra blocks are there."""
    if model.config.early_layer:
        return model.forward_aggregated(images, masks)
    return (model(images, masks),)


def masked_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of (M, V) logits with (M,) tokens."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


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
