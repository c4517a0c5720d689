"""`beit search`: the pictures of a folder of embeddings that are most like others, by cosine."""

from __future__ import annotations

import functools
import html
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from PIL import Image, ImageDraw, ImageOps

from beit import faiss_index
from beit.atomic import CannotWrite, check_place, replacing
from beit.data import ImageSource, SomeSkipped, find_pictures, open_source
from beit.embeddings import Embeddings, EmbeddingsError, Manifest, model_sha256
from beit.engine import Embedding, Engine, Entry, Picture, each_picture
from beit.hub import resolve
from beit.image import BadImage, read_image
from beit.names import json_line, printable
from beit.plural import counted

SHEETS = (".jpg", ".jpeg", ".png", ".html")
SIDE = 160  # pixels of a picture on a sheet
GREY = (200, 200, 200)  # what a picture that is gone looks like


@Parameter(name="*")
@dataclass(frozen=True)
class Search:
    folder: Path
    """What `beit embed` wrote. Every vector is compared, exactly, unless --approximate."""
    images: Annotated[list[str], Parameter(consume_multiple=True, allow_leading_hyphen=True)]
    """Pictures to find the like of; all that `beit embed` takes, or - for a list on stdin."""
    _: KW_ONLY
    model: Annotated[str | None, Parameter(alias="-m")] = None
    """The model of the folder, where it lies elsewhere than the folder says."""
    top: PositiveInt = 10
    """Neighbours of each picture."""
    approximate: bool = False
    """For millions: a faiss index, made once, of which it says how many of the true neighbours it finds."""
    sheet: Path | None = None
    """Draw the pictures and their neighbours, a row each, into this .jpg, .png or .html."""
    json: bool = False
    """Print one JSON object a picture."""
    threads: PositiveInt | None = None
    """Of the model; the runtime's choice if not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class Found:
    """What is most like one picture, the nearest first; nothing where it could not be read."""

    path: str
    neighbours: tuple[tuple[str, float], ...]  # (path, cosine)
    error: str | None = None


def search(settings: Search) -> list[Found]:
    """Find the neighbours of each picture and print them."""
    sheet = settings.sheet
    if sheet is not None and sheet.suffix.lower() not in SHEETS:
        raise ValueError(f"--sheet {sheet} must end in {', '.join(SHEETS[:-1])} or {SHEETS[-1]}")
    check_place(sheet, settings.images)
    if settings.approximate:
        faiss_index.require()
    folder = Embeddings(settings.folder)
    check(folder)
    pictures = list(each_picture(find_pictures(settings.images, "search")))
    if not pictures:
        raise ValueError("the list on stdin names no pictures; give it a path a line")
    tall = len(pictures) * (SIDE + 4) + 4
    if sheet is not None and sheet.suffix.lower() in (".jpg", ".jpeg") and tall > 65_500:
        raise ValueError(
            f"--sheet {sheet}: {counted(len(pictures), 'row')} are {tall:,} pixels, and a JPEG has 65,500 "
            f"at most; name {sheet.stem}.html, or search for fewer at once"
        )
    queries = embed(pictures, folder.manifest, settings)
    nearest = faiss_index.nearest if settings.approximate else Embeddings.nearest
    found = neighbours(folder, queries, settings.top, nearest)

    if settings.json:
        for one in found:
            near = [{"path": path, "cosine": cosine} for path, cosine in one.neighbours]
            line = {"path": one.path, "neighbours": near, "error": one.error}
            print(json_line(line))
    elif sys.stdout.isatty():
        print_tables(found)
    else:
        print_lines(found)
    if sheet is not None:
        draw = write_html if sheet.suffix.lower() == ".html" else write_picture
        draw(sheet, found, pictures)
        print(f"{sheet}: {counted(len(found), 'row')}, the picture looked for first", file=sys.stderr)
    bad = [one for one in found if one.error is not None]
    if bad:
        raise SomeSkipped(
            f"{len(bad):,} of {counted(len(found), 'picture')} could not be read: {bad[0].path} "
            f"({bad[0].error})"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}"
        )
    return found


def check(folder: Embeddings) -> None:
    """Raise EmbeddingsError where a folder is not finished, or holds what cannot be compared."""
    if folder.manifest.pooling == "tokens":
        raise EmbeddingsError(
            f"{folder.folder} holds the tokens of each picture, and search compares one vector a picture; "
            "make them: beit embed --pooling mean, into another folder"
        )
    if not len(folder):
        raise EmbeddingsError(f"{folder.folder} holds no vectors: none of its pictures could be read")


# --- Answers -------------------------------------------------------------------------------------


def embed(pictures: list[Picture], held: Manifest, settings: Search) -> list[Embedding]:
    """The vectors of the queries, made as those of the folder were."""
    model = settings.model or held.model
    try:
        path = resolve(model)
    except ValueError as error:
        hint = "" if settings.model else f"; {settings.folder} was made by it, -m says where it is now"
        raise EmbeddingsError(f"{error}{hint}") from None
    if model_sha256(path) != held.model_sha256:
        raise EmbeddingsError(
            f"{model} is not the model that made {settings.folder}, and vectors of two models cannot be "
            "compared; give that one: -m MODEL, or embed the pictures anew"
        )
    engine = Engine(
        model,
        held.runtime,  # type: ignore[arg-type]
        held.precision,  # type: ignore[arg-type]
        settings.threads,
        device=settings.device,
        batch_size=held.batch_size,
        img_size=held.img_size,
    )
    return list(engine.embed(pictures, held.pooling, held.layer))  # type: ignore[arg-type]


def neighbours(
    folder: Embeddings,
    queries: Sequence[Embedding],
    top: int,
    nearest: Callable[[Embeddings, np.ndarray, int], tuple[np.ndarray, np.ndarray]],
) -> list[Found]:
    """The pictures of the folder nearest to each query, by cosine."""
    vectors = [query.vector for query in queries if query.vector is not None]
    if not vectors:
        return [Found(query.path, (), query.error) for query in queries]
    cosines, rows = nearest(folder, np.stack(vectors), top)
    paths = iter(folder.paths(rows.ravel().tolist()))
    values = iter(cosines.ravel().tolist())
    found = []
    for query in queries:
        near = range(0 if query.vector is None else rows.shape[1])
        found.append(Found(query.path, tuple((next(paths), next(values)) for _ in near), query.error))
    return found


# --- Words ---------------------------------------------------------------------------------------


def print_lines(found: list[Found]) -> None:
    """A line a neighbour: the picture, the cosine, the neighbour, with tabs between."""
    for one in found:
        for path, cosine in one.neighbours:
            print(printable(one.path), f"{cosine:.4f}", printable(path), sep="\t")
        if one.error:
            print(printable(one.path), "", printable(one.error), sep="\t")


def print_tables(found: list[Found]) -> None:
    """A table a picture."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for one in found:
        if one.error:
            console.print(Text(printable(f"{one.path}: {one.error}"), "red"))
            continue
        table = Table(title=Text(printable(one.path)), title_justify="left")
        table.add_column("", justify="right")
        table.add_column("cosine", justify="right", no_wrap=True)
        table.add_column("like it", overflow="fold")
        for number, (path, cosine) in enumerate(one.neighbours, 1):
            table.add_row(str(number), f"{cosine:.4f}", Text(printable(path)))
        console.print(table)


# --- Sheets --------------------------------------------------------------------------------------


def write_picture(file: Path, found: list[Found], pictures: list[Picture]) -> None:
    """A row a picture: itself, then its neighbours with their cosines."""
    from beit.visualize import strip

    rows = [
        [
            np.asarray(tile(picture)),
            *(np.asarray(tile(path, f"{cosine:.3f}")) for path, cosine in one.neighbours),
        ]
        for picture, one in zip(pictures, found, strict=True)
    ]
    with writing(file) as beside:
        kind = "PNG" if file.suffix.lower() == ".png" else "JPEG"
        strip(rows, SIDE).save(beside, kind, quality=90)


def write_html(file: Path, found: list[Found], pictures: list[Picture]) -> None:
    """A page that carries its pictures: a row each, cosine and path below a neighbour."""
    from beit.visualize import img_tag

    rows = []
    for picture, one in zip(pictures, found, strict=True):
        cells = [f"<td>{img_tag(tile(picture), one.path)}<p>{html.escape(one.error or one.path)}</td>"]
        for path, cosine in one.neighbours:
            words = f"{cosine:.4f}<br>{html.escape(path)}"
            cells.append(f"<td>{img_tag(tile(path), path)}<p>{words}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    style = "td{vertical-align:top;width:170px;font:12px sans-serif;overflow-wrap:anywhere;padding:4px}"
    page = f'<!doctype html><meta charset="utf-8"><title>beit search</title><style>{style}</style>'
    with writing(file) as beside:
        text = f"{page}<table>{''.join(rows)}</table>\n"
        beside.write_text(text, encoding="utf-8", errors="replace")


@contextmanager
def writing(file: Path) -> Iterator[Path]:
    """As `replacing`; raises CannotWrite."""
    try:
        with replacing(file) as beside:
            yield beside
    except OSError as error:
        raise CannotWrite(f"cannot write {file}: {error.strerror or error}") from error


def tile(picture: Picture, words: str = "") -> Image.Image:
    """The middle of a picture as a square of a sheet; grey where it is gone."""
    try:
        if isinstance(picture, Entry):
            array = picture.source.read(picture.index)
        elif isinstance(picture, str) and not os.path.exists(picture):
            array = in_shard(picture)
        else:
            array = read_image(picture)
        drawn = ImageOps.fit(Image.fromarray(array), (SIDE, SIDE), Image.Resampling.LANCZOS)
    except BadImage:
        drawn = Image.new("RGB", (SIDE, SIDE), GREY)
    if words:
        ImageDraw.Draw(drawn, "RGBA").rectangle((0, SIDE - 14, 40, SIDE), (0, 0, 0, 160))
        ImageDraw.Draw(drawn).text((3, SIDE - 13), words, (255, 255, 255))
    return drawn


def in_shard(name: str) -> np.ndarray:
    """A picture by its name in a tar or Parquet file, such as a.tar/dogs/1.jpg. Raises BadImage."""
    shard = next(
        (p for p in Path(name).parents if p.suffix in (".tar", ".parquet") and os.path.isfile(p)), None
    )
    if shard is None:
        raise BadImage("missing", name, "no such file")
    source, numbers = contents(shard)
    if name not in numbers:
        raise BadImage("missing", name, f"no longer in {shard}")
    return source.read(numbers[name])


@functools.lru_cache(maxsize=8)
def contents(shard: Path) -> tuple[ImageSource, dict[str, int]]:
    """The pictures of a shard, and their numbers by name."""
    source = open_source(shard)
    return source, {source.name(index): index for index in range(len(source))}
