"""`beit bench-pretrain`: how fast pre-training is here, by part, beside transformers where installed.

Model only, tokenizer only, loader only, and all together as `pretrain` runs them. The parts take turns,
so that what else runs on the machine hurts all of them, and the product of matrices that MFU is a share of.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from beit.augment import TwoViews, normalise, to_unit
from beit.commands.pretrain import Batch, MaskedLogits, Sampler, guess_hidden, masked_loss, paper_masks
from beit.data import Loader, open_source
from beit.flops import measure_flops, peak_flops, training_flops
from beit.model import BeitConfig, BeitForMaskedImageModeling, masked_of, variant
from beit.optim import adamw, param_groups, update
from beit.plural import counted
from beit.precision import Precision, autocast, pick_device, resolve_precision
from beit.ranges import Compile, NotNegative
from beit.tokenizer import DalleConfig, DalleTokenizer, Tokenizer
from beit.tokenizer_files import load_tokenizer


@Parameter(name="*")
@dataclass(frozen=True)
class BenchPretrain:
    data: Path | None = None
    """Pictures to read; noise in 500 x 375 JPEGs where none are given."""
    _: KW_ONLY
    tokenizer: Path | None = None
    """Tokenizer folder or file; one of DALL-E's shape with random weights where none is given."""
    model: Annotated[str, Parameter(alias="-m")] = "beit_base_patch16_224"
    """Size of the encoder, by name."""
    batch_size: PositiveInt = 8
    turns: PositiveInt = 3
    """How often each part is timed."""
    steps: PositiveInt = 2
    """Steps of a part in a turn."""
    precision: Precision = "auto"
    """bf16 where the processor has it (auto), or fp32."""
    compile: Compile = False
    """Compile each block, and DALL-E's encoder, with torch.compile."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto takes a GPU where there is one."""
    workers: NonNegativeInt = 2
    """Processes that prepare pictures."""
    peak_tflops: NotNegative = 0.0
    """What MFU is a share of; 0: known or measured."""
    json: bool = False
    """Print one JSON line instead of a table."""


def bench_pretrain(settings: BenchPretrain = BenchPretrain()) -> dict[str, Any]:
    """Time pre-training, part by part."""
    device = pick_device(settings.device)
    config = variant(settings.model)
    with tempfile.TemporaryDirectory() as folder:
        data = settings.data or noise(Path(folder) / "noise", max(64, settings.batch_size))
        tokenizer = (
            load_tokenizer(settings.tokenizer) if settings.tokenizer else DalleTokenizer(DalleConfig())
        )
        tokenizer.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        config = config.for_pretraining(tokenizer.vocab_size)
        parts = make_parts(settings, config, tokenizer, data, Path(folder), device)
        for work in parts.values():  # the first step makes what is kept
            work(1)
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        peak, peak_from = peak_flops(device, settings.precision, settings.peak_tflops)
        precision = resolve_precision(settings.precision, device)
        peaks, loader_steps = [], max(LOADER_STEPS, 2 * settings.workers)
        for turn in range(settings.turns):
            peaks.append(measure_flops(device, precision) if "measured" in peak_from else peak)
            for name, work in parts.items():
                print(f"turn {turn + 1}/{settings.turns}: {name}", file=sys.stderr)
                if name in READING:
                    work(2 * settings.workers)
                    wait_for(device)
                began = time.perf_counter()
                steps = settings.steps * (loader_steps if name == "loader" else 1)
                work(steps)
                wait_for(device)
                seconds[name].append((time.perf_counter() - began) / steps)

    flops, peak = training_flops(config, paper_masks(*config.grid)[0]), statistics.median(peaks)
    rows: dict[str, dict[str, float]] = {}
    for name, each in seconds.items():
        rate = settings.batch_size / statistics.median(each)
        rows[name] = {
            "images_per_second": rate,
            "ms_an_image": 1000 / rate,
            "least_ms": 1000 * min(each) / settings.batch_size,
            "most_ms": 1000 * max(each) / settings.batch_size,
        }
        if name in WITH_MODEL:
            rows[name]["mfu_percent"] = 100 * rate * flops / peak
    result = {
        "model": settings.model,
        "batch_size": settings.batch_size,
        "precision": precision,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "gflop_an_image": flops / 1e9,
        "peak_tflops": peak / 1e12,
        "peak_from": peak_from,
        "parts": rows,
    }
    if settings.json:
        print(json.dumps(result))
    else:
        show(result)
    return result


WITH_MODEL = ("model", "all together", "transformers bf16", "transformers fp32")
LOADER_STEPS = 16  # its steps are short
# What reads. Each process that does has two batches ready or begun when its turn comes; these are used up
# before the clock starts, so that as much is read as is used while it runs.
READING = ("loader", "all together")


def wait_for(device: torch.device) -> None:
    """Until all that a GPU was told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_parts(
    settings: BenchPretrain,
    config: BeitConfig,
    tokenizer: Tokenizer,
    data: Path,
    folder: Path,
    device: torch.device,
) -> dict[str, Callable[[int], None]]:
    """What is timed: name -> do so many steps."""
    size, (height, width) = config.image_height_width[0], config.grid
    views = TwoViews(img_size=size, token_size=height * tokenizer.stride)
    sample = Sampler(views, config.grid, *paper_masks(height, width), blocks=True, exact=False)
    source = open_source(data)
    if len(source) < settings.batch_size:
        raise ValueError(
            f"{data} has {counted(len(source), 'picture')}, and a step takes {settings.batch_size}; give "
            "more pictures, or a smaller --batch-size"
        )
    loader = Loader.of_run(source, settings.batch_size, 0, settings.workers, folder, 0.01)

    # One loader for all, as a run has one: its processes are forked before there is much to copy.
    stream = loader.batches(range(1_000_000), sample)

    def read() -> Batch:
        return Batch.of([value for _, value in next(stream)])

    batch = read()
    torch.manual_seed(0)
    model = BeitForMaskedImageModeling(config).to(device).train()
    if settings.compile:
        if isinstance(tokenizer, DalleTokenizer):
            tokenizer.encoder.compile()
        for block in (*model.blocks, *getattr(model, "cls_pt_layers", ())):
            block.compile()
    network = MaskedLogits(model)
    optimizer = adamw(param_groups(model, 0.05), 1e-4)
    images = normalise(to_unit(batch.patch_views, device), model.image_spec)
    token_view = to_unit(batch.token_views, device)
    masks = torch.from_numpy(batch.masks)
    token_ids = tokenizer.encode(token_view)

    def train_alone(steps: int) -> None:
        for _ in range(steps):
            targets = masked_of(token_ids, masks)
            with autocast(settings.precision, device):
                logits = network(images, masks)
            loss = torch.stack([masked_loss(each, targets) for each in logits]).sum() / len(targets)
            loss.backward()
            update(optimizer, loss, 3.0)

    def encode(steps: int) -> None:
        for _ in range(steps):
            tokenizer.encode(token_view)

    def load(steps: int) -> None:
        for _ in range(steps):
            read()

    def all_together(steps: int) -> None:
        for _ in range(steps):
            guessed = guess_hidden(
                network, tokenizer, read(), model.image_spec, settings.precision, device
            )
            update(optimizer, guessed.loss, 3.0)

    parts: dict[str, Callable[[int], None]] = {
        "model": train_alone,
        "tokenizer": encode,
        "loader": load,
        "all together": all_together,
    }
    for theirs in dict.fromkeys((resolve_precision(settings.precision, device), "fp32")):
        step = transformers_step(config, images, masks.to(device), token_ids, theirs == "bf16")
        if step is not None:
            parts[f"transformers {theirs}"] = step
    return parts


def transformers_step(
    config: BeitConfig, images: Tensor, masks: Tensor, token_ids: Tensor, bf16: bool
) -> Callable[[int], None] | None:
    """The same step by transformers' own model with torch's AdamW; None where it is not installed, and of
    BEiT v2, whose two heads it has not."""
    if config.early_layer:
        return None
    try:
        from transformers import BeitConfig as TheirConfig
        from transformers import BeitForMaskedImageModeling as TheirModel
    except ImportError:
        return None
    theirs = TheirConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=int(config.embed_dim * config.mlp_ratio),
        image_size=config.image_height_width[0],
        patch_size=config.patch_size,
        use_mask_token=True,
        use_absolute_position_embeddings=config.use_abs_pos_emb,
        use_relative_position_bias=config.rel_pos_bias == "per_block",
        use_shared_relative_position_bias=config.rel_pos_bias == "shared",
        layer_scale_init_value=config.init_values,
        drop_path_rate=0.0,
    )
    model = TheirModel(theirs).train()
    model.to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    flat, targets = masks.flatten(1), token_ids[masks]

    def work(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
                logits = model(images, bool_masked_pos=flat).logits  # of all patches
            loss = F.cross_entropy(logits[flat].float(), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()

    return work


def noise(folder: Path, count: int) -> Path:
    """JPEGs of 500 x 375 pixels with as many bits a pixel as photographs have."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        grainy = (smooth + rng.normal(0, 6, smooth.shape).round()).clip(0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / f"{number}.jpg", quality=85)
    return folder


def show(result: dict[str, Any]) -> None:
    """The table, for people."""
    table = Table(
        title=f"{result['model']}, {counted(result['batch_size'], 'picture')} a step, "
        f"{result['precision']} on {counted(result['threads'], 'thread')} of {result['device']}"
    )
    for head in ("part", "images/s", "ms an image", "MFU"):
        table.add_column(head, justify="left" if head == "part" else "right")
    for name, row in result["parts"].items():
        table.add_row(
            name,
            f"{row['images_per_second']:.2f}",
            f"{row['ms_an_image']:.1f} ({row['least_ms']:.1f} to {row['most_ms']:.1f})",
            f"{row['mfu_percent']:.0f} %" if "mfu_percent" in row else "",
        )
    Console(width=100).print(table)
    print(
        f"MFU: of {result['peak_tflops']:.3g} TFLOP/s, {result['peak_from']}; "
        f"{result['gflop_an_image']:.1f} GFLOP an image"
    )
