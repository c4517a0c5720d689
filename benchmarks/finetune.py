"""`beit finetune` against a plain loop over transformers' model, at equal budget, from equal weights.

    python benchmarks/finetune.py --pictures cifar10 --size beit_mini_patch8_32 --out runs/cifar10
    python benchmarks/finetune.py --pictures imagenette --size beit_tiny_patch8_64 --out runs/imagenette

pictures: what `beit finetune` takes, with train and val in it; or CIFAR-10 as train.tar.xz and
test.tar.xz, one folder a class, which are unpacked. Both sides begin with the same weights, from nothing
and from an encoder that is pre-trained here on the same pictures without labels, and see as many pictures,
with the same kind of crops, AdamW, schedule, batch and number format. The plain loop is the usual one: a
DataLoader of two workers, loss.backward(), optimizer.step(). Seconds an epoch are of training alone.

Resumable: a side that has ended is not run again; one that was cut goes on after its last whole epoch,
ours after its last checkpoint. Prints the table in Markdown, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from beit.augment import CropAndFlip, normalise, to_unit
from beit.checkpoints import save
from beit.commands.finetune import Finetune, finetune, load_start, starting_model
from beit.commands.pretrain import Pretrain, pretrain
from beit.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from beit.data import ImageSource, open_source
from beit.image import preprocess
from beit.metrics import top_k_accuracy
from beit.optim import cosine_schedule
from beit.precision import autocast
from beit.run import read_metrics

SIDES = ("beit finetune", "transformers loop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="beit_mini_patch8_32", help="a name of model.VARIANTS")
    parser.add_argument("--img-size", type=int, help="pixels; the size's own where not given")
    parser.add_argument(
        "--encoder", help="a pre-trained model to begin with, instead of making one here"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", default=["scratch", "pretrained"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--pretrain-epochs", type=int, default=20)
    parser.add_argument("--tokenizer-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--limit", type=int, default=0, help="training pictures, drawn by seed 0; 0: all"
    )
    parser.add_argument("--workers", type=int, default=2, help="of both sides' loaders")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = unpacked(arguments.pictures, arguments.out / "data")
    train, val = open_source(data, "train", labelled=True), open_source(data, "val", labelled=True)
    val = val.with_classes(train.classes)
    given = data
    if arguments.limit:
        given = arguments.out / "train"
        copy_some(train, arguments.limit, given)
        train = open_source(given, labelled=True)

    results: list[dict[str, Any]] = []
    for start in arguments.starts:
        model = arguments.size
        if start == "pretrained":
            model = arguments.encoder or str(pretrained(arguments, given))
        for seed in arguments.seeds:
            out = arguments.out / f"{start}-{seed}"
            settings = Finetune(
                given, model=model, out=out / "ours", val=data, method="full", use_epoch="last",
                epochs=arguments.epochs, warmup_epochs=1, batch_size=arguments.batch_size, lr=arguments.lr,
                layer_decay=1.0, label_smoothing=0.1, crop_scale=(0.35, 1.0), drop_path=0.05,
                calibrate=False, report=False, crop_ratio=1.0, img_size=arguments.img_size, seed=seed,
                precision=arguments.precision, log_every=10, save_every=200, workers=arguments.workers,
            )  # fmt: skip
            for side, run in zip(SIDES, (ours, theirs), strict=True):
                file = out / f"{run.__name__}.json"
                if not file.exists():
                    print(f"{start}, seed {seed}: {side}", file=sys.stderr, flush=True)
                    found = run(settings, train, val)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(found))
                results.append(
                    {"start": start, "seed": seed, "side": side, **json.loads(file.read_text())}
                )
    show(results, arguments, len(train), len(val))


def unpacked(pictures: Path, to: Path) -> Path:
    """The pictures; those in tar.xz files unpacked, train and test, which is val here."""
    if not (pictures / "train.tar.xz").exists():
        return pictures
    for name, split in (("train", "train"), ("test", "val")):
        if not (to / split).exists():
            with tarfile.open(pictures / f"{name}.tar.xz") as archive:
                archive.extractall(to / f".{split}", filter="data")
            inside = to / f".{split}"
            deeper = [p for p in inside.iterdir() if p.is_dir()]
            if len(deeper) == 1:  # a folder around the classes
                inside = deeper[0]
            inside.rename(to / split)
    return to


def pretrained(arguments: argparse.Namespace, data: Path) -> Path:
    """An encoder that has learned from the training pictures without their labels."""
    out = arguments.out / "pretrained"
    if not (out / "config.json").exists():
        tokenizer = arguments.out / "tokenizer"
        train_tokenizer(
            TrainTokenizer(
                data, out=tokenizer, steps=arguments.tokenizer_steps, vocab_size=512, hidden_dim=32,
                img_size=arguments.img_size or 32, workers=arguments.workers,
            )
        )  # fmt: skip
        pretrain(
            Pretrain(
                data, tokenizer=tokenizer, out=out, model=arguments.size, epochs=arguments.pretrain_epochs,
                batch_size=arguments.batch_size, warmup_epochs=1, crop_scale=(0.35, 1.0), crop_ratio=1.0,
                img_size=arguments.img_size, lr=4e-3, precision=arguments.precision,
                workers=arguments.workers,
            )
        )  # fmt: skip
    return out


def copy_some(source: ImageSource, count: int, to: Path) -> None:
    """So many pictures of a source, drawn by seed 0, as files in a folder a class."""
    for i in np.random.default_rng(0).permutation(len(source))[:count].tolist():
        file = to / source.classes[source.labels[i]] / f"{i:06d}{Path(source.name(i)).suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.paths.content(i))


# --- The sides ---------------------------------------------------------------------------------------


def ours(settings: Finetune, train: ImageSource, val: ImageSource) -> dict[str, float]:
    """`beit finetune`; seconds an epoch from the pace that it logs."""
    assert settings.out is not None
    result = finetune(settings)
    metrics = read_metrics(settings.out / "metrics.jsonl")
    paces = [line["images_per_second"] for line in metrics[1:]] or [metrics[0]["images_per_second"]]
    return {
        "accuracy": result["val_accuracy"],
        "seconds_an_epoch": len(train) / statistics.median(paces),
    }


def theirs(settings: Finetune, train: ImageSource, val: ImageSource) -> dict[str, float]:
    """A plain loop over transformers' BeitForImageClassification, begun with the same weights."""
    from transformers import BeitForImageClassification

    assert settings.out is not None
    assert settings.epochs
    assert settings.batch_size
    assert settings.lr is not None
    folder = settings.out.parent / "theirs"
    start = starting_model(settings, load_start(settings), train.classes)
    if not (folder / "config.json").exists():
        save(start, folder)
    spec, device = start.image_spec, torch.device("cpu")
    model = BeitForImageClassification.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)
    loader = DataLoader(
        Pictures(train, start.config.image_height_width[0], settings),
        batch_size=settings.batch_size,
        shuffle=True,
        num_workers=settings.workers,
        drop_last=True,
        collate_fn=list,
    )
    total, saved = settings.epochs * len(loader), folder / "epoch.pt"
    state: dict[str, Any] = {"epoch": 0, "seconds": []}
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(state["epoch"], settings.epochs):
        torch.manual_seed(1000 * settings.seed + epoch)
        model.train()
        began = time.perf_counter()
        for number, batch in enumerate(loader):
            step = epoch * len(loader) + number
            rate = cosine_schedule(step, total, len(loader), settings.lr, settings.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            images = normalise(to_unit([picture for picture, _ in batch], device), spec)
            labels = torch.tensor([label for _, label in batch])
            with autocast(settings.precision, device):
                logits = model(pixel_values=images).logits
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = [*state["seconds"], time.perf_counter() - began]
        state = {"epoch": epoch + 1, "seconds": seconds}
        torch.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    model.eval()
    answers = []
    for part in np.array_split(np.arange(len(val)), -(-len(val) // 64)):
        whole = np.stack([preprocess(val.read(i), spec) for i in part.tolist()])
        with torch.no_grad():
            answers.append(model(pixel_values=torch.from_numpy(whole)).logits)
    return {
        "accuracy": top_k_accuracy(torch.cat(answers).numpy(), val.labels),
        "seconds_an_epoch": statistics.median(state["seconds"]),
    }


class Pictures(Dataset[tuple[np.ndarray, int]]):
    """The training pictures with our crops, for their loader."""

    def __init__(self, source: ImageSource, size: int, settings: Finetune) -> None:
        assert settings.crop_scale is not None
        self.source = source
        self.view = CropAndFlip(size, settings.crop_scale, hflip=settings.hflip)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return self.view(self.source.open(index), rng), int(self.source.labels[index])


# --- The table ---------------------------------------------------------------------------------------


def show(results: list[dict[str, Any]], arguments: argparse.Namespace, train: int, val: int) -> None:
    """Means and standard deviations over the seeds."""
    packages = ("beit", "torch", "transformers", "numpy")
    print(", ".join(f"{name} {version(name)}" for name in packages), end="; ")
    print(
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads; {arguments.size}, ",
        end="",
    )
    print(f"{train:,} pictures, {arguments.epochs} epochs of {arguments.precision}, batch ", end="")
    print(f"{arguments.batch_size}; {val:,} validation pictures; seeds {arguments.seeds}\n")
    print("| start | side | right | s an epoch | times as fast |\n|---|---|---|---|---|")
    for start in arguments.starts:
        slow = [r["seconds_an_epoch"] for r in results if (r["start"], r["side"]) == (start, SIDES[1])]
        for side in SIDES:
            rows = [r for r in results if (r["start"], r["side"]) == (start, side)]
            right = [100 * r["accuracy"] for r in rows]
            seconds = [r["seconds_an_epoch"] for r in rows]
            deviation = statistics.stdev(right) if len(right) > 1 else 0.0
            print(
                f"| {start} | {side} | {statistics.mean(right):.1f} ± {deviation:.1f} | "
                f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | "
                f"{statistics.median(slow) / statistics.median(seconds):.2f} |"
            )
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
