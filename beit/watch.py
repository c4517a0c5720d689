"""Is a pre-training working? Probes of its features, their rank, pictures of its guesses, and a page.

Masked losses say little: 5 % of the tokens guessed may be a good end. So a run is looked at now and
then, from before its first step to after its last. A look changes nothing of the training.

    looks.json          one object a look that probed: step, probes, effective rank
    pictures/           one sheet a look
    report.html         all of it, with the curves of metrics.jsonl
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit import distributed
from beit.atomic import write_atomically
from beit.data import ImageSource, has_split, open_source
from beit.frozen import features_of
from beit.metrics import effective_rank
from beit.model import Beit
from beit.plural import counted
from beit.precision import Precision
from beit.probe import fit_best_probe, fit_probe, knn_scores, stratified_fifth
from beit.report import Page
from beit.run import read_metrics
from beit.settings import RunError
from beit.split import check_one_label, data_hash, divide, take
from beit.visualize import data_tag, jpeg_bytes, line_chart

MOST_FOR_RANK = 256  # pictures
MOST_KNOWN, MOST_ASKED = 10_000, 5_000  # labelled pictures that probes are fitted to, and scored on
MOST_SHEETS = 12  # on the page
SHEET_BYTES = 250_000  # so that a page stays below 5 MB

Look = dict[str, Any]


@dataclass
class Watch:
    """Looks at a model in training, and tells of it in the run's folder.

    train, test: labelled pictures to probe with; without them there is the rank alone.
    unlabelled: pictures for the rank where there are no labelled ones.
    layers: blocks whose features are probed, counted from 1: what a head on them would get.
    workers: threads that prepare the pictures.
    draw: model -> a sheet of pictures, or None.
    """

    out: Path
    unlabelled: ImageSource
    layers: Sequence[int]
    precision: Precision
    workers: int
    draw: Callable[[Any], Image.Image | None]
    train: ImageSource | None = None
    test: ImageSource | None = None
    looks: list[Look] = field(init=False)
    pictures: str = field(init=False)  # what those that are to be looked at are known by
    told: set[str] = field(init=False, default_factory=set)  # which of them cannot be read

    def __post_init__(self) -> None:
        file = self.out / "looks.json"
        try:
            self.looks = json.loads(file.read_text()) if file.exists() else []
        except ValueError as error:
            raise RunError(
                f"{file} is not JSON: {error}; remove it to go on without these looks"
            ) from error
        sources = [source for source in (self.train, self.test) if source is not None]
        self.pictures = data_hash(sources or [self.unlabelled], None)

    @property
    def alike(self) -> list[Look]:
        """The looks at these layers and at just those pictures that the newest look could read; a run that
        goes on may have had others before, and a disk may have failed for a while."""
        these = [
            look
            for look in self.looks
            if look.get("pictures", self.pictures) == self.pictures
            and all(f"effective_rank_{i}" in look for i in self.layers)
        ]
        read = these[-1].get("read") if these else None
        return [look for look in these if look.get("read", read) == read]

    def look(self, model: Beit, step: int, probe: bool = True) -> None:
        """Draw, and probe unless that is left to a later look; the model stays in the mode it was in."""
        training = model.training
        self.looks = [look for look in self.looks if look["step"] < step]  # a resumed run looks again
        try:
            if probe or not self.alike:
                look = {"step": step, "pictures": self.pictures, **self.probes(model.eval())}
                self.looks.append(look)
            sheet = self.draw(model.eval())
        finally:
            model.train(training)
        if sheet is not None:
            (self.out / "pictures").mkdir(exist_ok=True)
            file = self.out / "pictures" / f"step-{step:08d}.jpg"
            write_atomically(file, jpeg_bytes(sheet, SHEET_BYTES))
        write_atomically(self.out / "looks.json", json.dumps(self.looks, indent=1).encode() + b"\n")

    def probes(self, model: Beit) -> Look:
        """{"effective_rank_9": ..., "linear_9": ..., "knn_9": ...}, accuracies as shares."""
        layers = list(self.layers)
        if self.train is None or self.test is None:
            some = spread(len(self.unlabelled), MOST_FOR_RANK)
            seen = features_of(model, self.unlabelled, layers, self.precision, self.workers, some)
            return {f"effective_rank_{i}": effective_rank(x.numpy()) for i, x in seen.layers.items()}
        known = features_of(model, self.train, layers, self.precision, self.workers, told=self.told)
        asked = features_of(model, self.test, layers, self.precision, self.workers, told=self.told)
        device = model.cls_token.device if model.cls_token.is_cuda else torch.device("cpu")
        y = torch.from_numpy(self.train.labels[known.kept]).to(device)
        truth = torch.from_numpy(self.test.labels[asked.kept]).to(device)
        fifth = stratified_fifth(y.cpu().numpy(), seed=0).to(device)  # chooses the penalty
        some = spread(len(truth), MOST_FOR_RANK)
        classes, look = len(self.train.classes), Look(read=[len(y), len(truth)])
        for i in layers:
            x, new = known.layers[i].to(device), asked.layers[i].to(device)
            chosen, _ = fit_best_probe((x[~fifth], y[~fifth]), (x[fifth], y[fifth]), classes)
            line = fit_probe(x, y, classes, chosen.penalty * len(y) / max(int((~fifth).sum()), 1))
            near = knn_scores((x, y), new, classes).argmax(dim=1)
            look[f"linear_{i}"] = line.accuracy(new, truth)
            look[f"knn_{i}"] = float((near == truth).double().mean())
            look[f"effective_rank_{i}"] = effective_rank(asked.layers[i][some].numpy())
        return look

    def write_page(self, title: str, expected: Sequence[tuple[str, str, str]], tensors: int) -> None:
        """report.html: what came beside what is to be expected, curves, probes, pictures, settings.

        expected: (what, what came, what is usual) rows. tensors: width of the features.
        """
        page = Page(title, "Made anew at each look while it runs. Nothing on this page needs a network.")
        page.section("Is it working?", "What came, and what is usual.")
        page.table(("", "now", "usual"), expected)
        metrics = read_metrics(self.out / "metrics.jsonl")
        curves = [
            line_chart({"": points(metrics, key)}, "step", name)
            for key, name in CURVES.items()
            if len(points(metrics, key)) > 1
        ]
        if curves:
            page.section("Curves", "One point a logged step.")
            page.charts(curves)
        if self.train is not None and self.test is not None:
            known, asked = self.alike[-1].get("read", (len(self.train), len(self.test)))
            page.section(
                "Probes",
                f"Share of {asked:,} labelled pictures named right from frozen features, pooled "
                f"and normed; {known:,} others are known. Step 0 is the network before its first "
                f"step.{self._others()}",
            )
            page.charts(
                [
                    line_chart(
                        {f"layer {i}": points(self.alike, f"{k}_{i}") for i in self.layers}, "step", k
                    )
                    for k in ("linear", "knn")
                ]
            )
        page.section(
            "Are features alive?",
            f"The effective rank of {tensors}-wide features: how many directions they use. One that falls "
            "towards 1 is a collapse; it grows while a network learns to tell pictures apart."
            f"{self._others()}",
        )
        ranks = {f"layer {i}": points(self.alike, f"effective_rank_{i}") for i in self.layers}
        page.charts([line_chart(ranks, "step", "effective rank")])
        self._show_pictures(page)
        page.section(
            "Settings",
            "run.toml, as the run was begun, and the command as it was last given; "
            f"beit {version('beit')}, torch {torch.__version__}.",
        )
        page.code((self.out / "run.toml").read_text(encoding="utf-8"))
        page.code(shlex.join(["beit", *sys.argv[1:]]))
        page.write(self.out / "report.html")

    def _others(self) -> str:
        left = len(self.looks) - len(self.alike)
        return f" {counted(left, 'look')} at other pictures or layers: in looks.json." if left else ""

    def _show_pictures(self, page: Page) -> None:
        sheets = sorted((self.out / "pictures").glob("step-*.jpg"))
        if sheets:
            page.section(
                "Guesses",
                "From left to right: the picture; what the encoder sees; its tokens, drawn; the same with "
                "the hidden ones as the encoder guesses them; the hidden patches, green where the very "
                "token was guessed. VQ-KD's tokens are drawn as the mean of the patches that took each; a "
                "tokenizer that cannot draw leaves the middle out. Guessed pixels have each patch's true "
                "mean and contrast, which are no part of what is guessed. "
                f"In {self.out.name}/pictures: {counted(len(sheets), 'sheet')}.",
            )
        for i in spread(len(sheets), MOST_SHEETS):
            file = sheets[i]
            tag = data_tag(file.read_bytes(), "jpeg", file.stem)
            page.figure(tag, f"step {int(file.stem.split('-')[1]):,}")


CURVES = {
    "loss": "loss",
    "token_accuracy": "share of hidden tokens guessed",
    "target_perplexity": "perplexity of the tokens",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_second": "pictures a second",
}


def spread(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers below `count`, evenly spread, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def share_of_each(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """The numbers of `most` pictures of those with these labels (n,), of each class its share."""
    order = np.random.default_rng([seed, 5]).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    return np.sort(by_class[spread(len(labels), most)])


def probe_pictures(place: Path, seed: int, workers: int) -> tuple[ImageSource, ImageSource]:
    """Labelled pictures to fit probes to, and others to score them on; says how many.

    Those of train and val, or a fifth of each class held out where there is no val, copies of a picture
    on one side. Of large sets 10,000 and 5,000: all processes wait for a look.
    """
    known = open_source(place, "train", labelled=True)
    check_one_label(known, place)
    asked, how = known, ""
    if has_split(place, "val"):
        asked = open_source(place, "val", labelled=True).with_classes(known.classes, "its train part")
    else:
        if len(known) > MOST_KNOWN + MOST_ASKED:  # each is decoded
            known = take(known, share_of_each(known.labels, MOST_KNOWN + MOST_ASKED, seed))
        some = known
        train, val = distributed.on_main(lambda: divide(some, None, 0.2, seed, workers)[:2])
        known, asked = take(some, train), take(some, val)
        how = ", a fifth held out, as there is no val"
    if len(np.unique(known.labels)) < 2 or not len(asked):
        raise ValueError(
            f"--probe-data {place} has {len(known)} labelled pictures to learn from, of "
            f"{len(np.unique(known.labels))} classes, and {len(asked)} to ask of; "
            "a probe tells two classes or more apart"
        )
    told = [f"{len(known):,}", f"{len(asked):,}"]
    if len(known) > MOST_KNOWN:
        known = take(known, share_of_each(known.labels, MOST_KNOWN, seed))
        told[0] = f"{MOST_KNOWN:,} of {told[0]}"
    if len(asked) > MOST_ASKED:
        asked = take(asked, share_of_each(asked.labels, MOST_ASKED, seed))
        told[1] = f"{MOST_ASKED:,} of {told[1]}"
    distributed.say(f"probes: fitted to {told[0]} pictures of {place}, scored on {told[1]} others{how}")
    return known, asked


def points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, number) of the lines that have one."""
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
