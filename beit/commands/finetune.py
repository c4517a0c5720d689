"""`beit finetune`: a pre-trained encoder and labelled pictures in, a classifier out (paper §2.6)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt

from beit.augment import (
    CropAndFlip,
    erase,
    mix_images,
    mix_targets,
    normalise,
    sample_mix,
    to_unit,
)
from beit.checkpoints import load_model, save
from beit.data import BadImages, ImageSource, Loader, has_split, open_source
from beit.engine import Engine
from beit.handover import to_classifier
from beit.hub import is_remote
from beit.image import unilm_spec
from beit.metrics import top_k_accuracy
from beit.model import BeitForImageClassification, variant
from beit.optim import adamw, cosine_schedule, param_groups, set_learning_rate
from beit.precision import Precision, autocast, pick_device
from beit.run import Run


@Parameter(name="*")
@dataclass(frozen=True)
class Finetune:
    data: Path
    """Folder with one sub-folder a class, or with train/ and val/ of such; a .csv of path,label; tar shards
    or Parquet."""
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """What to start from: a model folder or file, hub:owner/name, a name of `beit models`; or the name of
    a size, such as beit_tiny_patch8_64, to start from nothing."""
    out: Annotated[Path, Parameter(alias="-o")]
    """Run folder; becomes the model that `classify -m` takes."""
    val: Path | None = None
    """Labelled pictures to watch the accuracy on; DATA/val where that exists."""
    img_size: PositiveInt | None = None
    """Pixels; the model's own where not given."""
    crop_ratio: float | None = None
    """Centre that evaluation looks at; 0.875 below 384 pixels where not given, 1 shows all."""
    drop_path: float = 0.1
    """Stochastic depth of the last block."""
    epochs: PositiveInt = 100
    """Passes over the pictures."""
    steps: NonNegativeInt = 0
    """Training steps; 0 follows `epochs`."""
    warmup_epochs: NonNegativeFloat = 20.0
    """At most a fifth of the run."""
    batch_size: PositiveInt = 64
    lr: NonNegativeFloat = 1e-3
    """Peak learning rate of the head; the paper's 4e-3 is for a batch of 1024."""
    min_lr: NonNegativeFloat = 1e-6
    layer_decay: float = 0.65
    """Each layer below learns this much slower: 0.65 base, 0.75 large; 1 turns it off."""
    weight_decay: NonNegativeFloat = 0.05
    clip_grad_norm: NonNegativeFloat = 0.0
    """0 turns clipping off."""
    label_smoothing: float = 0.1
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of a picture's area that a crop covers."""
    hflip: float = 0.5
    """Probability of mirroring; 0 for writing and signs."""
    rand_augment: NonNegativeFloat = 0.0
    """Magnitude of RandAugment, up to 10; the paper's is 9. 0 turns it off."""
    reprob: NonNegativeFloat = 0.0
    """Probability of erasing a box; the paper's is 0.25."""
    mixup: NonNegativeFloat = 0.0
    """How evenly two pictures are mixed; the paper's is 0.8. 0 turns it off."""
    cutmix: NonNegativeFloat = 0.0
    """How large a piece of another picture is pasted in; the paper's is 1. 0 turns it off."""
    seed: int = 0
    precision: Precision = "auto"
    """bf16 where the processor has it (auto), or fp32."""
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

    pictures: list[np.ndarray]  # uint8 (img_size, img_size, 3)
    labels: list[int]


def finetune(settings: Finetune) -> dict[str, float]:
    """Fine-tune a model on labelled pictures."""
    source = open_source(settings.data, labelled=True)
    if len(source.classes) < 2:
        raise ValueError(f"{settings.data} has one class ({source.classes[0]}); two or more are needed")
    validation = open_validation(settings, source)
    model = starting_model(settings, source)
    run = Run(settings.out, settings, settings.overwrite)
    device = pick_device(settings.device)
    model = model.to(device).train()
    config = model.config

    layer_decay = None if settings.layer_decay == 1 else settings.layer_decay
    groups = param_groups(model, settings.weight_decay, layer_decay, config.depth)
    optimizer = adamw(groups, settings.lr)
    red, green, blue = (min(255, round(255 * value)) for value in model.image_spec.mean)
    view = CropAndFlip(
        config.image_height_width[0],
        settings.crop_scale,
        hflip=settings.hflip,
        rand_augment=settings.rand_augment,
        fill=(red, green, blue),
    )
    loader = Loader(
        source,
        settings.batch_size,
        settings.seed,
        settings.workers,
        BadImages(run.out / "bad_images.csv", len(source), settings.max_bad_images),
    )
    steps_per_epoch = loader.steps_per_epoch
    total = settings.steps or settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 5)

    def batches(steps: range) -> Iterator[Batch]:
        for samples in loader.batches(steps, view):
            yield Batch([picture for _, picture in samples], [int(source.labels[i]) for i, _ in samples])

    started, seen = time.monotonic(), 0
    for step, (pictures, targets) in run.steps(
        model,
        optimizer,
        total,
        batches,
        settings.save_every,
        settings.seed,
    ):
        lr = cosine_schedule(step, total, warmup, settings.lr, settings.min_lr)
        set_learning_rate(optimizer, lr)
        images = normalise(to_unit(pictures, device), model.image_spec)
        labels = torch.tensor(targets, device=device)
        step_rng = np.random.default_rng([settings.seed, step, 2])
        wanted = labels
        if settings.reprob:
            images = erase(images, settings.reprob, step_rng)
        if settings.mixup or settings.cutmix:
            mix = sample_mix(*config.image_height_width, settings.mixup, settings.cutmix, step_rng)
            images, wanted = mix_images(images, mix), mix_targets(labels, config.num_classes, mix)
        with autocast(settings.precision, device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), wanted, label_smoothing=settings.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), settings.clip_grad_norm or float("inf")
        )
        optimizer.step()

        seen += len(images)
        if (step + 1) % settings.log_every == 0 or step + 1 == total:
            run.log(
                step + 1,
                loss=loss.item(),
                train_accuracy=(logits.argmax(dim=-1) == labels).float().mean().item(),
                lr=lr,
                grad_norm=norm.item(),
                images_per_second=seen / (time.monotonic() - started),
            )
            started, seen = time.monotonic(), 0

    if loader.bad_images.found:
        print(f"{run.out}: {loader.bad_images}", file=sys.stderr)
    model.eval()
    result: dict[str, float] = {"steps": total}
    if validation is not None:
        logits = Engine(model, "torch", "fp32", device=str(device), batch_size=64).logits_of(validation)
        result["val_accuracy"] = top_k_accuracy(logits, np.array(validation.labels))
        print(
            f"{run.out}: {result['val_accuracy']:.1%} of {len(validation)} validation pictures right",
            file=sys.stderr,
        )
    provenance: dict[str, Any] = {
        "made_by": "beit finetune",
        "pictures": len(source),
        **result,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    save(model, run.out, provenance)
    return result


def open_validation(settings: Finetune, source: ImageSource) -> ImageSource | None:
    """The pictures to watch, their classes matched by name; None where there are none."""
    if settings.val is not None:
        return open_source(settings.val, "val", labelled=True).with_classes(source.classes)
    if has_split(settings.data, "train") and has_split(settings.data, "val"):
        return open_source(settings.data, "val", labelled=True).with_classes(source.classes)
    return None


def starting_model(settings: Finetune, source: ImageSource) -> BeitForImageClassification:
    """A classifier for the source's classes, from a model folder or, by a size's name, from nothing."""
    torch.manual_seed(settings.seed)
    if "/" not in settings.model and not Path(settings.model).exists() and not is_remote(settings.model):
        config = variant(settings.model).for_classification(len(source.classes))
        config = replace(
            config, img_size=settings.img_size or config.img_size, drop_path_rate=settings.drop_path
        )
        model = BeitForImageClassification(config)
        model.image_spec = unilm_spec(config.image_height_width[0])
        model.id2label = dict(enumerate(source.classes))
        print(f"{settings.model}: a fresh network, nothing is loaded", file=sys.stderr)
    else:
        start = load_model(settings.model, dtype=torch.float32)
        model, report = to_classifier(start, source.classes, settings.img_size, settings.drop_path)
        print(f"{settings.model}: {report}", file=sys.stderr)
    if settings.crop_ratio is not None:
        model.image_spec = replace(model.image_spec, crop_ratio=settings.crop_ratio)
    return model
