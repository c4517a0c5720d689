"""Labelled pictures to train and to validate on, out of whatever a user has.

A folder a class, lists, shards; with validation pictures of their own, beside them, or taken out of them.
Classes are matched by name. In a .csv a picture may have several labels, with `;` between or in several
rows: each class is then a question of its own, answered by a sigmoid, scored by average precision.

Shapes: n pictures, C classes; truth int64 (n,) labels, or bool (n, C) where pictures have several.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beit import distributed
from beit.data import ImageSource, has_split, open_source, places_among
from beit.plural import counted
from beit.split import MOST_LOOKED_AT, SEPARATOR, Divided, divide, take

NOT_LOOKED_FOR = f"nearly equal pictures are not looked for among more than {MOST_LOOKED_AT:,}"
ENOUGH = 20  # validation pictures; the accuracy on fewer says little
MANY = 5_000  # pictures; from here on a tenth of them validates, below a fifth


class Side(NamedTuple):
    """Pictures, and the truth about them."""

    source: ImageSource  # of several labels it has the rarest of each picture
    truth: np.ndarray

    def some(self, chosen: np.ndarray) -> Side:
        """Those of some numbers (m,)."""
        return Side(take(self.source, chosen), self.truth[chosen])


class Labelled(NamedTuple):
    """What a fine-tuning learns from and is judged by."""

    train: Side
    val: Side | None
    everything: tuple[ImageSource, ...]  # as opened: what the numbers in `divided` count through
    divided: Divided
    held_out: bool  # whether the validation pictures were taken from the others

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the logits."""
        return self.train.source.classes

    @property
    def several(self) -> bool:
        """Whether a picture may have several labels."""
        return self.train.truth.ndim == 2

    @property
    def counts(self) -> np.ndarray:
        """int64 (C,): the training pictures of each class."""
        return np.bincount(self.train.source.labels, minlength=len(self.classes))

    def remarks(self) -> list[str]:
        """What is to be told before a training: what was held out, what looks like a mistake."""
        said = []
        if self.held_out and self.val is not None:
            count = len(self.val.source)
            copies = "duplicates" if self.divided.looked else f"equal files ({NOT_LOOKED_FOR})"
            said.append(
                f"{count:,} of {len(self.train.source) + count:,} pictures are held out to validate on, "
                f"of each class its share, {copies} together; split.csv names them"
            )
        if self.val is not None and len(self.val.source) < ENOUGH:
            said.append(
                f"validation pictures: {len(self.val.source)}, so their accuracy says little: each is "
                f"{1 / len(self.val.source):.0%} of it; hold out more by --val-share, or give some by --val"
            )
        for rare, number, meant in self._misspelt():
            said.append(f"class {rare} has {counted(number, 'picture')}; is it a misspelt {meant}?")
        leaks = self.divided.across(self.divided.near)
        if leaks:
            val = set(self.divided.val.tolist())
            copies_in_val = sum(number in val for group in leaks for number in group)
            first = [next(n for n in leaks[0] if (n in val) == side) for side in (False, True)]
            one, other = (source.name(place) for source, place in map(self._picture, first))
            said.append(
                f"{counted(copies_in_val, 'validation picture')} also among the training pictures, which "
                f"makes numbers too good: {other} is {one}"
            )
        return said

    def _misspelt(self) -> list[tuple[str, int, str]]:
        """Classes of one or two pictures that are named nearly like a far larger one: name, count, that."""
        found = []
        counts = np.bincount(self.everything[0].labels, minlength=len(self.classes)).tolist()
        for name, count in zip(self.classes, counts, strict=True):
            if count in (1, 2) and not self.several:
                larger = [c for c, n in zip(self.classes, counts, strict=True) if n >= 3 * count]
                close = difflib.get_close_matches(name, larger, n=1, cutoff=0.75)
                found += [(name, count, close[0])] if close else []
        return found

    def _picture(self, number: int) -> tuple[ImageSource, int]:
        """The source and the place there of a picture by its number in `divided`."""
        for source in self.everything:
            if number < len(source):
                return source, number
            number -= len(source)
        raise IndexError(number)

    def twins(self) -> list[tuple[str, list[str]]]:
        """Groups of pictures that are the same: what is to know of each, and their names.

        Those in both parts of a given split come first, then those with two labels.
        """
        exact = {number for group in self.divided.exact for number in group}
        across = set(map(tuple, self.divided.across(self.divided.near)))
        found = []
        for group in self.divided.near:
            named = [self._picture(number) for number in group]
            labels = {source.classes[source.labels[place]] for source, place in named}
            notes = ["equal pixels" if exact.issuperset(group) else "nearly equal"]
            if len(labels) > 1 and not self.several:
                notes.insert(0, f"two labels: {', '.join(sorted(labels))}")
            if tuple(group) in across:
                notes.insert(0, "in both parts")
            rank = (tuple(group) not in across, len(labels) < 2, group[0])
            found.append((rank, "; ".join(notes), [source.name(place) for source, place in named]))
        return [(notes, names) for _, notes, names in sorted(found)]


def open_labelled(
    data: Path, val: Path | None, share: float | None, seed: int, workers: int
) -> Labelled:
    """Open training pictures, and those to validate on: `val`, or DATA's own, or a share of each class.

    share: to hold out where there are no others; a fifth, or a tenth from 5,000 pictures on, where None.
        0 holds none out.
    """
    if share is not None and not 0 <= share < 1:
        raise ValueError(f"val_share {share} is not from 0 to below 1; 0.2 is usual, 0 is none")
    train = with_truth(open_source(data, labelled=True), data)
    classes = train.source.classes
    if len(classes) < 2:
        raise ValueError(
            f"{data} has one class ({classes[0]}); two or more are needed, each in a folder of its name"
        )
    if val is not None or (has_split(data, "train") and has_split(data, "val")):
        place = val or data
        given = with_truth(open_source(place, "val", labelled=True), place, train.truth.ndim == 2)
        other = in_order(given, classes, place, "the training part")
        divided = distributed.on_main(lambda: divide(train.source, other.source, 0, seed, workers))
        readable = divided.val - len(train.source)
        if not len(readable):
            raise ValueError(f"no picture of {place} can be read; `beit check {place}` tells why")
        sources = train.source, other.source
        return Labelled(train, other.some(readable), sources, divided, False)
    if share is None:
        share = 0.2 if len(train.source) < MANY else 0.1
    divided = distributed.on_main(lambda: divide(train.source, None, share, seed, workers))
    if not len(divided.val):
        return Labelled(train, None, (train.source,), divided, False)
    sides = train.some(divided.train), train.some(divided.val)
    return Labelled(*sides, (train.source,), divided, True)


def in_order(side: Side, classes: tuple[str, ...], place: Path, owner: str) -> Side:
    """The same pictures, their labels numbered as their owner's classes are, matched by name."""
    present = None  # where a picture has several labels, its source knows the rarest of them
    if side.truth.ndim == 2:
        present = np.flatnonzero(side.truth.any(axis=0))
    try:
        source = side.source.with_classes(classes, owner, present)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if side.truth.ndim == 1:
        return Side(source, source.labels)
    truth = np.zeros((len(source), len(classes)), dtype=bool)
    for old, new in enumerate(places_among(classes, side.source.classes)):
        if new >= 0:
            truth[:, new] |= side.truth[:, old]
    return Side(source, truth)


def with_truth(source: ImageSource, place: Path, always: bool = False) -> Side:
    """A source with its labels; those of a .csv may be several a picture, or always are."""
    if place.suffix != ".csv":
        odd = [name for name in source.classes if SEPARATOR in name]
        if odd:
            raise ValueError(
                f"{place} has the class {odd[0]!r}, and in lists a {SEPARATOR} stands between labels; "
                "rename it"
            )
        if always:
            raise ValueError(
                f"{place} has one label a picture, the training pictures several; give a .csv"
            )
        return Side(source, source.labels)
    names = [source.name(i) for i in range(len(source))]
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        first.setdefault(name, i)
    if not always and len(first) == len(names) and not any(SEPARATOR in c for c in source.classes):
        return Side(source, source.labels)

    words = [[word.strip() for word in label.split(SEPARATOR)] for label in source.classes]
    for label, some in zip(source.classes, words, strict=True):
        if "" in some:
            raise ValueError(
                f"{place} has the label {label!r}; give names with {SEPARATOR} between them"
            )
    classes = tuple(sorted({word for some in words for word in some}))
    number = {name: i for i, name in enumerate(classes)}
    row = {name: place for place, name in enumerate(first)}
    truth = np.zeros((len(first), len(classes)), dtype=bool)
    for name, label in zip(names, source.labels.tolist(), strict=True):
        truth[row[name], [number[word] for word in words[label]]] = True
    once = take(source, list(first.values()))
    if not always and (truth.sum(axis=1) == 1).all():  # the same row twice
        return Side(once, once.labels)
    order = np.argsort(truth.sum(axis=0), kind="stable")  # the rarest first
    rarest = ImageSource(once.paths, order[truth[:, order].argmax(axis=1)], classes)
    return Side(rarest, truth)
