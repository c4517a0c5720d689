"""Which ingredients keep the codes of `DiscreteVAE` alive: train without each, count the used codes.

    python benchmarks/tokenizer_ablation.py DATA --rows rows.jsonl        # 41 rows, about 50 minutes
    python benchmarks/tokenizer_ablation.py DATA --rows rows.jsonl --table

DATA is a folder of `train-*.tar` and `val-*.tar` with photographs `KEY.jpg` (Imagenette as
WebDataset shards). Finished rows are appended to `rows.jsonl`; a second start skips them. All
variants of a seed see the same batches in the same order, for the same number of steps.

Shapes: B batch, 3 x 64 x 64 pixels in [0, 1], 8 x 8 tokens, V vocabulary, K code width.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from beit.tokenizer import DiscreteVAE, DiscreteVAEConfig


@dataclass(frozen=True)
class Settings:
    """What all rows share."""

    img_size: int = 64  # pixels
    hidden_dim: int = 32  # channels; what one core trains in a minute
    batch_size: int = 32  # x 64 tokens = 2,048 vectors a step
    eval_images: int = 1024  # of the validation photographs, evenly spaced
    threads: int = 1


@dataclass(frozen=True)
class Variant:
    """One row. The defaults are the recipe under test, called full."""

    name: str
    seeds: int = 1
    steps: int = 200
    lr: float = 3e-3  # of Adam, at the start; a cosine brings it to 0
    vocab_size: int = 1024
    code_dim: int = 32
    codebook_decay: float = 0.95
    revive_after_steps: int = 20
    commitment: float = 0.25
    gumbel: bool = False
    whiten: bool = True  # batch norm before the L2 norm
    k_means: bool = True  # else codes start as random unit vectors
    bfloat16_codes: bool = False  # distances inside autocast; else in float32
    constant_lr: bool = False
    no_quantizer: bool = False  # continuous codes: the ceiling of the PSNR
    anneal_to: float = 0.0  # gumbel: last temperature, from 1, geometric; 0 stays at 0.9
    kl_weight: float = 0.0  # gumbel: pull to the uniform prior, ramped up from 0


VARIANTS = (
    Variant("full", seeds=2),
    Variant("bfloat16 codes", seeds=2, bfloat16_codes=True),
    Variant("constant lr", constant_lr=True),
    Variant("- batch norm", seeds=2, whiten=False),
    Variant("- batch norm, lr 0.001", lr=1e-3, whiten=False),
    Variant("- k-means", k_means=False),
    Variant("- revival", seeds=2, revive_after_steps=0),
    Variant("- k-means - revival", k_means=False, revive_after_steps=0),
    Variant("- batch norm - revival", whiten=False, revive_after_steps=0),
    Variant("- batch norm - k-means", whiten=False, k_means=False),
    Variant("none of the three", whiten=False, k_means=False, revive_after_steps=0),
    Variant("EMA 0.99", codebook_decay=0.99),
    Variant("EMA 0.8", codebook_decay=0.8),
    Variant("commitment 0", seeds=2, commitment=0.0),
    Variant("commitment 0 - batch norm", commitment=0.0, whiten=False),
    Variant("commitment 0, revival alone", seeds=2, commitment=0.0, whiten=False, k_means=False),
    Variant("commitment 0 - k-means", commitment=0.0, k_means=False),
    Variant("commitment 0 - revival", commitment=0.0, revive_after_steps=0),
    Variant("commitment 0.02", commitment=0.02),
    Variant("commitment 1", commitment=1.0),
    Variant("K 8", code_dim=8),
    Variant("K 16", code_dim=16),
    Variant("K 64", code_dim=64),
    Variant("no quantiser", no_quantizer=True),
    Variant("gumbel, temperature 0.9", gumbel=True),
    Variant("gumbel, annealed 1 to 1/16", gumbel=True, anneal_to=1 / 16),
    Variant("gumbel, annealed, KL 0.001", gumbel=True, anneal_to=1 / 16, kl_weight=1e-3),
    Variant("V 8192 full", vocab_size=8192),
    Variant("V 8192, bfloat16 codes", vocab_size=8192, bfloat16_codes=True),
    Variant("V 8192, commitment 0", vocab_size=8192, commitment=0.0),
    Variant(
        "V 8192, commitment 0, revival alone",
        vocab_size=8192,
        commitment=0.0,
        whiten=False,
        k_means=False,
    ),
    Variant("600 steps full", steps=600),
    Variant("600 steps, commitment 0", steps=600, commitment=0.0),
    Variant(
        "600 steps, commitment 0, revival alone",
        steps=600,
        commitment=0.0,
        whiten=False,
        k_means=False,
    ),
    Variant("600 steps gumbel, annealed", steps=600, gumbel=True, anneal_to=1 / 16),
)


class AblatedVAE(DiscreteVAE):
    """`DiscreteVAE` with the switches that the class itself does not need."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        config = DiscreteVAEConfig(
            img_size=settings.img_size,
            vocab_size=variant.vocab_size,
            code_dim=variant.code_dim,
            hidden_dim=settings.hidden_dim,
            quantizer="gumbel" if variant.gumbel else "vq",
            codebook_decay=variant.codebook_decay,
            revive_after_steps=variant.revive_after_steps,
            commitment=variant.commitment,
        )
        super().__init__(config)
        self.variant = variant
        self.progress = 0.0  # 0 to 1, share of the steps done
        if not variant.gumbel and not variant.whiten:
            self.whiten = nn.Identity()  # type: ignore[assignment]
        if not variant.gumbel and not variant.k_means:
            self.unused_steps.zero_()  # the class takes this for started

    def quantise_gumbel(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = self.variant.anneal_to
        temperature = last**self.progress if last else self.config.temperature
        weights = F.gumbel_softmax(z.float(), tau=temperature, dim=1)
        codes = torch.einsum("bvhw,vk->bkhw", weights, self.codebook.weight)
        log_probs = F.log_softmax(z.float(), dim=1)
        kl = (log_probs.exp() * (log_probs + math.log(self.vocab_size))).sum(dim=1).mean()
        return codes, z.argmax(dim=1), self.variant.kl_weight * self.progress * kl

    def quantise_vq(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.variant.no_quantizer:
            codes = self.directions(z).permute(0, 3, 1, 2)
            return codes, codes.new_zeros(codes[:, 0].shape, dtype=torch.long), z.new_zeros(())
        return super().quantise_vq(z)

    def nearest(self, directions: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast_codes()):
            return super().nearest(directions)

    def update_codebook(self, directions: Tensor, token_ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast_codes()):
            return super().update_codebook(directions, token_ids)

    def autocast_codes(self) -> bool:
        return torch.is_autocast_enabled("cpu") and self.variant.bfloat16_codes


def read_pictures(data: Path, split: str, size: int) -> Tensor:
    """uint8 (N, 3, size, size), in the order of the shards; kept in the temporary folder."""
    cache = Path(tempfile.gettempdir()) / f"tokenizer_ablation_{split}_{size}.npz"
    if not cache.exists():
        pictures = []
        for shard in sorted(data.glob(f"{split}-*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                    if file is not None:
                        image = Image.open(file).convert("RGB")
                        small = image.resize((size, size), Image.Resampling.BICUBIC)
                        pictures.append(np.asarray(small).transpose(2, 0, 1))
        np.savez(cache, pictures=np.stack(pictures))
    return torch.from_numpy(np.load(cache)["pictures"])


def batches(pictures: Tensor, steps: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Random batches (B, 3, H, W) in [0, 1], half of the pictures flipped."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        batch = pictures[rng.choice(len(pictures), batch_size, replace=False)]
        flip = torch.from_numpy(rng.random(batch_size) < 0.5)
        batch = torch.where(flip[:, None, None, None], batch.flip(-1), batch)
        yield (batch.float() / 255).contiguous(memory_format=torch.channels_last)


def train(variant: Variant, settings: Settings, seed: int, pictures: Tensor) -> AblatedVAE:
    torch.manual_seed(seed)
    model = AblatedVAE(variant, settings).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for step, images in enumerate(batches(pictures, variant.steps, settings.batch_size, seed)):
        model.progress = step / variant.steps
        for group in optimizer.param_groups:
            decay = 1.0 if variant.constant_lr else (1 + math.cos(math.pi * model.progress)) / 2
            group["lr"] = variant.lr * decay
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return model


@torch.no_grad()
def evaluate(model: AblatedVAE, pictures: Tensor) -> dict[str, float]:
    """In float32, from pictures to ids to pictures, as the tokenizer is used."""
    counts = torch.zeros(model.vocab_size)
    psnr_db: list[float] = []
    for batch in torch.split(pictures, 64):
        images = batch.float() / 255
        if model.variant.no_quantizer:
            drawn = model(images).reconstruction.clamp(0, 1)
        else:
            token_ids = model.encode(images)
            counts += torch.bincount(token_ids.flatten(), minlength=model.vocab_size)
            drawn = model.decode(token_ids)
        mse = (drawn - images).square().mean(dim=(1, 2, 3))
        psnr_db += (-10 * mse.log10()).tolist()
    share = counts / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {
        "live_percent": 100 * float((counts > 0).float().mean()),
        "perplexity": float(entropy.exp()),
        "psnr_db": mean(psnr_db),
    }


def baselines(pictures: Tensor) -> dict[str, float]:
    """PSNR (dB) without any learning: one colour a picture, one colour a token."""
    images = pictures.float() / 255
    out = {}
    for name, cell in (("mean colour of the picture", images.shape[-1]), ("mean of each token", 8)):
        means = F.interpolate(F.avg_pool2d(images, cell), scale_factor=cell, mode="nearest")
        out[name] = float((-10 * (means - images).square().mean(dim=(1, 2, 3)).log10()).mean())
    return out


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a variant; mean of the seeds, the least and the most in brackets."""
    lines = [
        "| variant | seeds | live codes % | perplexity | PSNR dB |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(v.name for v in VARIANTS):
        found = [row for row in rows if row["name"] == name]
        if not found:
            continue
        cells = []
        for key, digits in (("live_percent", 1), ("perplexity", 0), ("psnr_db", 2)):
            values = [row[key] for row in found]
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            cells.append(f"{mean(values):.{digits}f}" + (spread if len(values) > 1 else ""))
        if name == "no quantiser":
            cells[:2] = ["-", "-"]
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of train-*.tar and val-*.tar")
    parser.add_argument("--rows", type=Path, required=True, help="finished rows, one JSON a line")
    parser.add_argument("--table", action="store_true", help="print what is finished and stop")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(args.rows)))
        return
    settings = Settings()
    torch.set_num_threads(settings.threads)
    train_pictures = read_pictures(args.data, "train", settings.img_size)
    val_pictures = read_pictures(args.data, "val", settings.img_size)
    chosen = np.linspace(0, len(val_pictures) - 1, settings.eval_images).round().astype(int)
    val_pictures = val_pictures[chosen]
    print(json.dumps(asdict(settings) | baselines(val_pictures)), flush=True)
    todo = [(v, seed) for v in VARIANTS for seed in range(v.seeds)]
    for variant, seed in sorted(todo, key=lambda job: (job[0].steps, job[1])):
        done = {(row["name"], row["seed"]) for row in read_rows(args.rows)}
        if (variant.name, seed) in done:
            continue
        start = time.perf_counter()
        model = train(variant, settings, seed, train_pictures)
        row = {"name": variant.name, "seed": seed, "steps": variant.steps}
        row |= evaluate(model, val_pictures)
        row["seconds"] = round(time.perf_counter() - start)
        with args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
