"""`beit finetune`: a pre-trained encoder and labelled pictures in, a classifier out (paper §2.6).

What no flag says is chosen from the pictures, printed, and kept in run.toml: which are held out to
validate on, how long to train, and whether to train the encoder at all. With few pictures a linear head on
frozen features is as good as anything; with more, fine-tuning has to beat it or it is the answer.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from torch import Tensor

from beit import distributed
from beit.augment import CropAndFlip, EraseAndMix, normalise, to_unit
from beit.checkpoints import load_model, save
from beit.classifier_report import Answers
from beit.criterion import Criterion, class_weights, right_of
from beit.data import BadImages, Loader, check_share, open_source
from beit.engine import Engine
from beit.finetune_defaults import RELEASED, chosen, run_name
from beit.finetune_report import write_report
from beit.flops import peak_flops, training_flops
from beit.frozen import FrozenClassifier, frozen_classifier
from beit.handover import to_classifier
from beit.hub import is_size, other_names
from beit.image import Preset, cropped_spec, preset_spec, unilm_spec
from beit.labelled import Labelled, Side, open_labelled
from beit.metrics import fit_temperature
from beit.model import Beit, BeitForImageClassification, variant
from beit.optim import EMA, adamw, cosine_schedule, param_groups, set_learning_rate, update
from beit.plural import counted
from beit.precision import Precision, autocast, resolve_precision
from beit.ranges import AboveZero, BelowOne, Compile, CropScale, Magnitude, NotNegative, Seed, Share
from beit.run import Run, check_folder, surroundings, weights_hash
from beit.settings import describe_settings, idle
from beit.split import data_hash, write_split
from beit.validation import Validation, logits_of, score

LOOKS = 50  # at the validation pictures, at most
ENOUGH_TO_CALIBRATE = 20  # validation pictures


@Parameter(name="*")
@dataclass(frozen=True)
class Finetune:
    data: Path
    """Folder with one sub-folder a class, or with train/ and val/ of such; a .csv of path,label, several
    labels with ; between; tar shards or Parquet."""
    _: KW_ONLY
    model: Annotated[str | None, Parameter(alias="-m")] = None
    """What to start from: a model folder or file, hub:owner/name, a name of `beit models`; or the name of
    a size, such as beit_tiny_patch8_64, to start from nothing, which is done where none is given."""
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    """Run folder; becomes the model that `classify -m` takes. DATA's name with .run where not given."""
    val: Path | None = None
    """Labelled pictures to validate on; DATA/val where that exists, else a share of DATA."""
    val_share: BelowOne | None = None
    """Share of each class to hold out where there are no others: 0.2, or 0.1 from 5,000 pictures on. 0
    holds none out."""
    method: Literal["head", "best", "full"] | None = None
    """head: a linear head on frozen features. full: train all. best: train all, and take the head where
    that is better. Chosen by the number of pictures; full where epochs, steps, batch size, lr, layer decay
    or crop scale are given."""
    use_epoch: Literal["best", "last"] = "best"
    """Which weights to keep: those that were best on the validation pictures, or the last."""
    img_size: PositiveInt | None = None
    """Pixels; the model's own where not given."""
    crop_ratio: AboveZero | None = None
    """Centre that evaluation looks at; the model's own, or 0.875 below 384 pixels, where not given; 1 shows
    all."""
    preset: Preset | None = None
    """Prepare pictures for evaluation by the rule of another code instead of the model's own."""
    drop_path: BelowOne = 0.1
    """Stochastic depth of the last block."""
    epochs: PositiveInt | None = None
    """Passes over the pictures; so many that 50,000 are seen where not given, from 10 to 100."""
    steps: NonNegativeInt = 0
    """Training steps; 0 follows `epochs`."""
    warmup_epochs: NotNegative | None = None
    """Of rising learning rate; 20, but at most a fifth of the run, where not given."""
    batch_size: PositiveInt | None = None
    """Pictures a step, over all that take part in it; 64 where not given, fewer below 640 pictures."""
    device_batch_size: NonNegativeInt = 0
    """At most so many at once, and as often as it takes; 0: all of a step together."""
    lr: NotNegative | None = None
    """Peak learning rate of the head, 0.001 where not given; the paper's 4e-3 is for a batch of 1024."""
    min_lr: NotNegative = 1e-6
    """Rate that the end comes near to; the peak where that is lower."""
    layer_decay: AboveZero | None = None
    """Each layer below learns this much slower: 0.65 base, 0.75 large where not given; 1 turns it off."""
    weight_decay: NotNegative = 0.05
    """AdamW's; biases, norms and positions have none."""
    clip_grad_norm: NotNegative = 0.0
    """0 turns clipping off."""
    ema_decay: BelowOne = 0.0
    """Validate and keep a running average of the weights, 0.9999 is usual, less in the first steps; 0 the
    weights themselves."""
    label_smoothing: BelowOne = 0.1
    """Share of a label that goes to all classes alike."""
    class_weights: Annotated[bool | None, Parameter(negative="--no-class-weights")] = None
    """Rare classes count more in the loss, by one over the root of their number; where not given, if one
    class has three times the pictures of another and no setting of training is given."""
    crop_scale: CropScale | None = None
    """Share of a picture's area that a crop covers; 0.08 to 1, the paper's, where not given, and from 0.3
    where all is chosen."""
    hflip: Share = 0.5
    """Probability of mirroring; 0 for writing and signs."""
    rand_augment: Magnitude = 0.0
    """Magnitude of RandAugment, up to 10; the paper's is 9. 0 turns it off."""
    reprob: Share = 0.0
    """Probability of erasing a box; the paper's is 0.25."""
    mixup: NotNegative = 0.0
    """How evenly two pictures are mixed; the paper's is 0.8. 0 turns it off."""
    cutmix: NotNegative = 0.0
    """How large a piece of another picture is pasted in; the paper's is 1. 0 turns it off."""
    calibrate: Annotated[bool, Parameter(negative="--no-calibrate")] = True
    """Divide the head by the temperature that fits the validation pictures best."""
    seed: Seed = 0
    """Of all that is drawn: weights, order, crops; the same one gives the same run."""
    precision: Precision = "auto"
    """bf16 where the processor has it (auto), or fp32."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    compile: Compile = False
    """Compile each block with torch.compile, which needs a compiler of C++."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto takes a GPU where there is one."""
    workers: NonNegativeInt = 2
    """Processes that prepare pictures; 0 leaves it to the run's own."""
    max_bad_images: Share = 0.01
    """Share of the pictures that may be unreadable, one at least unless 0; more stops with exit code 4."""
    log_every: PositiveInt = 50
    """Steps between lines of metrics.jsonl."""
    save_every: PositiveInt = 500
    """Steps between checkpoints; a quarter of an hour after the last there is one as well."""
    keep_last: PositiveInt = 2
    """The newest checkpoints stay."""
    keep_every: NonNegativeInt = 0
    """Those of every so many steps stay as well; a multiple of --save-every."""
    tensorboard: bool = False
    """Log to OUT/tensorboard too."""
    report: Annotated[bool, Parameter(negative="--no-report")] = True
    """Write OUT/report.html, and OUT/label_review.csv with the labels that look wrong first."""
    overwrite: bool = False
    """Begin again where the folder holds a run."""


class Batch(NamedTuple):
    """What a step sees, still on the CPU."""

    pictures: list[np.ndarray]  # uint8 (img_size, img_size, 3)
    indices: list[int]  # of the training pictures


def finetune(settings: Finetune) -> dict[str, Any]:
    """Fine-tune a model on labelled pictures; under torchrun, over all its processes."""
    with distributed.joined(settings.device) as device:
        return train(settings, device)


def train(settings: Finetune, device: torch.device) -> dict[str, Any]:
    """This process's share of it; returns the numbers of the finished model."""
    out = settings.out or Path(f"{run_name(settings.data)}.run")
    settings = replace(settings, out=out)
    open_source(settings.data, labelled=True)  # refuses what is none, before anything is waited for
    check_folder(out, settings, settings.overwrite)  # and so does this
    start = load_start(settings)
    data = open_labelled(
        settings.data, settings.val, settings.val_share, settings.seed, settings.workers
    )
    settings = choose(settings, data, None if start is None else start.config.depth)
    if settings.method != "head":  # refuses what cannot be, before it begins
        assert settings.batch_size
        length_of(settings, len(data.train.source))
        distributed.accumulation(settings.batch_size, settings.device_batch_size)
        check_share(len(data.train.source), settings.batch_size, distributed.size())
    hashes = {
        "data_hash": data_hash(data.everything, data.divided.looked),
        "train_hash": data_hash([data.train.source], None),  # by which `evaluate` knows them again
    }
    knows = start is not None and data.val is not None and knows_some(start.provenance, hashes)
    if knows:
        distributed.say(
            f"{settings.model}, or what it was begun from, has learned from some of the pictures that are "
            "held out now: their accuracy is too good. Begin from a model that has not, or with the --seed "
            "and --val-share of the first training"
        )
    model = starting_model(settings, start, data.classes).to(device)
    run = Run(out, settings, settings.overwrite)
    pictures = {"train": len(data.train.source), "val": len(data.val.source) if data.val else 0}
    begun_from = f"fresh {settings.model}" if start is None else weights_hash(start)
    run.begin(
        {**pictures, "data_hash": hashes["data_hash"], "model_hash": begun_from},
        surroundings(device, resolve_precision(settings.precision, device)),
    )
    if data.held_out and data.val is not None:
        parts = {"train": data.train, "val": data.val}
        distributed.on_main(lambda: write_split(run.out / "split.csv", parts))

    result: dict[str, Any] = {}
    frozen = None
    count, left_out = sum(map(len, data.everything)), data.divided.bad
    if settings.method != "head":  # whose loop counts those that it meets
        left_out = [b for b in left_out if b.sample >= len(data.everything[0])]
    bad = BadImages(run.out / "bad_images.csv", count, settings.max_bad_images)
    distributed.on_main(lambda: bad.add(left_out))
    if settings.method != "full":
        source, precision = data.train.source, settings.precision
        frozen = distributed.on_main(
            lambda: frozen_classifier(model, source, precision, settings.workers, settings.seed)
        )
        distributed.say(str(frozen))
    if settings.method != "head":
        result = fit(settings, data, model, run, device)
    final = model
    if frozen is not None:
        tuned = model if settings.method == "best" else None
        final, told = the_better(frozen, tuned, data.val, device)
        result |= told
    final.eval()
    final.config = replace(final.config, several_labels=data.several)
    logits = np.empty(0)
    if data.val is not None:
        logits = logits_of(scorer(final, device), data.val.source)
        if settings.calibrate and len(data.val.source) >= ENOUGH_TO_CALIBRATE:
            result["temperature"] = fit_temperature(logits, data.val.truth)
            logits = logits / result["temperature"]
            with torch.no_grad():  # in the head itself, so that whatever runs the model has it
                for tensor in final.head.parameters():
                    tensor.div_(result["temperature"])
        result["val_accuracy"] = score(logits, data.val.truth)["accuracy"]
        distributed.say(f"{run.out}: {in_words(result, data)}")
    provenance = {
        "made_by": "beit finetune",
        "pictures": len(data.train.source),
        **result,
        **({"batch_size": settings.batch_size} if settings.batch_size else {}),
        "seed": settings.seed,
        **hashes,
        **({"start_knew_val": True} if knows else {}),
    }
    distributed.on_main(lambda: save(final, run.out, provenance))
    if settings.report:
        answers = None if data.val is None else Answers(*data.val, logits, data.classes)
        view = view_of(settings, final) if settings.method != "head" else None
        mix = erasing_and_mixing(settings)
        report = partial(write_report, run, describe_settings(settings), provenance, data)
        distributed.on_main(lambda: report(answers, final, frozen, view, mix))
        distributed.say(f"next: beit classify PICTURES -m {shlex.quote(str(out))}")
    return result


def knows_some(provenance: Mapping[str, Any], hashes: Mapping[str, str]) -> bool:
    """Whether a model was fine-tuned on the same pictures, of which others were held out then, or was
    begun from such a one."""
    same = provenance.get("data_hash") == hashes["data_hash"]
    others = provenance.get("train_hash") != hashes["train_hash"]
    return same and (others or bool(provenance.get("start_knew_val")))


# What only a training has, not a head on frozen features.
OF_TRAINING = {
    "use_epoch", "drop_path", "epochs", "steps", "warmup_epochs", "batch_size", "device_batch_size", "lr",
    "min_lr", "layer_decay", "weight_decay", "clip_grad_norm", "ema_decay", "label_smoothing",
    "class_weights", "crop_scale", "hflip", "rand_augment", "reprob", "mixup", "cutmix",
    "gradient_checkpointing", "compile",
}  # fmt: skip


def choose(settings: Finetune, data: Labelled, depth: int | None) -> Finetune:
    """The settings with all that was not given; says what was chosen, and what is odd in the data."""
    new = chosen(vars(settings), data, depth)
    if settings.model is None:
        distributed.say(
            f"no --model was named: {new['model']} begins from nothing. A pre-trained one needs far fewer "
            f"pictures: give -m {RELEASED}, which is downloaded once; `beit models` lists all"
        )
    for remark in data.remarks():
        distributed.say(remark)
    if settings.val_share and not data.held_out:
        distributed.say("not used: val_share; pictures to validate on are given")
    if new:
        told = ", ".join(f"{name} {value}" for name, value in new.items())
        pictures = counted(len(data.train.source), "picture")
        distributed.say(f"chosen for {pictures} of {len(data.classes)} classes: {told}")
    if new.get("method", settings.method) == "head" and (unused := idle(settings, OF_TRAINING)):
        distributed.say(f"{unused}; a linear head is fitted, and --method best or full trains")
    if new.get("class_weights"):
        distributed.say(
            f"classes have {data.counts.min()} to {data.counts.max()} pictures: rare ones count more in "
            "the loss"
        )
    return replace(settings, **new)


# --- The models ----------------------------------------------------------------------------------


def load_start(settings: Finetune) -> Beit | None:
    """The trained model to begin with, before any work is done; None for one of a size."""
    if settings.model is None:
        return None
    if is_size(settings.model):
        variant(settings.model, other_names())  # refuses what is none
        return None
    return load_model(settings.model, dtype=torch.float32)


def starting_model(
    settings: Finetune, start: Beit | None, classes: Sequence[str]
) -> BeitForImageClassification:
    """A classifier for the classes, from a trained model or, by a size's name, from nothing."""
    assert settings.model is not None
    torch.manual_seed(settings.seed)
    if start is None:
        config = variant(settings.model).for_classification(len(classes))
        config = replace(
            config, img_size=settings.img_size or config.img_size, drop_path_rate=settings.drop_path
        )
        model = BeitForImageClassification(config)
        model.image_spec = unilm_spec(config.image_height_width[0])
        model.id2label = dict(enumerate(classes))
        distributed.say(f"{settings.model}: a fresh network, nothing is loaded")
    else:
        model, report = to_classifier(start, classes, settings.img_size, settings.drop_path)
        distributed.say(f"{settings.model}: {report}")
    if settings.preset is not None:
        model.image_spec = preset_spec(model.image_spec, settings.preset, model.config.embed_dim)
    if settings.crop_ratio is not None:
        model.image_spec = cropped_spec(model.image_spec, settings.crop_ratio)
    model.gradient_checkpointing = settings.gradient_checkpointing
    return model


def the_better(
    frozen: FrozenClassifier,
    tuned: BeitForImageClassification | None,
    val: Side | None,
    device: torch.device,
) -> tuple[BeitForImageClassification, dict[str, Any]]:
    """The fine-tuned model, unless the head on frozen features is better on the validation pictures."""
    told: dict[str, Any] = {"method": "linear head on frozen features", "head_layer": frozen.layer}
    if tuned is None or val is None:
        return frozen.model, told
    head, fine = (
        score(logits_of(scorer(model, device), val.source), val.truth)["accuracy"]
        for model in (frozen.model, tuned)
    )
    told |= {"head_accuracy": head, "finetuned_accuracy": fine}
    if fine >= head:
        return tuned, {**told, "method": "fine-tuned"}
    distributed.say(
        f"fine-tuning came to {fine:.1%} of the validation pictures, the linear head on frozen features "
        f"to {head:.1%}: the head is taken"
    )
    return frozen.model, told


def scorer(model: BeitForImageClassification, device: torch.device) -> Engine:
    """What scores: the same preparation and numbers as `classify` and `evaluate` have."""
    return Engine(model, "torch", "fp32", device=str(device), batch_size=64)


# --- The loop ------------------------------------------------------------------------------------


def fit(
    settings: Finetune,
    data: Labelled,
    model: BeitForImageClassification,
    run: Run,
    device: torch.device,
) -> dict[str, Any]:
    """Train the model, or go on with it; leaves it with the weights that are kept."""
    assert settings.batch_size
    assert settings.lr is not None
    model.train()
    config, spec = model.config, model.image_spec
    view = view_of(settings, model)
    erase_and_mix = erasing_and_mixing(settings)
    rank, world = distributed.rank(), distributed.size()
    loader = Loader.of_run(
        data.train.source, settings.batch_size, settings.seed, settings.workers, run.out,
        settings.max_bad_images, rank, world,
    )  # fmt: skip
    total, warmup = length_of(settings, len(data.train.source))
    batch_size = min(settings.batch_size, len(data.train.source))
    every = max(loader.steps_per_epoch, -(-total // LOOKS))
    watched = None
    if data.val is not None:
        watched = Validation(run.out, *data.val, model, device, settings.precision)
    truth = torch.tensor(data.train.truth)
    weights = class_weights(data.counts).to(device) if settings.class_weights else None
    criterion = Criterion(settings.label_smoothing, weights, data.several)

    if settings.compile:
        for block in model.blocks:
            block.compile()
    network = distributed.wrap(model)
    layer_decay = None if settings.layer_decay == 1 else settings.layer_decay
    groups = param_groups(model, settings.weight_decay, layer_decay, config.depth)
    optimizer = adamw(groups, settings.lr)
    ema = EMA(model, settings.ema_decay) if settings.ema_decay else None

    def batches(steps: range) -> Iterator[Batch]:
        for samples in loader.batches(steps, view):
            yield Batch([picture for _, picture in samples], [index for index, _ in samples])

    def kept() -> Mapping[str, Tensor]:
        return model.state_dict() if ema is None else ema.tensors

    for step, (pictures, indices) in run.steps(
        model,
        optimizer,
        total,
        batches,
        settings.save_every,
        settings.seed,
        ema=ema,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        batch_size=batch_size,
        flops_per_image=training_flops(config),
        peak_flops=peak_flops(device, settings.precision)[0],
        tensorboard=settings.tensorboard,
    ):
        if watched is not None and step and step % every == 0:
            with run.apart():
                watched.look(step, kept())
        lr = cosine_schedule(step, total, warmup, settings.lr, min(settings.min_lr, settings.lr))
        set_learning_rate(optimizer, lr)
        images = normalise(to_unit(pictures, device), spec)
        labels = truth[indices].to(device)
        step_rng = np.random.default_rng([settings.seed, step, 2, rank])
        images, wanted = erase_and_mix(images, labels, config.num_classes, step_rng)
        loss, right = torch.zeros(2, device=device)
        size = settings.device_batch_size or len(images)
        portions = list(zip(*(t.split(size) for t in (images, wanted, labels)), strict=True))
        for number, (some, targets, truths) in enumerate(portions, 1):
            with distributed.gradients_sent(network, last=number == len(portions)):
                with autocast(settings.precision, device):
                    logits = network(some)
                part_loss = criterion(logits.float(), targets) / len(images)
                part_loss.backward()
            loss += part_loss.detach()
            right += right_of(logits, truths)
        loss = distributed.mean(loss)
        grads = update(optimizer, loss, settings.clip_grad_norm)

        if (step + 1) % settings.log_every == 0 or step + 1 == total:
            run.log(
                step + 1,
                loss=loss.item(),
                train_accuracy=distributed.mean(right).item() / len(images),
                lr=lr,
                grad_norm=grads.norm.item(),
            )

    if loader.bad_images.found:
        print(f"{run.out}: {loader.bad_images}", file=sys.stderr)
    result: dict[str, Any] = {"steps": total}
    last = kept()
    if watched is not None:
        watched.look(total, last)
        if settings.use_epoch == "best":
            last = watched.best_weights()
            result["best_step"] = watched.best
    model.load_state_dict(last, strict=False)
    return result


def length_of(settings: Finetune, pictures: int) -> tuple[int, int]:
    """Steps of a run over so many training pictures, and of these the ones that warm up."""
    assert settings.batch_size
    steps_per_epoch = max(pictures // settings.batch_size, 1)
    total = settings.steps or (settings.epochs or 1) * steps_per_epoch
    if settings.warmup_epochs is None:
        return total, min(20 * steps_per_epoch, total // 5)
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if warmup >= total:
        raise ValueError(
            f"warmup_epochs {settings.warmup_epochs:g} is {counted(warmup, 'step')}, and the run has "
            f"{total:,}; give fewer than the run's epochs, or none: then it is a fifth of the run at most"
        )
    return total, warmup


def view_of(settings: Finetune, model: BeitForImageClassification) -> CropAndFlip:
    """What is done to one picture, in a worker."""
    assert settings.crop_scale is not None
    red, green, blue = (min(255, round(255 * value)) for value in model.image_spec.mean)
    return CropAndFlip(
        model.config.image_height_width,
        settings.crop_scale,
        hflip=settings.hflip,
        rand_augment=settings.rand_augment,
        fill=(red, green, blue),
    )


def erasing_and_mixing(settings: Finetune) -> EraseAndMix:
    """What is done to a batch, on its device."""
    return EraseAndMix(settings.reprob, settings.mixup, settings.cutmix)


def in_words(result: dict[str, Any], data: Labelled) -> str:
    """The result in a line."""
    assert data.val is not None
    what = "mean average precision on" if data.several else "of"
    text = f"{result['val_accuracy']:.1%} {what} {counted(len(data.val.source), 'validation picture')}"
    text += "" if data.several else " right"
    if "best_step" in result and result.get("method") != "linear head on frozen features":
        text += f"; the best of the epochs, step {result['best_step']} of {result['steps']}"
    return text
