"""`beit classify`: name what is on pictures.

With --out, answers are kept beside it as they come, in `.OUT.so-far`, until all are there: a run that was
stopped, however, goes on from them, and its file is that of an unbroken run.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TextIO

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from beit.atomic import CannotWrite, check_place, replacing
from beit.data import ImageSource, SomeSkipped, TooManyBadImages, find_pictures
from beit.embeddings import model_sha256
from beit.engine import Engine, Entry, Picture, Precision, Prediction, Runtime, each_picture
from beit.folder_lock import hold
from beit.hub import resolve
from beit.listing import expand, is_address
from beit.names import json_line, printable
from beit.plural import counted
from beit.progress import Progress
from beit.ranges import Share

ENDINGS = (".csv", ".jsonl", ".parquet")
COLUMNS = ["path", "label", "score", "error"]  # the first ones of a .csv or a Parquet file
KEYS = ["path", "label", "score", "top", "error"]  # of a line of JSON
ROWS = 4096  # of a Parquet file, written at once
ENCODING: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # of names, whatever bytes they are


@Parameter(name="*")
@dataclass(frozen=True)
class Classify:
    images: Annotated[list[str], Parameter(consume_multiple=True, allow_leading_hyphen=True)]
    """Pictures, folders, patterns such as 'a/*.jpg', tar or Parquet shards, a .txt or .csv that lists
    pictures, or - for such a list on stdin."""
    _: KW_ONLY
    model: Annotated[str, Parameter(alias="-m")]
    """Model folder or file, hub:owner/name, a name that `beit models` lists, or a file of `beit export`."""
    top: PositiveInt = 5
    """Classes to name for each picture. A .csv has the second in label_2 and score_2, and so on."""
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    """Write to this .csv, .jsonl or .parquet instead, in place of an earlier one of classify. Stopped, the
    same command goes on."""
    overwrite: bool = False
    """Let --out replace a file that classify did not write."""
    json: bool = False
    """Print one JSON object a picture."""
    max_bad_images: Share = 1.0
    """Share of the pictures that may be unreadable; more, or all of them, end with exit code 4."""
    img_size: PositiveInt | None = None
    """Pixels a side that the model sees, if not its own: its tables of positions are resized."""
    batch_size: PositiveInt = 16
    runtime: Runtime = "auto"
    """What computes; auto is the fastest here that agrees with torch, measured once a model."""
    precision: Precision = "auto"
    """auto is bf16 where the processor has it; int8 is for files of `beit export`."""
    threads: PositiveInt | None = None
    """Of the model; the runtime's choice if not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto takes a GPU where there is one."""
    verbose: bool = False
    """Say which runtime computes, and why."""


def classify(settings: Classify) -> None:
    """Classify pictures."""
    out = settings.out
    if out is not None and out.suffix not in ENDINGS:
        raise ValueError(f"--out {out} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    check_place(out)
    if out is not None and out.suffix == ".parquet":
        _need_pyarrow(out)
    places = find_pictures(settings.images, "classify")
    if out is not None:
        check_place(out, files_read(settings.images, places))
        if not settings.overwrite and not is_ours(out):
            raise CannotWrite(
                f"{out} is there already, and classify did not write it; --overwrite replaces it, or "
                "choose another place"
            )
    pictures = each_picture(places)
    first = next(pictures, None)
    if first is None:
        raise ValueError("the list on stdin names no pictures; give it a path a line")
    pictures = chain([first], pictures)
    engine = Engine(
        settings.model,
        settings.runtime,
        settings.precision,
        settings.threads,
        device=settings.device,
        batch_size=settings.batch_size,
        img_size=settings.img_size,
    )
    if settings.verbose:
        print(f"{engine.runtime} {engine.precision}: {engine.why}", file=sys.stderr)
    if out is not None:
        so_far(out).touch()
        lock = hold(so_far(out))
        width = min(settings.top, len(engine.labels))
        try:
            with progress_of(places) as progress, WRITERS[out.suffix](out, width) as write:
                answers = kept_answers(out, engine, pictures, settings)
                done, failed = write_all(answers, write, progress.update)
        except KeyboardInterrupt:
            kept = f"the answers so far are in {so_far(out)}"
            raise KeyboardInterrupt(f"{kept}, give the same command to go on") from None
        so_far(out).unlink()
        del lock
        print(f"{counted(done, 'picture')} classified into {out}", file=sys.stderr)
    elif settings.json:
        answers = engine.classify(pictures, settings.top)
        done, failed = write_all(answers, lambda answer: print_json(answer, sys.stdout))
    elif sys.stdout.isatty():
        done, failed = write_table(engine.classify(pictures, settings.top))
    else:
        answers = engine.classify(pictures, settings.top)
        done, failed = write_all(answers, lambda answer: print_words(answer, sys.stdout))
    told = f"{failed:,} of {counted(done, 'picture')} could not be read"
    allowed = int(settings.max_bad_images * done)
    if failed > allowed:
        raise TooManyBadImages(f"{told}, where {allowed:,} may; mend them, or raise --max-bad-images")
    if failed and failed == done:
        raise TooManyBadImages(f"{told}, which is all; what is wrong with each stands beside its name")
    if failed:
        raise SomeSkipped(told)


# --- Pictures ------------------------------------------------------------------------------------


def files_read(named: list[str], places: list[ImageSource | str]) -> Iterator[str]:
    """Files that the pictures' names or bytes come from: lists, shards, stdin's, and pictures by name."""
    for name in named:
        yield "/dev/stdin" if name == "-" else name
        if not is_address(name):
            with suppress(ValueError):  # a missing picture is an answer
                yield from expand(name)
    for place in places:
        yield from place.paths.roots if isinstance(place, ImageSource) else ()


def name_of(picture: Picture | None) -> str | None:
    """The name that its answer bears."""
    if isinstance(picture, Entry):
        return picture.source.name(picture.index)
    assert picture is None or isinstance(picture, str)
    return picture


# --- Answers so far ------------------------------------------------------------------------------


def so_far(out: Path) -> Path:
    """Where the answers of a run stand until it is done: a line that says of what, then as --json."""
    return out.with_name(f".{out.name}.so-far")


def kept_answers(
    out: Path, engine: Engine, pictures: Iterator[Picture], settings: Classify
) -> Iterator[Prediction]:
    """The answers of a run that was stopped, then those of the other pictures, which are kept too."""
    about = {
        "model_sha256": model_sha256(resolve(settings.model)), "img_size": settings.img_size,
        "top": settings.top, "batch_size": settings.batch_size,
        "runtime": engine.runtime, "precision": engine.precision,
    }  # fmt: skip
    kept = rows_kept(out, about)
    if kept:
        print(
            f"going on after {counted(kept, 'answer')} in {so_far(out)}; what could not be read then is "
            "not asked again",
            file=sys.stderr,
        )
    with so_far(out).open("r+", **ENCODING) as stream:
        stream.readline()
        for _ in range(kept):
            row = json.loads(stream.readline())
            if row["path"] != name_of(next(pictures, None)):
                raise ValueError(
                    f"{so_far(out)} holds answers for other pictures, {row['path']} among them; give those "
                    "it was begun with to go on, or remove it to begin again"
                )
            yield Prediction(**{**row, "top": tuple(map(tuple, row["top"]))})
        stream.seek(0, os.SEEK_END)
        for answer in engine.classify(pictures, settings.top):
            print_json(answer, stream)
            yield answer


def rows_kept(out: Path, about: dict[str, Any]) -> int:
    """How many answers there are to go on from, in whole batches; what follows them is cut off.

    Raises ValueError where they are of another model or of other settings.
    """
    with so_far(out).open("a+b") as stream:
        stream.seek(0)
        first, begins = stream.readline(), json.dumps(about).encode() + b"\n"
        if first != begins and stream.readline().endswith(b"\n"):
            before = json.loads(first) if first.startswith(b"{") else {}
            changed = [
                f"{key} was {before.get(key)}, now {value}"
                for key, value in about.items()
                if before.get(key) != value
            ]
            raise ValueError(
                f"{so_far(out)} was begun with something else ({', '.join(changed)}); give that to go on, "
                "or remove it to begin again"
            )
        if first != begins:  # none yet, or nothing behind it
            stream.truncate(0)
            stream.write(begins)
            return 0
        stream.seek(len(first))
        kept, end = 0, stream.tell()
        for number, line in enumerate(iter(stream.readline, b""), 1):
            whole = line.startswith(b'{"path":') and line.endswith(b"}\n")
            if not whole:  # cut, or lost with the power
                break
            if number % about["batch_size"] == 0:  # batches that begin elsewhere round elsewhere
                kept, end = number, stream.tell()
        stream.truncate(end)
        return kept


# --- Answers -------------------------------------------------------------------------------------

Write = Callable[[Prediction], Any]


def progress_of(places: list[ImageSource | str]) -> Progress:
    """How far it is: a bar on a terminal, elsewhere a line each half minute; nothing of a list on stdin."""
    total = sum(len(place) if isinstance(place, ImageSource) else 1 for place in places)
    return Progress("pictures", total, quiet="-" in places)


def write_all(
    answers: Iterator[Prediction], write: Write, tell: Callable[[int], Any] | None = None
) -> tuple[int, int]:
    """Write each answer as it comes; how many there were, and how many of them errors."""
    done = failed = 0
    for answer in answers:
        write(answer)
        done, failed = done + 1, failed + (answer.error is not None)
        if tell is not None:
            tell(done)
    return done, failed


def print_words(answer: Prediction, stream: TextIO) -> None:
    """A line for people."""
    ranked = "  ".join(f"{name} {score:.1%}" for name, score in answer.top)
    print(printable(f"{answer.path}  {answer.error or ranked}"), file=stream, flush=True)


def print_json(answer: Prediction, stream: TextIO) -> None:
    """One JSON object; without the time, so that the same pictures give the same lines."""
    content = answer.to_dict()
    del content["ms"]
    print(json_line(content), file=stream, flush=True)


def write_table(answers: Iterator[Prediction]) -> tuple[int, int]:
    """A table on a terminal, a screen of rows at a time, so that any number of pictures fits."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    done = failed = 0
    table: Table | None = None
    for answer in answers:
        if table is None:
            table = Table()
            table.add_column("picture", overflow="fold")
            table.add_column("is", overflow="fold")
            table.add_column("score", justify="right", no_wrap=True)
            table.add_column("or", overflow="fold")
        failed += answer.error is not None
        others = ", ".join(f"{name} {score:.1%}" for name, score in answer.top[1:])
        score = "" if answer.score is None else f"{answer.score:.1%}"
        what = Text(printable(answer.error or str(answer.label)), "red" if answer.error else "")
        table.add_row(Text(printable(answer.path)), what, score, Text(printable(others)))
        done += 1
        if table.row_count >= 40:
            console.print(table)
            table = None
    if table is not None:
        console.print(table)
    return done, failed


@contextmanager
def csv_writer(file: Path, width: int) -> Iterator[Write]:
    """path, label, score, error, then label_2, score_2 ... to `width`; in the order of the pictures."""
    with replacing(file) as beside, beside.open("w", newline="", **ENCODING) as stream:
        writer = csv.writer(stream)
        others = [f"{word}_{place}" for place in range(2, width + 1) for word in ("label", "score")]
        writer.writerow([*COLUMNS, *others])

        def write(answer: Prediction) -> None:
            rest = [value for pair in answer.top[1:] for value in pair] or [""] * len(others)
            writer.writerow([answer.path, answer.label, answer.score, answer.error, *rest])

        yield write


@contextmanager
def jsonl_writer(file: Path, width: int) -> Iterator[Write]:
    """What --json prints."""
    with replacing(file) as beside, beside.open("w", **ENCODING) as stream:
        yield lambda answer: print_json(answer, stream)


@contextmanager
def parquet_writer(file: Path, width: int) -> Iterator[Write]:
    """path, label, score, error, and the lists top_labels and top_scores."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [
            ("path", pa.string()),
            ("label", pa.string()),
            ("score", pa.float32()),
            ("error", pa.string()),
            ("top_labels", pa.list_(pa.string())),
            ("top_scores", pa.list_(pa.float32())),
        ]
    )
    rows: list[dict[str, Any]] = []
    with replacing(file) as beside, parquet.ParquetWriter(beside, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

        def write(answer: Prediction) -> None:
            names, scores = [name for name, _ in answer.top], [score for _, score in answer.top]
            path = answer.path.encode(errors="replace").decode()  # Parquet's texts are UTF-8
            row = {"path": path, "label": answer.label, "score": answer.score}
            rows.append({**row, "error": answer.error, "top_labels": names, "top_scores": scores})
            if len(rows) >= ROWS:
                flush()

        yield write
        flush()


def is_ours(file: Path) -> bool:
    """Whether a file begins as the writer of its ending begins one, or has nothing to lose."""
    if not file.exists() or file.stat().st_size == 0:
        return True
    if file.suffix == ".parquet":
        from pyarrow import ArrowInvalid, parquet

        try:
            return parquet.read_schema(file).names[: len(COLUMNS)] == COLUMNS
        except (ArrowInvalid, OSError):  # which of them, the bytes decide
            return False
    with file.open(newline="", **ENCODING) as stream:
        first = stream.readline()
    if file.suffix == ".csv":
        return first.rstrip().split(",")[: len(COLUMNS)] == COLUMNS
    try:
        return list(json.loads(first)) == KEYS
    except (ValueError, TypeError):
        return False


WRITERS = {".csv": csv_writer, ".jsonl": jsonl_writer, ".parquet": parquet_writer}


def _need_pyarrow(file: Path) -> None:
    from importlib.util import find_spec

    if find_spec("pyarrow") is None:
        raise ValueError(f'{file} needs pyarrow: pip install "beit[parquet]"')
