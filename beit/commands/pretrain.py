"""`beit pretrain`: masked image modelling, BEiT's own pre-training (paper §2)."""

from __future__ import annotations

import difflib
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor, nn

from beit import distributed
from beit.augment import Filter, TwoViews, normalise, to_unit
from beit.checkpoints import load_model, save
from beit.data import ImageSource, Loader, check_share, open_source, sample_rng
from beit.features import default_layer
from beit.flops import peak_flops, training_flops
from beit.handover import hand_over
from beit.hub import HubError, is_size, other_names
from beit.image import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    BadImage,
    ImageSpec,
    OpenImage,
    cropped_spec,
)
from beit.masking import sample_mask, sample_random_mask
from beit.model import BeitConfig, BeitForMaskedImageModeling, masked_of, variant
from beit.optim import adamw, cosine_schedule, param_groups, set_learning_rate, update
from beit.plural import counted
from beit.precision import Precision, autocast, resolve_precision
from beit.ranges import AboveZero, BelowOne, Compile, CropScale, NotNegative, Numbers, Seed, Share
from beit.run import Run, check_folder, surroundings, weights_hash
from beit.settings import idle, settings_in_words
from beit.split import data_hash
from beit.tally import Tally
from beit.tokenizer import DalleTokenizer, PixelTargets, Tokenizer, count_tokens
from beit.tokenizer_files import AnyTokenizer, load_tokenizer
from beit.visualize import hide_patches, mark_patches, strip, to_bytes
from beit.watch import Watch, probe_pictures


@Parameter(name="*")
@dataclass(frozen=True)
class Pretrain:
    data: Path
    """Folder of pictures, tar shards, Parquet, .csv or .txt; labels are not used."""
    _: KW_ONLY
    tokenizer: Path
    """Tokenizer folder, as `train-tokenizer` leaves it; OpenAI's encoder.pkl, or a VQ-KD file; or the
    word pixels, to guess the hidden patches themselves instead (the paper's ablation)."""
    out: Annotated[Path, Parameter(alias="-o")]
    """Run folder; becomes the model that `finetune -m` takes."""
    model: Annotated[str, Parameter(alias="-m")] = "beit_base_patch16_224"
    """Size of the encoder, by name; or a trained BEiT of any format to go on from."""
    img_size: PositiveInt | None = None
    """Patch view in pixels; the model's own where not given."""
    crop_ratio: AboveZero | None = None
    """Centre that evaluation looks at; 0.875 below 384 pixels where not given, 1 shows all."""
    init_values: NotNegative | None = None
    """LayerScale at the start; the model's own where not given."""
    drop_path: BelowOne = 0.1
    """Stochastic depth of the last block."""
    num_mask_patches: PositiveInt | None = None
    """Patches to hide; the paper's share (75 of 196) where not given."""
    min_block: PositiveInt | None = None
    """Smallest block in patches; the paper's share (16 of 196) where not given."""
    masks: Literal["blocks", "random"] = "blocks"
    """Hide blocks of patches, or single ones anywhere (the paper's ablation)."""
    exact_masks: bool = False
    """Hide just so many, as BEiT v2 does; v1 hides at most so many."""
    epochs: PositiveInt = 800
    """Passes over the pictures, each without its last batch where that is short."""
    steps: NonNegativeInt = 0
    """Training steps; 0 follows `epochs`."""
    warmup_epochs: NotNegative = 10.0
    """Of rising learning rate; half of the run at most."""
    warmup_steps: NonNegativeInt = 0
    """0 follows `warmup_epochs`."""
    batch_size: PositiveInt = 256
    """Pictures a step, over all that take part in it."""
    device_batch_size: NonNegativeInt = 0
    """At most so many at once, and as often as it takes; 0: all of a step together."""
    lr: NotNegative = 1.5e-3
    """Peak learning rate: the paper's, of base at a batch of 2048. Small networks did best here at 4e-3 to
    8e-3 with a batch of 64."""
    min_lr: NotNegative = 1e-5
    """Rate that the end comes near to; the peak where that is lower."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's."""
    weight_decay: NotNegative = 0.05
    """AdamW's; biases, norms and positions have none."""
    clip_grad_norm: NotNegative = 3.0
    """0 turns clipping off."""
    crop_scale: CropScale = (0.08, 1.0)
    """Share of a picture's area that a crop covers."""
    hflip: Share = 0.5
    """Probability of mirroring; 0 for writing and signs."""
    color_jitter: NotNegative = 0.4
    """Strength of changes in brightness, contrast and saturation; 0 turns them off."""
    token_filter: Filter = "lanczos"
    """How the tokenizer's view is resized: lanczos in v1, bicubic in v2."""
    statistics: Literal["half", "imagenet"] | None = None
    """Mean and deviation of the encoder's pictures: 0.5 in v1's ImageNet-22k runs, ImageNet's else; as the
    model that it goes on from has them, or 0.5."""
    tokenizer_fp16: bool = False
    """DALL-E's convolutions in float16, as the published runs had them; a token in a thousand differs."""
    seed: Seed = 0
    """Of all that is drawn: weights, order, crops; the same one gives the same run."""
    precision: Precision = "auto"
    """bf16 where the processor has it (auto), or fp32."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    compile: Compile = False
    """Compile each block, and DALL-E's encoder, with torch.compile: half a minute to two
    more to start, and it needs a compiler of C++."""
    shard: bool = False
    """Spread weights and moments over the processes (FSDP2), for models that do not fit one GPU."""
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
    probe_data: Path | None = None
    """Labelled pictures to probe the features with while it runs, up to 10,000 of train and 5,000 of val;
    where there is no val a fifth is held out."""
    probe_layers: Numbers = ()
    """Blocks to look at, counted from 1: effective rank and, with --probe-data, probes. The paper's, 9 of
    12, and the last where none is named."""
    look_epochs: NonNegativeInt = 0
    """Epochs between looks: pictures of the guesses, probes, report.html. 0: pictures each epoch, in a run
    of over 100 epochs 100 times at most, and probes about ten times."""
    tensorboard: bool = False
    """Log to OUT/tensorboard too."""
    peak_tflops: NotNegative = 0.0
    """What MFU is a share of; 0: known or measured."""
    overwrite: bool = False
    """Begin again where the folder holds a run."""


class Batch(NamedTuple):
    """What a step sees, still on the CPU."""

    patch_views: list[np.ndarray]  # uint8 (img_size, img_size, 3)
    token_views: list[np.ndarray]  # uint8 (token_size, token_size, 3)
    masks: np.ndarray  # bool (B, h, w)

    @classmethod
    def of(cls, samples: list[tuple[np.ndarray, ...]]) -> Batch:
        """The batch of what was prepared of each picture."""
        patch_views, token_views, masks = zip(*samples, strict=True)
        return cls(list(patch_views), list(token_views), np.stack(masks))

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in parts of at most `size` pictures; 0 leaves it whole."""
        size = size or len(self.masks)
        for start in range(0, len(self.masks), size):
            some = slice(start, start + size)
            yield Batch(self.patch_views[some], self.token_views[some], self.masks[some])


def pretrain(settings: Pretrain) -> dict[str, float]:
    """Pre-train a BEiT on pictures without labels; under torchrun, over all its processes."""
    with distributed.joined(settings.device) as device:
        return train(settings, device)


def train(settings: Pretrain, device: torch.device) -> dict[str, float]:
    """This process's share of it; returns the last logged numbers."""
    source = open_source(settings.data)
    check_folder(settings.out, settings, settings.overwrite)
    tokenizer, tokenizer_hash = open_tokenizer(settings, device)
    model, model_hash = starting_model(settings, tokenizer.vocab_size, tokenizer_hash)
    model.to(device).train()
    model.gradient_checkpointing = settings.gradient_checkpointing
    config = model.config
    sample = Sampler.of(settings, config, tokenizer)
    distributed.accumulation(settings.batch_size, settings.device_batch_size)  # refuses what cannot be
    check_share(len(source), settings.batch_size, distributed.size())
    layers, labelled = probed(settings, config.depth)

    run = Run(settings.out, settings, settings.overwrite)
    loader = Loader.of_run(
        source,
        settings.batch_size,
        settings.seed,
        settings.workers,
        run.out,
        settings.max_bad_images,
        distributed.rank(),
        distributed.size(),
    )
    total, warmup = length_of(settings, loader.steps_per_epoch)
    batch_size = min(settings.batch_size, len(source))
    peak, peak_from = peak_flops(device, settings.precision, settings.peak_tflops)
    precision = resolve_precision(settings.precision, device)
    distributed.say(settings_in_words(settings))
    if settings.masks == "random" and (unused := idle(settings, ("min_block", "exact_masks"))):
        distributed.say(
            f"{unused}; patches hidden at random are no blocks, and as many as there are to be"
        )
    run.begin(
        {
            "pictures": len(source), "data_hash": data_hash([source], None),
            "tokenizer_hash": tokenizer_hash, "model_hash": model_hash,
            "img_size": config.image_height_width[0],
            "num_mask_patches": sample.num_masked, "min_block": sample.min_block, "steps": total,
            "warmup_steps": warmup, "vocab_size": tokenizer.vocab_size,
        },
        surroundings(device, precision),
    )  # fmt: skip
    distributed.say(
        f"{run.out}: {counted(len(source), 'picture')}, {counted(total, 'step')} of {batch_size}, "
        f"{total * batch_size / len(source):.1f} epochs; {sample}, "
        f"{'pixels' if isinstance(tokenizer, PixelTargets) else f'{tokenizer.vocab_size} tokens'}; "
        f"{distributed.size()} x {device.type} in "
        f"{precision}, peak {peak / 1e12:.3g} TFLOP/s ({peak_from})"
    )
    if settings.compile:
        if isinstance(tokenizer, DalleTokenizer):
            tokenizer.encoder.compile()
        for block in (*model.blocks, *getattr(model, "cls_pt_layers", ())):  # v2 has more
            block.compile()
    network = distributed.wrap(MaskedLogits(model), settings.shard)
    optimizer = adamw(param_groups(model, settings.weight_decay), settings.lr, settings.betas)

    def batches(steps: range) -> Iterator[Batch]:
        for samples in loader.batches(steps, sample):
            yield Batch.of([value for _, value in samples])

    shown = some_samples(source, sample, settings.seed)
    watch = Watch(
        run.out,
        source,
        layers,
        settings.precision,
        settings.workers,
        lambda looked_at: draw_predictions(looked_at, tokenizer, shown) if shown else None,
        *labelled,
    )
    tally = None if isinstance(tokenizer, PixelTargets) else Tally(tokenizer.vocab_size).to(device)
    draw_every, probe_every = look_steps(settings.look_epochs, loader.steps_per_epoch, total)
    for step, batch in run.steps(
        model,
        optimizer,
        total,
        batches,
        settings.save_every,
        settings.seed,
        tally=tally,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        look_every=probe_every,
        batch_size=batch_size,
        flops_per_image=training_flops(config, sample.num_masked),
        peak_flops=peak,
        tensorboard=settings.tensorboard,
    ):
        if step % draw_every == 0:
            look(watch, run, model, step, tokenizer.vocab_size, probe=step % probe_every == 0)
        lr = cosine_schedule(step, total, warmup, settings.lr, min(settings.min_lr, settings.lr))
        set_learning_rate(optimizer, lr)
        guessed = guess_hidden(
            network, tokenizer, batch, model.image_spec, settings.precision, device,
            settings.device_batch_size,
        )  # fmt: skip
        if tally is not None:
            if step % settings.log_every == 0:
                tally.clear()
            tally.add(guessed.used)
        state = update(optimizer, guessed.loss, settings.clip_grad_norm)
        if (step + 1) % settings.log_every == 0 or step + 1 == total:
            run.log(step + 1, **guessed.in_numbers(tally), lr=lr, grad_norm=state.norm.item())

    look(watch, run, model, total, tokenizer.vocab_size)
    if loader.bad_images.found:
        print(f"{run.out}: {loader.bad_images}", file=sys.stderr)
    provenance: dict[str, Any] = {
        "made_by": "beit pretrain",
        "tokenizer_hash": tokenizer_hash,
        "pictures": len(source),
        "steps": total,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    whole = distributed.unsharded(model, lambda: BeitForMaskedImageModeling(config)).eval()
    whole.image_spec = model.image_spec
    distributed.on_main(lambda: save(whole, run.out, provenance))
    lines = run.read_metrics() or [{}]  # somebody may have removed them
    last = {k: v for k, v in lines[-1].items() if isinstance(v, (int, float))}
    distributed.say(
        f"{run.out}: {counted(total, 'step')}, {how_it_ended(last, tokenizer.vocab_size)}; "
        f"see {run.out / 'report.html'}"
    )
    distributed.say(f"next: beit finetune LABELLED -m {shlex.quote(str(run.out))}")
    return last


# --- What is learned from ------------------------------------------------------------------------


def open_tokenizer(settings: Pretrain, device: torch.device) -> tuple[AnyTokenizer | PixelTargets, str]:
    """What says what is to be guessed, and what it is known by: a trained tokenizer's weights or, by the
    word pixels, the pixels."""
    place = settings.tokenizer
    tokenizer: AnyTokenizer | PixelTargets = PixelTargets()
    if str(place) == "pixels":
        known_by = "pixels"
    elif not place.exists() and difflib.get_close_matches(str(place), ["pixels"]):
        raise HubError(f"{place} does not exist; did you mean the word pixels?")
    else:
        tokenizer = load_tokenizer(place)
        known_by = weights_hash(tokenizer)
    if settings.tokenizer_fp16:
        if not isinstance(tokenizer, DalleTokenizer):
            raise ValueError(f"--tokenizer-fp16 is for DALL-E's; {place} is another kind")
        tokenizer.use_float16()
    tokenizer.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return tokenizer, known_by


@dataclass(frozen=True)
class Sampler:
    """What is drawn of a picture: two views of one crop, and which of its patches are hidden (h, w)."""

    views: TwoViews
    grid: tuple[int, int]
    num_masked: int
    min_block: int
    blocks: bool  # else single patches, anywhere
    exact: bool

    @classmethod
    def of(cls, settings: Pretrain, config: BeitConfig, tokenizer: Tokenizer) -> Sampler:
        """As the settings say, else by the paper's shares. Refuses masks that cannot be."""
        height, width = config.grid
        num_masked, min_block = paper_masks(height, width)
        views = TwoViews(
            img_size=config.image_height_width[0],
            token_size=height * tokenizer.stride,  # so that each patch has its token
            crop_scale=settings.crop_scale,
            hflip=settings.hflip,
            color_jitter=settings.color_jitter,
            token_filter=settings.token_filter,
        )
        side, trained = views.token_size, " x ".join(map(str, tokenizer.view_size))
        if tokenizer.view_size != (side, side) and not isinstance(tokenizer, PixelTargets):
            distributed.say(
                f"the tokenizer sees views of {side} x {side} here, though it was trained on {trained}"
            )
        sampler = cls(
            views,
            config.grid,
            settings.num_mask_patches or num_masked,
            settings.min_block or min_block,
            settings.masks == "blocks",
            settings.exact_masks,
        )
        sampler.mask(np.random.default_rng(0))  # raises what is to be raised
        return sampler

    def __call__(self, picture: OpenImage, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return *self.views(picture, rng), self.mask(rng)

    def mask(self, rng: np.random.Generator) -> np.ndarray:
        """Which patches to hide, bool (h, w)."""
        if not self.blocks:
            return sample_random_mask(self.grid, self.num_masked, rng)
        return sample_mask(self.grid, self.num_masked, rng, min_block=self.min_block, exact=self.exact)

    def __str__(self) -> str:
        how = f"in blocks of {self.min_block} or more" if self.blocks else "at random"
        height, width = self.grid
        return f"{self.num_masked} of {height} x {width} patches hidden, {how}"


def paper_masks(height: int, width: int) -> tuple[int, int]:
    """Patches to hide of h x w, and the smallest block of them: the paper's shares of 14 x 14."""
    return round(75 / 196 * height * width), max(1, round(16 / 196 * height * width))


def length_of(settings: Pretrain, steps_per_epoch: int) -> tuple[int, int]:
    """Steps of the run, and of its warm-up, which is half of it at most."""
    total = settings.steps or settings.epochs * steps_per_epoch
    warmup = settings.warmup_steps or round(settings.warmup_epochs * steps_per_epoch)
    if warmup > total // 2:
        distributed.say(
            f"warm-up: {counted(total // 2, 'step')}, half of this run, instead of {warmup:,}"
        )
        warmup = total // 2
    return total, warmup


def starting_model(
    settings: Pretrain, vocab_size: int, tokenizer_hash: str
) -> tuple[BeitForMaskedImageModeling, str]:
    """A fresh encoder of a named size, or the encoder of a trained model, both to guess V tokens; and what
    it is known by.

    A trained one's head stays, unless it has learned another tokenizer's tokens.
    """
    torch.manual_seed(settings.seed)
    if is_size(settings.model):
        config, start = variant(settings.model, other_names()).for_pretraining(vocab_size), None
        known_by = f"fresh {settings.model}"
    else:
        start = load_model(settings.model, dtype=torch.float32)
        known_by = weights_hash(start)
        config = replace(start.config, use_mask_token=True, vocab_size=vocab_size, num_classes=0)
    if settings.init_values is not None:
        if start is not None and settings.init_values != config.init_values:
            raise ValueError(
                f"--init-values {settings.init_values} is for a fresh encoder; {settings.model} is "
                f"trained, with {config.init_values}: leave it out"
            )
        config = replace(config, init_values=settings.init_values)
    model = BeitForMaskedImageModeling(
        replace(config, img_size=settings.img_size or config.img_size, drop_path_rate=settings.drop_path)
    )
    size = model.config.image_height_width
    if size[0] != size[1]:
        raise ValueError(
            f"{settings.model} takes pictures of {size}; pre-training takes squares: --img-size"
        )
    if start is not None:  # it knows pictures as it was taught
        model.image_spec = replace(start.image_spec, size=size)
    if settings.statistics is not None:
        mean, std = (HALF, HALF) if settings.statistics == "half" else (IMAGENET_MEAN, IMAGENET_STD)
        model.image_spec = replace(model.image_spec, mean=mean, std=std)
    if settings.crop_ratio is not None:
        model.image_spec = cropped_spec(model.image_spec, settings.crop_ratio)
    if start is not None:
        learned = start.provenance.get("tokenizer_hash", tokenizer_hash)  # of others' it is not known
        same_tokens = start.config.vocab_size == vocab_size and learned == tokenizer_hash
        tensors = {
            name: tensor
            for name, tensor in start.state_dict().items()
            if same_tokens or not name.startswith("lm_head.")
        }
        taken, report, unknown = hand_over(tensors, start.config, model)
        assert not unknown, f"tensors that passed for known are not: {unknown}"
        model.load_state_dict(taken, strict=False)
        print(f"{settings.model}: {report}", file=sys.stderr)
    return model, known_by


# --- The step ------------------------------------------------------------------------------------


class Guessed(NamedTuple):
    """What came of a batch whose hidden tokens were guessed, on the device."""

    loss: Tensor  # mean over the hidden tokens of all processes
    hidden: Tensor  # how many a process has, on average
    patches: int  # of this process's pictures
    right: Tensor  # of its hidden tokens, guessed exactly
    used: Tensor  # int64 (V,), how often its pictures have each token; (0,) for pixels

    def in_numbers(self, tally: Tally | None) -> dict[str, float]:
        """As they are logged, with the tokens since the line before. All processes must call this."""
        numbers = {"loss": self.loss.item()}
        if tally is not None:
            use = tally.use()
            numbers["token_accuracy"] = (distributed.mean(self.right) / self.hidden).item()
            numbers["commonest_token"] = use.commonest
            numbers["target_perplexity"] = use.perplexity
        numbers["masked_ratio"] = self.hidden.item() / self.patches
        return numbers


def guess_hidden(
    network: nn.Module,
    tokenizer: Tokenizer,
    batch: Batch,
    spec: ImageSpec,
    precision: Precision,
    device: torch.device,
    at_once: int = 0,
) -> Guessed:
    """Guess the hidden tokens of a batch, in parts of at most so many pictures; gradients are added up."""
    hidden = distributed.mean(torch.tensor(float(batch.masks.sum()), device=device))
    loss, right = torch.zeros(2, device=device)
    tokens = 0 if isinstance(tokenizer, PixelTargets) else tokenizer.vocab_size
    used = torch.zeros(tokens, dtype=torch.int64, device=device)
    parts = list(batch.parts(at_once))
    for number, part in enumerate(parts, 1):
        images = normalise(to_unit(part.patch_views, device), spec)
        masks = torch.from_numpy(part.masks)  # (B, h, w), on the CPU: see `masked_of`
        token_ids = tokenizer.encode(to_unit(part.token_views, device))  # (B, h, w)
        targets = masked_of(token_ids, masks)  # (M,), in the order of the logits
        with distributed.gradients_sent(network, last=number == len(parts)):
            with autocast(precision, device):
                logits = network(images, masks)
            # Of all processes' masked patches the mean: DDP averages what each sums.
            part_loss = torch.stack([masked_loss(each, targets) for each in logits]).sum() / hidden
            part_loss.backward()
        loss += part_loss.detach()
        if tokens:
            right += (logits[0].argmax(dim=-1) == targets).sum()
            used += count_tokens(token_ids, tokens)
    return Guessed(distributed.mean(loss), hidden, batch.masks.size, right, used)


class MaskedLogits(nn.Module):
    """What pre-training asks of a model, as one forward pass for DDP and FSDP2 to see."""

    def __init__(self, model: BeitForMaskedImageModeling) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
        """The (M, V) logits of the masked patches; two sets of them where v2's extra blocks are there."""
        if self.model.config.early_layer:
            return self.model.forward_aggregated(images, masks)
        return (self.model(images, masks),)


def masked_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of (M, V) logits with (M,) tokens; or of guessed pixels with (M, V) pixels
    the mean squared error, summed over patches."""
    if targets.is_floating_point():
        return F.mse_loss(logits.float(), targets, reduction="none").mean(dim=1).sum()
    return F.cross_entropy(logits.float(), targets, reduction="sum")


# --- Is it working? ------------------------------------------------------------------------------


def probed(settings: Pretrain, depth: int) -> tuple[tuple[int, ...], tuple[ImageSource, ...]]:
    """The layers to look at; the pictures to fit probes to, and those to score them on, or ()."""
    layers = settings.probe_layers or tuple(sorted({default_layer(depth), depth}))
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"--probe-layers {' '.join(map(str, layers))}: a layer is from 1 to {depth}")
    if settings.probe_data is None:
        return layers, ()
    return layers, probe_pictures(settings.probe_data, settings.seed, settings.workers)


def look_steps(look_epochs: int, steps_per_epoch: int, total: int) -> tuple[int, int]:
    """Steps from one sheet of pictures to the next, and from one probe, which takes longer, to the next.

    The epochs given, or pictures each epoch but at most 100 times, and about ten probes; ten of both where
    there are fewer epochs.
    """
    if look_epochs:
        return look_epochs * steps_per_epoch, look_epochs * steps_per_epoch
    epochs = total // steps_per_epoch
    if epochs < 10:
        return max(1, total // 10), max(1, total // 10)
    draw_every = -(-epochs // 100) * steps_per_epoch
    return draw_every, draw_every * max(1, round(total / draw_every / 10))


def look(
    watch: Watch,
    run: Run,
    model: BeitForMaskedImageModeling,
    step: int,
    vocab_size: int,
    probe: bool = True,
) -> None:
    """Look at a model, in the main process; all must call this."""
    looked_at = distributed.unsharded(model, lambda: BeitForMaskedImageModeling(model.config))
    looked_at.image_spec = model.image_spec

    def work() -> None:
        watch.look(looked_at.to(model.cls_token.device), step, probe)
        width = model.config.embed_dim
        heads = 2 if model.config.early_layer else 1
        rows = expected_ranges(run, watch.alike, vocab_size, width, heads)
        watch.write_page(f"Pre-training of {run.out.name}", rows, width)

    doing = ""
    if probe and watch.train is not None and watch.test is not None:
        doing = f"probing it at step {step:,} on {len(watch.train) + len(watch.test):,} pictures"
    with run.apart(doing):
        run.look(step, work, is_first=not watch.looks)


def expected_ranges(
    run: Run, looked: list[dict[str, Any]], vocab_size: int, width: int, heads: int
) -> list[tuple[str, str, str]]:
    """(what, what came, what is usual) rows; empty before the first logged step.

    heads: cross-entropies that the loss is the sum of, 2 for v2.
    """
    metrics = run.read_metrics()
    if not metrics:
        return [("steps", "0", "the network before its first step")]
    last, first, now = metrics[-1], looked[0], looked[-1]
    tokens = "token_accuracy" in last
    blind = heads * (math.log(last["target_perplexity"]) if tokens else 1.0)
    rank = next(key for key in now if key.startswith("effective_rank"))
    published = "; about 5 % at the end with DALL-E's 8,192" if vocab_size == 8192 else ""
    blindly = last.get("commonest_token", 1 / vocab_size)
    guessing = f"above {blindly:.1%}, the share of the commonest token{published}"
    alive = f"not falling towards 1; {first[rank]:.0f} at step {first['step']}"
    waiting = f"{last.get('data_wait_percent', 0):.0f} %"
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.3f}"
    rows = [
        ("steps", f"{last['step']:,}", ""),
        ("loss", loss, f"below {blind:.3f}, which is guessing without looking"),
        (f"{rank.replace('_', ' ')} of {width}", f"{now[rank]:.0f}", alive),
        ("waiting for pictures", waiting, "below 5 %; else more --workers"),
        ("updates left out, not finite", f"{last.get('skipped', 0)}", "0"),
    ]
    if tokens:
        perplexity = f"{last['target_perplexity']:.0f} of {vocab_size}"
        rows[2:2] = [
            ("hidden tokens guessed", f"{last['token_accuracy']:.1%}", guessing),
            ("tokens in use (perplexity)", perplexity, "steady"),
        ]
    return rows


def how_it_ended(last: dict[str, Any], vocab_size: int) -> str:
    """The last line of metrics, which may be of a step that was left out, in words."""
    if not last:
        return "its metrics are gone"
    loss = f"loss {last.get('loss', math.nan):.3f}"
    if "token_accuracy" not in last:
        return f"{loss}, 1 or less is guessing each patch's mean"
    normal = "; about 5 % is normal for 8192 tokens" if vocab_size == 8192 else ""
    blindly = last.get("commonest_token", 1 / vocab_size)
    return (
        f"{loss}, {last['token_accuracy']:.1%} of masked tokens guessed, {blindly:.1%} by always saying "
        f"the commonest{normal}"
    )


def some_samples(
    source: ImageSource,
    prepare: Callable[[OpenImage, np.random.Generator], tuple[np.ndarray, ...]],
    seed: int,
    most: int = 8,
) -> Batch | None:
    """The same few pictures for each look, spread over the source; None if none can be read."""
    found = []
    for index in np.linspace(0, len(source) - 1, min(most, len(source))).astype(int):
        with suppress(BadImage):
            found.append(prepare(source.open(int(index)), sample_rng(seed, 0, int(index))))
    return Batch.of(found) if found else None


@torch.no_grad()
def draw_predictions(
    model: BeitForMaskedImageModeling, tokenizer: Tokenizer, batch: Batch
) -> Image.Image:
    """A sheet, a row a picture: the patch view; what is left of it; its tokens, drawn; the same with the
    masked ones as the model guesses them; which of these are right. Without the drawings for a tokenizer
    that cannot draw; pixels are guessed with each patch's mean and deviation given, none right or wrong."""
    device = model.cls_token.device
    images = normalise(to_unit(batch.patch_views, device), model.image_spec)
    masks = torch.from_numpy(batch.masks).to(device)
    token_views = to_unit(batch.token_views, device)
    truth = tokenizer.encode(token_views)
    guesses, guessed = model(images, masks), truth.clone()
    columns = [
        batch.patch_views,
        [hide_patches(*pair) for pair in zip(batch.patch_views, batch.masks, strict=True)],
    ]
    if isinstance(tokenizer, PixelTargets):
        guessed[masks] = guesses.float()
        columns += [list(to_bytes(tokenizer.draw(said, token_views))) for said in (truth, guessed)]
    else:
        guessed[masks] = guesses.argmax(dim=-1)
        if tokenizer.can_draw:
            columns += [list(to_bytes(tokenizer.decode(ids))) for ids in (truth, guessed)]
        right = (guessed == truth).cpu().numpy()
        each = zip(batch.patch_views, batch.masks, right, strict=True)
        columns.append([mark_patches(*one) for one in each])
    return strip(list(zip(*columns, strict=True)))
