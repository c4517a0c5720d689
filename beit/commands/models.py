"""`beit models`: the released models and the sizes without weights, and what to type for each."""

from __future__ import annotations

import json
import textwrap
from dataclasses import KW_ONLY, asdict, dataclass

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from beit.hub import RELEASED, SIZES, Released


@Parameter(name="*")
@dataclass(frozen=True)
class Models:
    filter: str = ""
    """Only those whose name, hub id or task holds this, such as beitv2 or segmentation; sizes by name."""
    _: KW_ONLY
    json: bool = False
    """Print one JSON object a released model, with the whole sha256 and the authors' file's address."""


def models(settings: Models = Models()) -> list[Released]:
    """List the released models, and the sizes to train from nothing."""
    wanted = settings.filter.lower()
    rows = [
        row
        for row in RELEASED.values()
        if any(wanted in text.lower() for text in (row.name, row.task, row.hub or "", *row.also))
    ]
    sizes = [name for name in SIZES if wanted in name and not settings.json]
    if not rows and not sizes:
        raise ValueError(
            f"no released model has {settings.filter!r} in its name, hub id or task; "
            "`beit models` lists all"
        )
    if settings.json:
        for row in rows:
            print(json.dumps({**asdict(row), "url": row.url}))
        return rows
    if rows:
        show(rows)
    if sizes:
        names = textwrap.fill(", ".join(sizes), 96, break_on_hyphens=False)
        print(
            "\nSizes, without weights, that finetune -m and pretrain -m begin from nothing:\n"
            f"{textwrap.indent(names, '  ')}\n`beit info NAME` describes one."
        )
    return rows


def show(rows: list[Released]) -> None:
    """Print the table, and what to do with it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100  # whole names for grep and less
    console.print(table_of(rows))
    print(
        "\nScore: the authors' ImageNet-1k top-1 or, for segmentation, ADE20k mIoU, in percent.\n"
        "Licence: of the authors' file; timm marks its copies apache-2.0. A dash: not published, or none.\n"
        f"\nUse one by its name:  beit classify photos/ -m {example_of(rows)}\n"
        "It is downloaded once, from the hub folder below its name. -m hub:owner/name[@revision] takes\n"
        "any other. By hand: download the file (`beit models NAME --json` has its address), give its path."
    )


def example_of(rows: list[Released]) -> str:
    """A name to show: a classifier with a score that can be downloaded, of these or of all."""
    return next(row.name for row in (*rows, *RELEASED.values()) if row.top1 and row.hub)


def table_of(rows: list[Released]) -> Table:
    """Two lines a model: its numbers, its hub folder; 98 columns at most."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("name / hub folder", overflow="fold")
    table.add_column("task")
    for column in ("classes", "size", "score", "params"):
        table.add_column(column, justify="right")
    table.add_column("licence")
    for row in rows:
        name = [row.name, f"  {row.hub or 'by hand'}"]
        if row.num_bytes and row.sha256:
            name.append(f"  {row.num_bytes:,} bytes, sha256 {row.sha256[:12]}…")
        score = row.top1 or row.miou
        table.add_row(
            "\n".join(name),
            row.task,
            f"{row.num_classes:,}" if row.num_classes else "–",
            str(row.img_size),
            f"{score:.1f}" if score else "–",
            f"{row.num_parameters / 1e6:.0f}M" if row.num_parameters else "–",
            row.licence or "–",
        )
    return table
