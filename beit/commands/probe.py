"""`beit probe`: how much of the labels can be read off the frozen features of a model, layer by layer.

One pass over the pictures gives the features of every layer and pooling asked for. Penalty, layer and
pooling are chosen on a fifth of the training pictures; then all of them are fitted, and the others scored.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table
from torch import Tensor

from beit.atomic import check_place, write_atomically
from beit.checkpoints import load_model
from beit.data import ImageSource, SomeSkipped, TooManyBadImages, has_split, open_source
from beit.duplicates import duplicates, pixel_hash
from beit.features import Pooling, default_layer, extract_features, layer_states, pooled, storage
from beit.hub import model_files
from beit.image import BadImage, preprocess
from beit.metrics import accuracy_interval
from beit.model import Beit
from beit.names import printable
from beit.plural import counted
from beit.precision import Precision, pick_device
from beit.probe import (
    LEARNING_RATES,
    SGD_RATES,
    AttentiveProbe,
    few_shot,
    fit_attentive,
    fit_best_probe,
    fit_probe,
    fit_sgd,
    knn_scores,
    stratified_fifth,
)
from beit.ranges import Seed
from beit.split import check_one_label, divide, take
from beit.workers import load_ahead

SHOTS = (1, 5, 10)


@Parameter(name="*")
@dataclass(frozen=True)
class Probe:
    data: Path
    """Folder with train/ and val/, each with one sub-folder a class. Where there is no val a fifth of each
    class is held out, copies of a picture on one side."""
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """Model folder or file, hub:owner/name, or a name that `beit models` lists."""
    layers: str = "paper"
    """Blocks to read, counted from 1: 9,12 or all. paper: 9 of 12, 14 of 24, else three quarters."""
    pooling: Literal["mean", "cls", "both", "all"] = "mean"
    """Mean of the patches, class token, both side by side, or all three in turn."""
    kinds: str = "linear,knn"
    """Of linear, sgd, knn, attentive, few-shot; the first chooses the layer that the last two read. linear:
    fitted to its end by L-BFGS, over penalties. sgd: by SGD over learning rates, as papers do."""
    split: str = "val"
    """Folder of DATA to score on."""
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    """Write the results to this .json as well."""
    baseline: Annotated[bool, Parameter(negative="--no-baseline")] = True
    """Probe the same network untrained beside it."""
    seed: Seed = 0
    """Of the untrained network, the fifth that is held out, and the draws of few-shot."""
    batch_size: PositiveInt = 64
    precision: Precision = "auto"
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto takes a GPU where there is one."""
    workers: NonNegativeInt = 2
    """Threads that prepare pictures."""
    json: bool = False
    """Print one JSON line instead of a table."""


Labelled = tuple[Tensor, Tensor]  # (n, D) features, (n,) labels


def probe(settings: Probe) -> dict[str, Any]:
    """Probe a model: linear, k-NN, attentive and few-shot, on frozen features."""
    kinds = chosen_kinds(settings.kinds)
    check_place(settings.out, model_files(settings.model), ".json")
    train, test = sides(settings)
    model = load_model(settings.model, dtype=torch.float32).to(pick_device(settings.device))
    layers = chosen_layers(settings.layers, model.config.depth)
    if kinds[0] in ("attentive", "few-shot") and (len(layers) > 1 or settings.pooling == "all"):
        raise ValueError(
            f"--kinds {settings.kinds} reads one layer; begin with linear, which chooses it"
        )
    hashes: dict[str, bytes] = {}
    listed = len(train) + len(test)
    (train, known), (test, asked) = (
        features_of(settings.model, model, s, layers, settings, hashes) for s in (train, test)
    )
    features = [known, asked]
    held_out = stratified_fifth(train.labels, settings.seed)
    classes = len(train.classes)

    def labelled(layer: int, pooling: Pooling) -> tuple[Labelled, Labelled]:
        sides = zip(features, (train, test), strict=True)
        fitted, scored = (with_labels(pooled(f[layer], pooling), s, model) for f, s in sides)
        return fitted, scored

    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    for layer in layers:
        for pooling in get_args(Pooling) if settings.pooling == "all" else (settings.pooling,):
            row: dict[str, Any] = {"layer": layer, "pooling": pooling}
            for kind in kinds:
                if kind in SCORES:
                    row[kind] = SCORES[kind](*labelled(layer, pooling), held_out, classes)
            rows.append(row)
    said(
        f"{counted(len(rows), 'pair')} of layer and pooling probed in {time.monotonic() - started:.1f} s"
    )
    paper = default_layer(model.config.depth)
    best = rows[0]
    if kinds[0] in SCORES:
        best = max(rows, key=lambda row: (row[kinds[0]]["held_out"], row["layer"] == paper))
    layer, pooling = best["layer"], best["pooling"]
    result: dict[str, Any] = {"layer": layer, "pooling": pooling, "kind": kinds[0], "rows": rows}
    if "attentive" in kinds:
        result["attentive"] = attentive(model, train, test, layer, held_out, settings)
    if "few-shot" in kinds:
        result["few-shot"] = few_shots(*labelled(layer, pooling), classes, settings.seed)
    results = {**best, **result}[kinds[0]]
    headline = results[-1] if kinds[0] == "few-shot" else results
    result |= {key: headline[key] for key in ("accuracy", "interval")}
    if settings.baseline and kinds[0] in SCORES:
        torch.manual_seed(settings.seed)
        fresh = type(model)(model.config).to(model.cls_token.device)
        fresh.image_spec = model.image_spec
        name = "the same, untrained"
        features = [features_of(name, fresh, s, [layer], settings, hashes)[1] for s in (train, test)]
        score = SCORES[kinds[0]](*labelled(layer, pooling), held_out, classes)
        result["untrained_accuracy"] = score["accuracy"]
    result["bad_images"] = listed - len(train) - len(test)
    result["duplicates"] = in_both(train, test, hashes)
    if settings.json:
        print(json.dumps(result))
    else:
        show(result, settings, model.config.depth, paper, len(test))
    if settings.out is not None:
        document = {"settings": asdict(settings), **result}
        write_atomically(settings.out, json.dumps(document, default=str, indent=1).encode() + b"\n")
    if result["bad_images"]:
        raise SomeSkipped(
            f"{result['bad_images']:,} of {counted(listed, 'picture')} could not be read; they are left out"
        )
    return result


def sides(settings: Probe) -> tuple[ImageSource, ImageSource]:
    """Pictures to fit to, and others to score on: those of a split, or a fifth of each class."""
    data, split = settings.data, settings.split
    train = open_source(data, "train", labelled=True)
    check_one_label(train, data)
    if len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"{data} has one class; a probe tells two or more apart, each in a folder of its name"
        )
    if has_split(data, "train") and has_split(data, split) and split != "train":
        test = open_source(data, split, labelled=True).with_classes(train.classes, "its train part")
        return train, test
    if split != "val":
        open_source(data, split)  # tells of a folder that has train and not this
        raise ValueError(f"{data} needs a train and a {split} folder, to score on others")
    divided = divide(train, None, 0.2, settings.seed, settings.workers)
    if not len(divided.val):
        raise ValueError(
            f"{data} has no val, and no class of two pictures or more to hold one out of; give a val"
        )
    said(f"{data} has no val: {len(divided.val)} of {len(train)} pictures are held out to score on")
    return take(train, divided.train), take(train, divided.val)


def chosen_kinds(text: str) -> list[str]:
    """The kinds of probe that --kinds names, in its order."""
    kinds = [kind.strip() for kind in text.split(",")]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"--kinds {text}: {unknown[0]!r} is not one of {', '.join(KINDS)}")
    return list(dict.fromkeys(kinds))


def chosen_layers(text: str, depth: int) -> list[int]:
    """The layers that --layers names, counted from 1 (0 is the input of the first)."""
    if text == "all":
        return list(range(1, depth + 1))
    if text == "paper":
        return [default_layer(depth)]
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise ValueError(f"--layers {text} is not all, paper, or numbers from 1 to {depth}, with commas")
    layers = list(dict.fromkeys(int(word) for word in text.split(",")))
    if max(layers) > depth:
        raise ValueError(f"layer {max(layers)} does not exist; this model has layers 0 to {depth}")
    return layers


def prepared(
    model: Beit, source: ImageSource, settings: Probe, hashes: dict[str, bytes]
) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) of a source; the pictures' hashes are put down by their names.

    Pictures that cannot be read are named on stderr and have no hash; zeros stand in their place.
    """
    parts = np.array_split(np.arange(len(source)), -(-len(source) // settings.batch_size))

    def prepare(number: int) -> Tensor:
        images = np.zeros((len(parts[number]), 3, *model.image_spec.size), dtype=np.float32)
        for image, i in zip(images, parts[number].tolist(), strict=True):
            try:
                pixels = source.read(i)
            except BadImage as error:
                said(printable(f"left out: {error}"))
                continue
            hashes[source.name(i)] = pixel_hash(pixels)
            image[:] = preprocess(pixels, model.image_spec)
        return torch.from_numpy(images)

    yield from load_ahead(prepare, range(len(parts)), settings.workers)


def features_of(
    name: str,
    model: Beit,
    source: ImageSource,
    layers: list[int],
    settings: Probe,
    hashes: dict[str, bytes],
) -> tuple[ImageSource, dict[int, Tensor]]:
    """The readable pictures of a source, and their {layer: (n, 2D)}: class token, mean of patches."""
    started = time.monotonic()
    batches = prepared(model, source, settings, hashes)
    features = extract_features(model, batches, layers, "both", settings.precision, len(source))
    kept = [i for i in range(len(source)) if source.name(i) in hashes]
    if not kept:
        raise TooManyBadImages(
            f"none of {counted(len(source), 'picture')} of {settings.data} can be read"
        )
    if len(kept) < len(source):
        source, features = take(source, kept), {layer: x[kept] for layer, x in features.items()}
    said(f"{name}: features of {counted(len(source), 'picture')} in {time.monotonic() - started:.1f} s")
    return source, features


def with_labels(features: Tensor, source: ImageSource, model: Beit) -> Labelled:
    """On the GPU where the model is on one, else on the CPU, as float64 is not everywhere."""
    device = model.cls_token.device if model.cls_token.is_cuda else torch.device("cpu")
    return features.to(device), torch.tensor(source.labels, device=device)


def accuracy_of(predicted: Tensor, labels: Tensor) -> dict[str, Any]:
    """Share of right answers and its 95 % interval."""
    right = (predicted == labels).cpu().numpy()
    return {"accuracy": float(right.mean()), "interval": accuracy_interval(right)}


def score_linear(fitted: Labelled, scored: Labelled, held_out: Tensor, classes: int) -> dict[str, Any]:
    """A fifth of `fitted` chooses the penalty, then all of it is fitted."""
    (x, y), out = fitted, held_out.to(fitted[0].device)
    chosen, accuracy = fit_best_probe((x[~out], y[~out]), (x[out], y[out]), classes)
    per_picture = chosen.penalty / max(int((~out).sum()), 1)
    final = fit_probe(x, y, classes, per_picture * len(x))
    score = accuracy_of(final.predict(scored[0]), scored[1])
    return {**score, "held_out": accuracy, "penalty": per_picture}


def score_sgd(fitted: Labelled, scored: Labelled, held_out: Tensor, classes: int) -> dict[str, Any]:
    """A fifth of `fitted` chooses the learning rate, then all of it is fitted."""
    (x, y), out = fitted, held_out.to(fitted[0].device)
    tried = zip(fit_sgd(x[~out], y[~out], classes), SGD_RATES, strict=True)
    accuracy, lr = max((probe.accuracy(x[out], y[out]), lr) for probe, lr in tried)
    (final,) = fit_sgd(x, y, classes, (lr,))
    score = accuracy_of(final.predict(scored[0]), scored[1])
    return {**score, "held_out": accuracy, "lr": lr}


def score_knn(fitted: Labelled, scored: Labelled, held_out: Tensor, classes: int) -> dict[str, Any]:
    """Nothing to choose; `held_out` is scored by the rest, so that layers can be compared."""
    (x, y), out = fitted, held_out.to(fitted[0].device)
    answers = knn_scores((x[~out], y[~out]), x[out], classes).argmax(dim=1)
    score = accuracy_of(knn_scores(fitted, scored[0], classes).argmax(dim=1), scored[1])
    return {**score, "held_out": float((answers == y[out]).double().mean())}


SCORES = {"linear": score_linear, "sgd": score_sgd, "knn": score_knn}
KINDS = (*SCORES, "attentive", "few-shot")


def attentive(
    model: Beit, train: ImageSource, test: ImageSource, layer: int, held_out: Tensor, settings: Probe
) -> dict[str, Any]:
    """One more pass, for all tokens of a layer; a fifth chooses the learning rate, then all are fitted."""
    tokens = [tokens_of(model, source, layer, settings) for source in (train, test)]  # all can be read
    labels = [torch.tensor(source.labels) for source in (train, test)]
    classes, device = len(train.classes), model.cls_token.device

    def fit(chosen: Tensor, lr: float) -> AttentiveProbe:
        heads = model.config.num_heads
        return fit_attentive(
            tokens[0][chosen], labels[0][chosen], classes, heads, lr, settings.seed, device
        )

    started = time.monotonic()
    inside, outside = torch.where(~held_out)[0], torch.where(held_out)[0]
    right = {
        lr: accuracy_of(fit(inside, lr).predict(tokens[0][outside]), labels[0][outside])["accuracy"]
        for lr in LEARNING_RATES
    }
    lr = max(right, key=lambda rate: right[rate])
    final = fit(torch.arange(len(train)), lr)
    said(f"attentive probes trained in {time.monotonic() - started:.1f} s")
    score = accuracy_of(final.predict(tokens[1]), labels[1])
    return {**score, "held_out": right[lr], "lr": lr, "layer": layer}


def tokens_of(model: Beit, source: ImageSource, layer: int, settings: Probe) -> Tensor:
    """(n, N, D) float16 states of a layer."""
    place = 0
    kept = torch.empty(0)
    batches = prepared(model, source, settings, {})
    for (state,) in layer_states(model, batches, [layer], settings.precision):
        if not place:
            kept = storage((len(source), *state.shape[1:]), torch.float16)
        kept[place : place + len(state)] = state.clamp(-65504, 65504)
        place += len(state)
    return kept


def few_shots(fitted: Labelled, scored: Labelled, classes: int, seed: int) -> list[dict[str, Any]]:
    """With 1, 5 and 10 pictures a class; as far as every class has them."""
    least = int(torch.bincount(fitted[1], minlength=classes).min())
    shots = [number for number in SHOTS if number <= max(least, 1)]
    return [few_shot(fitted, scored, classes, number, seed)._asdict() for number in shots]


def in_both(train: ImageSource, test: ImageSource, hashes: dict[str, bytes]) -> list[list[str]]:
    """Groups of pictures with equal pixels that have some in train and some in test; said on stderr."""
    names = [source.name(i) for source in (train, test) for i in range(len(source))]
    groups = [g for g in duplicates(hashes[n] for n in names) if g[0] < len(train) <= g[-1]]
    if groups:
        a, b = names[groups[0][0]], names[groups[0][-1]]
        said(
            f"{counted(len(groups), 'picture')} in both splits, which makes numbers too good: {a} is {b}"
        )
    return [[names[place] for place in group] for group in groups]


def said(words: str) -> None:
    """A line on stderr."""
    print(words, file=sys.stderr)


def percent(score: dict[str, Any]) -> str:
    """92.1% (90.2 to 93.9)."""
    low, high = score["interval"]
    return f"{score['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


NAMES = {
    "linear": "linear", "sgd": "linear, SGD", "knn": "20 nearest", "attentive": "attentive",
    "few-shot": "few-shot",
}  # fmt: skip


def show(result: dict[str, Any], settings: Probe, depth: int, paper: int, count: int) -> None:
    """The results as a table and some lines, for people."""
    console = Console(highlight=False)
    scored = [kind for kind in SCORES if kind in result["rows"][0]]
    if scored:
        table = Table(title=f"right of {counted(count, 'picture')} (95 %)", title_justify="left")
        table.add_column("layer", justify="right")
        table.add_column("pooling")
        for kind in scored:
            table.add_column(NAMES[kind])
        for row in result["rows"]:
            star = " *" if row["layer"] == paper else ""
            values = [percent(row[kind]) for kind in scored]
            table.add_row(f"{row['layer']}{star}", row["pooling"], *values)
        console.print(table)
        console.print(f"* the layer of BEiT's paper, or as deep: {paper} of {depth}")
        if "knn" in scored:
            console.print("nearest by cosine, each with the weight exp(cosine / 0.07)")
    where = f"of layer {result['layer']}, {result['pooling']}"
    if len(result["rows"]) > 1:
        console.print(f"best on a fifth of the training pictures: {where[3:]}")
    if "attentive" in result:
        console.print(f"attentive probe of layer {result['layer']}: {percent(result['attentive'])}")
    for few in result.get("few-shot", ()):
        console.print(f"{few['shots']} a class, linear probe {where}: {percent(few)}, 10 draws")
    name = NAMES[result["kind"]]
    beside = ""
    if "untrained_accuracy" in result:
        beside = f"; the same network untrained {result['untrained_accuracy']:.1%}"
    right = f"{result['accuracy']:.1%} of {counted(count, 'picture')} right"
    console.print(f"{name} probe {where}: {right}{beside}", soft_wrap=True)
