"""How long a base-384 takes from a file to a model, and how much memory of its own it takes for it.

    python benchmarks/load.py --repeats 9

Random weights are saved once, as a transformers folder and as unilm's file. Then each reader loads in a
process of its own, in turn, so that what else the machine does meets all of them. The clock runs from
torch imported (transformers too, for its rows) to a model in evaluation mode; memory is the process's
private pages (/proc/self/smaps_rollup), once when the model is there and once when every weight has
been read. Files are in the page cache, as for the second process that loads a model. Linux only.
Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors
import torch

READERS = {
    "beit.load, transformers folder": ("beit", "folder"),
    "beit.load, unilm's .pth": ("beit", "file.pth"),
    "transformers from_pretrained": ("transformers", "folder"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--read", nargs=2, metavar=("LIBRARY", "SOURCE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read_once(*arguments.read)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
        for _ in range(arguments.repeats):
            for name, (library, source) in READERS.items():
                command = [sys.executable, __file__, "--read", library, str(Path(folder) / source)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                measured[name].append(json.loads(done.stdout))
        size = (Path(folder) / "folder" / "model.safetensors").stat().st_size
    import transformers

    print(
        f"torch {torch.__version__}, safetensors {safetensors.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, {arguments.repeats} repeats, in turn\n"
    )
    print(f"The weights are {size:,} bytes. Median (smallest to largest):\n")
    print("| reader | seconds | private memory, x the file | when all weights have been read |")
    print("|---|---|---|---|")
    for name, runs in measured.items():
        columns = [spread([run["seconds"] for run in runs])]
        columns += [spread([run[key] / size for run in runs]) for key in ("loaded", "touched")]
        print(f"| {name} | {' | '.join(columns)} |")


def write_model(folder: Path) -> None:
    """A base model for 384 pixels with 1000 classes, random."""
    import beit

    model = beit.BeitForImageClassification(beit.VARIANTS["beit_base_patch16_384"])
    model.id2label = {i: f"class {i}" for i in range(1000)}
    beit.save(model, folder / "folder")
    beit.save(model, folder / "file.pth", to="unilm")


def read_once(library: str, source: str) -> dict[str, float]:
    """Load in this process: seconds, and private bytes more than before."""
    if library == "transformers":
        from transformers import BeitForImageClassification

        before, begun = private_bytes(), time.perf_counter()
        model = BeitForImageClassification.from_pretrained(source).eval()
    else:
        before, begun = private_bytes(), time.perf_counter()
        import beit

        model = beit.load(source)
    seconds = time.perf_counter() - begun
    loaded = private_bytes() - before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    return {"seconds": seconds, "loaded": loaded, "touched": private_bytes() - before}


def private_bytes() -> int:
    """Pages that no other process shares: what another one like this would cost again."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kib = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return 1024 * (kib["Private_Dirty:"] + kib["Private_Clean:"])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
