"""`beit train-tokenizer`: learn a vocabulary of visual tokens from one's own pictures."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor, nn

from beit import distributed
from beit.atomic import write_atomically
from beit.augment import CropAndFlip, normalise, to_unit
from beit.checkpoints import load_model
from beit.data import ImageSource, Loader, check_share, open_source
from beit.features import default_layer
from beit.graphs import open_program
from beit.hub import resolve, sha256_of
from beit.image import BadImage, ImageSpec, resize_and_crop
from beit.metrics import CodebookUse, codebook_use, psnr
from beit.model import Beit, BeitForMaskedImageModeling, check_size, variant
from beit.optim import adamw, cosine_schedule, param_groups, update
from beit.plural import counted
from beit.precision import Precision, autocast, resolve_precision
from beit.progress import Progress
from beit.ranges import CropScale, NotNegative, Seed, Share
from beit.report import Page
from beit.run import Run, check_folder, read_metrics, surroundings
from beit.settings import idle, settings_in_words
from beit.split import data_hash
from beit.tally import Tally
from beit.tokenizer import DiscreteVAE, DiscreteVAEConfig, count_tokens
from beit.tokenizer_files import save_tokenizer
from beit.visualize import img_tag, line_chart, png_bytes, strip, to_bytes
from beit.vqkd import VQKD, VQKDConfig, mean_patches, patch_pixels

Teacher = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) in [0, 1] -> (B, L, T), a row a token
# Of each kind, the settings of the other.
NOT_OF = {
    "dvae": ("teacher", "model", "decoder_depth"),
    "vqkd": ("hidden_dim", "num_layers", "quantizer"),
}


@Parameter(name="*")
@dataclass(frozen=True)
class TrainTokenizer:
    data: Path
    """Folder of pictures, tar shards, Parquet, .csv or .txt; labels are not used."""
    _: KW_ONLY
    out: Annotated[Path, Parameter(alias="-o")]
    """Run folder; becomes the tokenizer that `pretrain --tokenizer` takes."""
    kind: Literal["dvae", "vqkd"] = "dvae"
    """Give the picture back (dvae, BEiT v1), or what a teacher says of each patch (vqkd, BEiT v2)."""
    img_size: PositiveInt | None = None
    """Token view in pixels; 112 (BEiT's 224-pixel pictures are seen so), or vqkd's model's own."""
    vocab_size: PositiveInt = 8192
    """Number of visual tokens; fewer for little data."""
    code_dim: PositiveInt | None = None
    """Width of a code; 16, or vqkd's 32."""
    hidden_dim: PositiveInt = 128
    """dvae: channels of encoder and decoder."""
    num_layers: PositiveInt = 3
    """dvae: halvings; a token stands for 2^num_layers pixels each way."""
    quantizer: Literal["vq", "gumbel"] = "vq"
    """dvae: how a code is chosen; `vq` keeps more of them alive."""
    teacher: str = "none"
    """vqkd: a model, as -m takes it elsewhere; a torch.export .pt2, a program, so with
    BEIT_TRUST_PT2=1; or none, for the pixels of the pictures themselves."""
    model: Annotated[str, Parameter(alias="-m")] = "beit_base_patch16_224"
    """vqkd: size of the encoder, by name."""
    decoder_depth: PositiveInt = 3
    """vqkd: blocks of the decoder; 1 or 3 in the paper."""
    revive_after_steps: NonNegativeInt = 20
    """A code unused this long takes a fresh place; 0 never, as BEiT v2 has it."""
    epochs: PositiveInt = 20
    """Passes over the pictures, each without its last batch where that is short."""
    steps: NonNegativeInt = 0
    """Training steps; 0 follows `epochs`."""
    batch_size: PositiveInt = 64
    """Pictures a step, over all that take part in it."""
    device_batch_size: NonNegativeInt = 0
    """At most so many at once, and as often as it takes; 0: all of a step together. The codebook moves once
    a step, by all of it; a dvae's parts are drawn with its codes of before."""
    lr: NotNegative = 1e-3
    """Peak learning rate of AdamW."""
    min_lr: NotNegative | None = None
    """Where the rate ends; a hundredth of the peak where not given."""
    warmup_epochs: NotNegative | None = None
    """A tenth of the run, 100 steps at most, where not given."""
    crop_scale: CropScale = (0.3, 1.0)
    """Share of a picture's area that a training crop covers."""
    hflip: Share = 0.5
    """Probability of mirroring; 0 for writing and signs."""
    seed: Seed = 0
    """Of all that is drawn: weights, order, crops; the same one gives the same run."""
    precision: Precision = "auto"
    """bf16 where the processor has it (auto), or fp32."""
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
    overwrite: bool = False
    """Begin again where the folder holds a run."""


def train_tokenizer(settings: TrainTokenizer) -> dict[str, float]:
    """Train a visual tokenizer on your own pictures; under torchrun, over all its processes."""
    with distributed.joined(settings.device) as device:
        return train(settings, device)


def train(settings: TrainTokenizer, device: torch.device) -> dict[str, float]:
    """This process's share of it; returns the quality of what came out."""
    source = open_source(settings.data)
    check_folder(settings.out, settings, settings.overwrite)
    distributed.accumulation(settings.batch_size, settings.device_batch_size)  # refuses what cannot be
    check_share(len(source), settings.batch_size, distributed.size())
    torch.manual_seed(settings.seed)
    tokenizer, teacher = build(settings, device)
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a sixth faster
    run = Run(settings.out, settings, settings.overwrite)
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    ours = [{"params": trained, "weight_decay": 1e-4}]  # of the dVAE everything decays
    groups = param_groups(tokenizer, 1e-4) if isinstance(tokenizer, VQKD) else ours
    optimizer = adamw(groups, settings.lr, betas=(0.9, 0.99))
    view = CropAndFlip(tokenizer.config.img_size, settings.crop_scale, hflip=settings.hflip)
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
    min_lr = settings.lr / 100 if settings.min_lr is None else min(settings.min_lr, settings.lr)

    def batches(steps: range) -> Iterator[list[np.ndarray]]:
        for samples in loader.batches(steps, view):
            yield [picture for _, picture in samples]

    every = max(1, total // 10)
    distributed.say(settings_in_words(settings, unused=NOT_OF[settings.kind]))
    if unused := idle(settings, NOT_OF[settings.kind]):
        distributed.say(f"{unused}; that is for the other kind")
    run.begin(
        {
            "pictures": len(source), "data_hash": data_hash([source], None), "steps": total,
            "warmup_steps": warmup, "min_lr": min_lr,
            "teacher_hash": teacher_hash(settings.teacher),
        },
        surroundings(device, resolve_precision(settings.precision, device)),
    )  # fmt: skip
    tally = Tally(settings.vocab_size).to(device)
    network = distributed.wrap(tokenizer.train())
    for step, pictures in run.steps(
        tokenizer,
        optimizer,
        total,
        batches,
        settings.save_every,
        settings.seed,
        tally=tally,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        batch_size=min(settings.batch_size, len(source)),
        tensorboard=settings.tensorboard,
    ):
        if step and step % every == 0:
            with run.apart():
                run.look(
                    step,
                    partial(look, settings, tokenizer, teacher, source, step),
                    is_first=step == every,
                )
        lr = cosine_schedule(step, total, warmup, settings.lr, min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        learned = learn(network, tokenizer, teacher, pictures, settings, device)
        if step % settings.log_every == 0:
            tally.clear()
        tally.add(count_tokens(learned.token_ids, settings.vocab_size), learned.error)
        update(optimizer, distributed.mean(learned.loss))

        if (step + 1) % settings.log_every == 0 or step + 1 == total:
            use = tally.use()
            run.log(
                step + 1,
                **in_words(tokenizer, tally.mean_error()),
                live_codes=use.live,
                perplexity=use.perplexity,
                lr=lr,
            )

    if loader.bad_images.found:
        print(f"{run.out}: {loader.bad_images}", file=sys.stderr)
    return distributed.on_main(lambda: finish(settings, tokenizer.eval(), teacher, source, total))


def length_of(settings: TrainTokenizer, steps_per_epoch: int) -> tuple[int, int]:
    """Steps of the run, and of its warm-up."""
    total = settings.steps or settings.epochs * steps_per_epoch
    if settings.warmup_epochs is None:
        return total, min(100, total // 10)
    return total, min(total, round(settings.warmup_epochs * steps_per_epoch))


def finish(
    settings: TrainTokenizer,
    tokenizer: DiscreteVAE | VQKD,
    teacher: Teacher | None,
    source: ImageSource,
    steps: int,
) -> dict[str, float]:
    """Judge the tokenizer, save it, and say how good it is."""
    out = settings.out
    most = min(len(source), 4096, max(256, steps * settings.batch_size))
    with Progress("judging", most) as progress:
        result = look(settings, tokenizer, teacher, source, steps, most, progress)
    save_tokenizer(tokenizer, out, {**result, "pictures": len(source), "seed": settings.seed})
    print(
        f"{out}: {result['live_codes']:.1%} of {settings.vocab_size} codes alive, perplexity "
        f"{result['perplexity']:.0f}, "
        + (
            f"reconstruction {result['psnr_db']:.1f} dB PSNR"
            if teacher is None
            else f"cosine to the teacher {result['cosine']:.3f}"
        ),
        file=sys.stderr,
    )
    less = settings.vocab_size // 4
    fewer = f", or with fewer: --vocab-size {less}" if less >= 16 else ""
    if result["live_codes"] < 0.5 or result["perplexity"] < settings.vocab_size / 8:
        print(
            f"warning: {result['live_codes']:.0%} of the codes are alive, and used as unevenly as "
            f"{result['perplexity']:.0f} would be evenly, so most tokens mean little. Train longer{fewer}",
            file=sys.stderr,
        )
    again = shlex.join(["beit", "pretrain", str(settings.data), "--tokenizer", str(out)])
    print(f"next: {again} -o PRETRAINED", file=sys.stderr)
    return result


def look(
    settings: TrainTokenizer,
    tokenizer: DiscreteVAE | VQKD,
    teacher: Teacher | None,
    source: ImageSource,
    step: int,
    most: int = 256,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Judge the tokenizer on up to `most` pictures and write its page, now and then while it trains."""
    training, device = tokenizer.training, next(tokenizer.parameters()).device
    try:
        use, error, sheet = judge(tokenizer.eval(), teacher, source, device, most, progress)
    finally:
        tokenizer.train(training)
    quality = in_words(tokenizer, error)
    result = {"live_codes": use.live, "perplexity": use.perplexity, **quality, "steps": step}
    write_atomically(settings.out / "reconstructions.png", png_bytes(strip(sheet)))
    write_page(settings.out, result, strip(sheet), min(most, len(source)))
    return result


def write_page(out: Path, result: dict[str, float], sheet: Image.Image, pictures: int) -> None:
    """report.html: whether the codes are alive, curves, originals over reconstructions, settings."""
    page = Page(
        f"Tokenizer {out.name}",
        "Made anew ten times while it trains. Nothing on this page needs a network.",
    )
    page.section(
        "Is it working?",
        f"What came over {counted(pictures, 'picture')} after step {result['steps']:,}, and what is usual.",
    )
    quality, usual = next(
        (f"{result[key]:.3g} {key.replace('_', ' ')}", text)
        for key, text in USUAL.items()
        if key in result
    )
    page.table(
        ("", "now", "usual"),
        [
            ("codes alive", f"{result['live_codes']:.1%}", "above 95 %; else fewer codes, or longer"),
            ("perplexity", f"{result['perplexity']:.0f}", "half of the codes or more"),
            ("quality", quality, usual),
        ],
    )
    metrics = read_metrics(out / "metrics.jsonl")
    lines = {key: [(m["step"], m[key]) for m in metrics if m.get(key) is not None] for key in CURVES}
    page.section("Curves", "One point a logged step.")
    page.charts([line_chart({"": line}, "step", key) for key, line in lines.items() if len(line) > 1])
    page.section("Pictures", "Above the originals, below what their tokens stand for.")
    page.figure(img_tag(sheet, "originals and reconstructions"), "")
    page.section("Settings", "run.toml")
    page.code((out / "run.toml").read_text(encoding="utf-8"))
    page.write(out / "report.html")


CURVES = ("psnr_db", "cosine", "live_codes", "perplexity", "images_per_second")
USUAL = {
    "psnr_db": "17 to 23 in short runs of our own; 11 is one colour for all",
    "cosine": "rising; 1 says all that the teacher says",
}


# --- What is trained, and to what ----------------------------------------------------------------


def build(
    settings: TrainTokenizer, device: torch.device
) -> tuple[DiscreteVAE, None] | tuple[VQKD, Teacher]:
    """A new tokenizer, and the teacher of one that has any."""
    if settings.kind == "dvae":
        if settings.teacher != "none":
            raise ValueError(f"--teacher {settings.teacher} is for --kind vqkd; a dvae has no teacher")
        config = DiscreteVAEConfig(
            img_size=settings.img_size or 112,
            vocab_size=settings.vocab_size,
            code_dim=settings.code_dim or 16,
            hidden_dim=settings.hidden_dim,
            num_layers=settings.num_layers,
            quantizer=settings.quantizer,
            revive_after_steps=settings.revive_after_steps,
        )
        return DiscreteVAE(config).to(device), None
    encoder = variant(settings.model)
    size = settings.img_size or encoder.image_height_width[0]
    check_size((size, size), encoder.patch_size)
    teacher, width = open_teacher(settings.teacher, size, encoder.patch_size, device)
    sizes = VQKDConfig(
        img_size=size,
        patch_size=encoder.patch_size,
        embed_dim=encoder.embed_dim,
        encoder_depth=encoder.depth,
        decoder_depth=settings.decoder_depth,
        num_heads=encoder.num_heads,
        vocab_size=settings.vocab_size,
        code_dim=settings.code_dim or 32,
        teacher_dim=width,
        revive_after_steps=settings.revive_after_steps,
    )
    return VQKD(sizes).to(device), teacher


def open_teacher(name: str, size: int, patch_size: int, device: torch.device) -> tuple[Teacher, int]:
    """A teacher for pictures of size x size, and its width T; refused if it says nothing of each token."""
    side = size // patch_size
    if name == "none":
        says: Teacher = partial(patch_pixels, patch_size=patch_size)
    elif name.endswith(".pt2"):
        says = open_program(Path(name)).module().to(device)
    else:
        model = load_model(name, dtype=torch.float32).to(device).requires_grad_(False)
        says = partial(model_features, model, (side, side))

    @torch.no_grad()
    def teacher(images: Tensor) -> Tensor:
        return says(images)

    try:
        said = teacher(torch.zeros(2, 3, size, size, device=device))
    except Exception as error:  # whatever an exported program raises
        raise ValueError(
            f"the teacher {name} cannot take two pictures of {size} x {size}: {error}. An exported one "
            "takes (B, 3, height, width) in [0, 1] with any B, at the size of the token view"
        ) from error
    if said.ndim != 3 or said.shape[:2] != (2, side**2):
        raise ValueError(
            f"the teacher {name} gives {tuple(said.shape)} for two pictures; these tokens need "
            f"(2, {side**2}, width), one row for each of {side} x {side}"
        )
    return teacher, said.shape[2]


def teacher_hash(name: str) -> str:
    """What a teacher is known by."""
    return name if name == "none" else sha256_of(resolve(name))[:16]


def model_features(model: Beit, grid: tuple[int, int], images: Tensor) -> Tensor:
    """What a model says of each patch: (B, 3, H, W) in [0, 1] -> (B, h * w, D).

    It sees them at h x w of its own patches, normalised as its ImageSpec says. Of a pre-trained BEiT
    the middle is taken, as by `probe`: its last blocks turn to the guessing of tokens.
    """
    size = [side * model.config.patch_size for side in grid]
    images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    depth = model.config.depth
    pretrained = isinstance(model, BeitForMaskedImageModeling)
    (states,) = model.layers(
        normalise(images, model.image_spec), [default_layer(depth) if pretrained else depth]
    )
    if pretrained:
        return F.layer_norm(states, states.shape[-1:])[:, 1:]
    return getattr(model, "fc_norm", model.norm)(states)[:, 1:]


# --- The step ------------------------------------------------------------------------------------


class Learned(NamedTuple):
    """What came of a batch of B pictures, each of N tokens, on the device; its gradients are added up."""

    loss: Tensor
    error: Tensor  # of what was given back, mean over pictures
    token_ids: Tensor  # (B, N)


def learn(
    network: nn.Module,
    tokenizer: DiscreteVAE | VQKD,
    teacher: Teacher | None,
    pictures: list[np.ndarray],
    settings: TrainTokenizer,
    device: torch.device,
) -> Learned:
    """Learn from a batch, in parts that fit; the codebook is begun and moved by all of it."""
    at_once = settings.device_batch_size or len(pictures)
    parts = [pictures[start : start + at_once] for start in range(0, len(pictures), at_once)]
    whole = len(parts) == 1
    if isinstance(tokenizer, VQKD) and not whole:
        with autocast(settings.precision, device):
            tokenizer.begin_codebook(to_unit(part, device) for part in parts)
    loss, error = torch.zeros(2, device=device)
    taken = []
    for number, part in enumerate(parts, 1):
        images = to_unit(part, device)
        target = () if teacher is None else (teacher(images),)
        share = len(part) / len(pictures)
        with distributed.gradients_sent(network, last=number == len(parts)):
            with autocast(settings.precision, device):
                output = network(images, *target, moves_codebook=whole)
            (share * output.loss).backward()
        loss += share * output.loss.detach()
        error += share * output.error.detach()
        taken.append((output.directions, output.token_ids.flatten(1)))
    directions, token_ids = map(torch.cat, zip(*taken, strict=True))
    if not whole:
        tokenizer.update_codebook(directions, token_ids)
    return Learned(loss, error, token_ids)


# --- How it goes ---------------------------------------------------------------------------------


def in_words(tokenizer: DiscreteVAE | VQKD, error: float) -> dict[str, float]:
    """An error by the name that its kind of tokenizer is judged by."""
    return {"psnr_db": psnr(error)} if isinstance(tokenizer, DiscreteVAE) else {"cosine": 1 - error}


def readable(source: ImageSource, indices: np.ndarray) -> Iterator[np.ndarray]:
    """The pictures of these numbers that can be read."""
    for index in indices.tolist():
        with suppress(BadImage):
            yield source.read(index)


@torch.no_grad()
def judge(
    tokenizer: DiscreteVAE | VQKD,
    teacher: Teacher | None,
    source: ImageSource,
    device: torch.device,
    most: int,
    progress: Progress | None = None,
) -> tuple[CodebookUse, float, list[list[np.ndarray]]]:
    """Code use and error over up to `most` whole pictures, and a sheet: originals over reconstructions.

    A VQ-KD tokenizer learns here what its tokens look like: the mean of the patches that took each.
    """
    size, stride = tokenizer.config.img_size, tokenizer.stride
    spec = ImageSpec(size=(size, size), crop_ratio=1.0)
    chosen = np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)
    counts = torch.zeros(tokenizer.vocab_size, device=device)
    patches = torch.zeros(tokenizer.vocab_size, 3 * stride**2, device=device)  # sums
    error, seen = 0.0, 0
    shown: list[tuple[Tensor, Tensor]] = []  # a picture of each batch, and its tokens

    for part in np.array_split(chosen, max(10, -(-len(chosen) // 64))):
        pictures = [resize_and_crop(image, spec) for image in readable(source, part)]
        if not pictures:
            continue
        images = to_unit(pictures, device)
        seen += len(pictures)
        token_ids = tokenizer.encode(images)
        counts += count_tokens(token_ids, tokenizer.vocab_size)
        if isinstance(tokenizer, DiscreteVAE):
            wrong = (tokenizer.decode(token_ids).double() - images).square().mean(dim=(1, 2, 3))
        else:
            assert teacher is not None
            said = tokenizer.decode_features(token_ids)
            wrong = 1 - F.cosine_similarity(said, teacher(images), dim=-1).double().mean(dim=1)
            rows = F.pixel_unshuffle(images, stride).flatten(2).transpose(1, 2).flatten(0, 1)
            patches.index_add_(0, token_ids.flatten(), rows)
        error += float(wrong.sum())
        shown.append((images[0], token_ids[0]))
        if progress is not None:
            progress.update(seen)
    some = [shown[i] for i in np.linspace(0, len(shown) - 1, min(10, len(shown))).astype(int)]
    if isinstance(tokenizer, VQKD):
        tokenizer.mean_patches = mean_patches(patches, counts)
    drawn = tokenizer.decode(torch.stack([ids for _, ids in some]))
    sheet = [list(to_bytes(torch.stack([image for image, _ in some]))), list(to_bytes(drawn))]
    return codebook_use(counts.cpu().numpy()), error / seen, sheet
