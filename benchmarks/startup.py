"""How long a newcomer waits for `beit --help`: a process from start to end, several times.

    python benchmarks/startup.py

Prints Markdown: median and range of each command, and whether torch was imported for it.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "beit --help": ["-m", "beit", "--help"],
    "beit classify --help": ["-m", "beit", "classify", "--help"],
    "python -c 'import beit'": ["-c", "import beit"],
    "python -c 'import torch'": ["-c", "import torch"],
}
REPEATS = 9


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):  # in turns, so that a busy moment hits all alike
        for name, words in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
            times[name].append(time.perf_counter() - started)
    print(f"Python {platform.python_version()}, {REPEATS} processes each, in turns\n")
    print("| | median, s | range, s | torch imported |\n|---|---|---|---|")
    for name, values in times.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"| `{name}` | {statistics.median(values):.3f} | {spread} | {imports_torch(name)} |")


def imports_torch(name: str) -> str:
    """Python's own list of what a command imported."""
    command = [sys.executable, "-X", "importtime", *COMMANDS[name]]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return (
        "yes" if any(line.split("|")[-1].strip() == "torch" for line in listing.splitlines()) else "no"
    )


if __name__ == "__main__":
    main()
