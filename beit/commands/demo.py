"""`beit demo`: the whole way on scikit-learn's 1,797 handwritten digits, by the other commands.

It is the one command that calls others: what it shows is what they do. The settings were chosen on
the validation pictures; the test pictures are looked at once, at the end.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from beit.commands.finetune import Finetune, finetune
from beit.commands.pretrain import Pretrain, pretrain
from beit.commands.probe import Probe, probe
from beit.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from beit.data import ImageSource, open_source
from beit.engine import Engine, Prediction
from beit.metrics import top_k_accuracy
from beit.ranges import Seed
from beit.report import Page
from beit.run import read_metrics
from beit.settings import command_line
from beit.visualize import img_tag, line_chart, strip

MODEL = "beit_mini_patch8_32"
NUM_LABELS = (50, 200, 0)  # 0: all


@Parameter(name="*")
@dataclass(frozen=True)
class Demo:
    _: KW_ONLY
    out: Annotated[Path, Parameter(alias="-o")] = Path("demo")
    """Folder for the pictures, the runs and the page."""
    fast: bool = False
    """A minute instead of five: shows the way, not the numbers."""
    seed: Seed = 0
    """Of the training and of which pictures keep their labels; the split is always the same."""
    workers: NonNegativeInt = 0
    """Processes that prepare pictures; for ones this small the hand-over costs more than it saves."""
    overwrite: bool = False
    """Begin again where the folder holds an earlier demo."""


def demo(settings: Demo = Demo()) -> dict[str, Any]:
    """Train a tokenizer, pre-train, fine-tune, compare, classify; then write a page about it."""
    started = time.monotonic()
    out, tiny = settings.out, settings.fast
    data = out / "data"
    write_digits(data, settings.seed)
    plain: dict[str, Any] = {
        "hflip": 0.0,
        "seed": settings.seed,
        "workers": settings.workers,
        "overwrite": settings.overwrite,
    }

    tokenizer = TrainTokenizer(
        data / "train", out=out / "tokenizer", img_size=32, vocab_size=128, hidden_dim=32,
        steps=60 if tiny else 400, crop_scale=(0.5, 1.0), **plain,
    )  # fmt: skip
    tell(1, "learn visual tokens from unlabelled digits", tokenizer)
    tokens = train_tokenizer(tokenizer)

    pretraining = Pretrain(
        data / "train", tokenizer=tokenizer.out, out=out / "pretrained", model=MODEL, crop_ratio=1.0,
        epochs=3 if tiny else 100, batch_size=64, lr=8e-3, warmup_epochs=1 if tiny else 20,
        drop_path=0.0, crop_scale=(0.5, 1.0), color_jitter=0.0, **plain,
    )  # fmt: skip
    tell(2, "pre-train: guess the tokens of masked patches", pretraining)
    pretrained = pretrain(pretraining)

    probing = Probe(data, model=str(pretraining.out), split="test", seed=settings.seed)
    tell(3, "linear probe: what the frozen encoder knows", probing)
    probed = probe(probing)

    test = open_source(data, "test", labelled=True)
    table: list[dict[str, Any]] = []
    number = 3
    for labels in NUM_LABELS:
        train = data / "train" if not labels else data / f"train-{labels}.csv"
        row: dict[str, Any] = {"labels": labels or len(open_source(train))}
        for name, start in (("pretrained", str(pretraining.out)), ("scratch", MODEL)):
            tuned = out / f"{name}-{labels or 'all'}"
            tuning = Finetune(
                train, model=start, out=tuned, crop_ratio=1.0,
                steps=30 if tiny else 800, batch_size=50, lr=3e-3, layer_decay=1.0, drop_path=0.0,
                crop_scale=(0.8, 1.0), method="full", val_share=0.0, report=False,
                **plain,
            )  # fmt: skip
            number += 1
            tell(number, f"fine-tune with {row['labels']} labels, {name}", tuning)
            finetune(tuning)
            row[name] = top_k_accuracy(
                Engine(tuned, "torch", "fp32").logits_of(test), np.array(test.labels)
            )
        row["raw_pixels"] = raw_pixel_accuracy(open_source(train, labelled=True), test)
        table.append(row)

    best = out / "pretrained-all"
    predictions = list(Engine(best, "torch", "fp32").classify(test.paths, top=3))
    result = {
        "live_codes": tokens["live_codes"],
        "psnr_db": tokens["psnr_db"],
        "token_accuracy": pretrained["token_accuracy"],
        "probe": probed["accuracy"],
        "probe_untrained": probed["untrained_accuracy"],
        "test_accuracy": table,
        "test_pictures": len(test),
        "seed": settings.seed,
        "fast": tiny,
        "seconds": round(time.monotonic() - started),
    }
    commands = [command_line(s) for s in (tokenizer, pretraining, probing, tuning)]
    write_page(out, result, predictions, test, commands)
    show(result, out, best)
    print(json.dumps({key: _short(value) for key, value in result.items()}))
    return result


def write_digits(folder: Path, seed: int) -> None:
    """scikit-learn's digits as PNG files: train/, val/ and test/, and lists of 50 and 200 with labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError('the demo needs scikit-learn: pip install "beit[demo]"') from None
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rng = np.random.default_rng(0)
    train: dict[int, list[Path]] = {}
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(digits.target == digit))
        num_test, num_val = round(0.2 * len(members)), round(0.15 * len(members))
        for place, index in enumerate(members):
            split = "test" if place < num_test else "val" if place < num_test + num_val else "train"
            file = folder / split / str(digit) / f"{index:04d}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index]).save(file)
            if split == "train":
                train.setdefault(digit, []).append(file)
    rng = np.random.default_rng([seed, 1])
    for labels in NUM_LABELS:
        if labels:
            with (folder / f"train-{labels}.csv").open("w", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(["path", "label"])
                for digit, files in train.items():
                    for place in rng.permutation(len(files))[: labels // 10]:
                        writer.writerow([files[place].relative_to(folder), digit])


def raw_pixel_accuracy(train: ImageSource, test: ImageSource) -> float:
    """The baseline that needs no network: logistic regression on the 8 x 8 grey values."""
    from sklearn.linear_model import LogisticRegression

    def pixels(source: ImageSource) -> np.ndarray:
        return np.stack([source.read(i)[..., 0].ravel() / 255 for i in range(len(source))])

    model = LogisticRegression(max_iter=5000).fit(pixels(train), train.labels)
    return float(model.score(pixels(test), test.labels))


def tell(number: int, what: str, settings: Any) -> None:
    """A heading on the terminal: the step, and the command that does it."""
    print(
        f"\n{number}/{3 + 2 * len(NUM_LABELS)}  {what}\n     {command_line(settings)}", file=sys.stderr
    )


def show(result: dict[str, Any], out: Path, best: Path) -> None:
    """The results as a table for people."""
    console = Console()
    title = f"Right of {result['test_pictures']} test digits"
    if result["fast"]:
        title += "; --fast shows the way only, the numbers need the whole demo"
    table = Table(title=title, title_justify="left")
    for column in ("labels", "pre-trained", "from scratch", "raw pixels"):
        table.add_column(column, justify="right")
    for row in result["test_accuracy"]:
        values = [f"{row[name]:.1%}" for name in ("pretrained", "scratch", "raw_pixels")]
        table.add_row(str(row["labels"]), *values)
    console.print(table)
    console.print(
        f"tokens alive {result['live_codes']:.0%} of 128 · linear probe {result['probe']:.1%}, "
        f"untrained {result['probe_untrained']:.1%} · {result['seconds']} s"
    )
    console.print(f"The page: {out / 'report.html'}", soft_wrap=True)
    console.print(f"Yours to try: beit classify {out}/data/test/7 -m {best} --top 3", soft_wrap=True)


def write_page(
    out: Path,
    result: dict[str, Any],
    predictions: list[Prediction],
    test: ImageSource,
    commands: list[str],
) -> None:
    """The page: what was learned at each step, in pictures."""
    page = Page(
        "BEiT on handwritten digits",
        "A tokenizer, a pre-trained encoder and a classifier, made from 1,797 pictures of 8 × 8 pixels.",
    )
    page.section("Result", f"Share of {result['test_pictures']} test digits that are named right.")
    page.table(
        ("labels used", "pre-trained", "from scratch", "raw pixels, logistic regression"),
        [
            [row["labels"], *(f"{row[k]:.1%}" for k in ("pretrained", "scratch", "raw_pixels"))]
            for row in result["test_accuracy"]
        ],
    )
    page.section(
        "1. Visual tokens",
        f"Each 32 × 32 picture becomes 4 × 4 tokens out of 128; {result['live_codes']:.0%} of them are "
        f"in use. Above the originals, below what the decoder draws from their tokens "
        f"({result['psnr_db']:.1f} dB).",
    )
    page.figure(picture(out / "tokenizer" / "reconstructions.png", "reconstructions"), "")
    page.section(
        "2. Masked image modelling",
        "From left to right: the picture; what the encoder sees; its tokens, drawn; the same with the "
        f"hidden tokens as the encoder guesses them ({result['token_accuracy']:.0%} of them exactly); "
        "which of them, in green.",
    )
    *_, last = sorted((out / "pretrained" / "pictures").glob("step-*.jpg"))
    page.figure(picture(last, "masked predictions"), "")
    steps = {name: read_metrics(out / name / "metrics.jsonl") for name in ("tokenizer", "pretrained")}
    page.charts(
        [
            line_chart(
                {"": [(m["step"], m["psnr_db"]) for m in steps["tokenizer"]]}, "step", "tokenizer, dB"
            ),
            line_chart(
                {"": [(m["step"], m["loss"]) for m in steps["pretrained"]]}, "step", "pre-training loss"
            ),
        ]
    )
    page.section(
        "3. What the encoder knows without labels",
        f"A linear layer on the frozen features of a middle block names {result['probe']:.1%} of the test "
        f"digits; on the same network untrained {result['probe_untrained']:.1%}.",
    )
    page.section(
        "4. Classified pictures",
        "The classifier's answers, wrong ones first; then the first right ones.",
    )
    page.figure(img_tag(answers(predictions, test), "classified test digits"), legend(predictions, test))
    page.section("The commands")
    page.code("\n".join(commands))
    page.write(out / "report.html")


def ranked(predictions: list[Prediction], test: ImageSource, most: int = 20) -> list[int]:
    """Test pictures to show: all that are wrong, then right ones, up to `most`."""
    wrong = [i for i, p in enumerate(predictions) if p.label != test.classes[test.labels[i]]]
    right = [i for i in range(len(predictions)) if i not in set(wrong)]
    return (wrong + right[:: max(1, len(right) // most)])[:most]


def answers(predictions: list[Prediction], test: ImageSource) -> Image.Image:
    """A sheet of test pictures, ten a row; wrong ones with a red border."""
    tiles = []
    for i in ranked(predictions, test):
        right = predictions[i].label == test.classes[test.labels[i]]
        tile = Image.fromarray(test.read(i)).resize((88, 88), Image.Resampling.NEAREST)
        tiles.append(np.asarray(ImageOps.expand(tile, 4, "#9ca3af" if right else "#dc2626")))
    return strip([tiles[i : i + 10] for i in range(0, len(tiles), 10)])


def legend(predictions: list[Prediction], test: ImageSource) -> str:
    """The answers in words, in the order of the sheet."""
    wrong = [
        f"{test.classes[test.labels[i]]} taken for {predictions[i].label} ({predictions[i].score:.0%} sure)"
        for i in ranked(predictions, test)
        if predictions[i].label != test.classes[test.labels[i]]
    ]
    return "Wrong: " + ("; ".join(wrong) or "none")


def picture(file: Path, alt: str) -> str:
    """A PNG file as an HTML element."""
    with Image.open(file) as image:
        return img_tag(image.convert("RGB"), alt)


def _short(value: Any) -> Any:
    """Numbers to four digits, for the JSON line."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, list):
        return [{key: _short(v) for key, v in row.items()} for row in value]
    return value
