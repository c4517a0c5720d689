"""The table of runs/imagenette_cpu.sh: what each arm's fine-tuned and probed accuracy came to.

    python benchmarks/ladder.py runs/imagenette_cpu

Prints Markdown; mean (least to most) where there are several seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARMS = (
    "scratch", "dvae-blocks", "dvae-random", "vqkd-blocks", "vqkd-random", "pixels-blocks", "pixels-random",
)  # fmt: skip


def tuned(seed: Path, arm: str) -> float | None:
    """Share of validation pictures that the fine-tuned network names right."""
    file = seed / f"{arm}.tuned" / "config.json"
    return json.loads(file.read_text())["beit"]["provenance"]["val_accuracy"] if file.exists() else None


def probed(seed: Path, arm: str, kind: str, last: bool = False) -> float | None:
    """The same by a probe of the last layer, or of the one that held-out training pictures chose."""
    file = seed / f"{arm}.probe.json"
    if not file.exists():
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    rows = {row["layer"]: row for row in result["rows"]}
    chosen = max(rows.values(), key=lambda row: row[kind]["held_out"])
    return (rows[max(rows)] if last else chosen)[kind]["accuracy"]


def cell(seeds: list[Path], number: Callable[[Path], float | None]) -> str:
    """Mean (least to most) over the seeds that have ended."""
    found = [100 * value for value in map(number, seeds) if value is not None]
    if not found:
        return "-"
    mean = f"{statistics.mean(found):.1f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.1f} to {max(found):.1f})"


def main() -> None:
    """Read the folders, print the table."""
    seeds = sorted(Path(sys.argv[1]).glob("seed-*"))
    print(f"{len(seeds)} seed(s)\n")
    print("| pre-training | fine-tuned | linear, best layer | linear, last | 20 nearest, best layer |")
    print("|---|---|---|---|---|")
    for arm in ARMS:
        cells = [
            cell(seeds, lambda seed, arm=arm: tuned(seed, arm)),  # type: ignore[misc]
            cell(seeds, lambda seed, arm=arm: probed(seed, arm, "linear")),  # type: ignore[misc]
            cell(seeds, lambda seed, arm=arm: probed(seed, arm, "linear", True)),  # type: ignore[misc]
            cell(seeds, lambda seed, arm=arm: probed(seed, arm, "knn")),  # type: ignore[misc]
        ]
        if any(number != "-" for number in cells):
            print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
