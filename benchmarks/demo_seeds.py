"""The demo over several seeds: what pre-training on unlabelled digits is worth.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --out runs/demo_seeds

About six minutes a seed on two cores; resumable. A seed changes the tokenizer, the pre-training, the
fine-tuning and which digits keep their labels; the split into train, val and test is always the same.
Prints the table in Markdown, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import sklearn
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_seeds"))
    arguments = parser.parse_args()
    results = [run_demo(seed, arguments.out / f"seed{seed}") for seed in arguments.seeds]

    print(
        f"torch {torch.__version__}, numpy {numpy.__version__}, scikit-learn {sklearn.__version__}, ",
        end="",
    )
    print(
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads, seeds {arguments.seeds}\n"
    )
    print("| labels | pre-trained | from scratch | raw pixels | gain over scratch |")
    print("|---|---|---|---|---|")
    for number, row in enumerate(results[0]["test_accuracy"]):
        rows = [result["test_accuracy"][number] for result in results]
        columns = [spread([r[name] for r in rows]) for name in ("pretrained", "scratch", "raw_pixels")]
        gain = spread([r["pretrained"] - r["scratch"] for r in rows], sign="+")
        print(f"| {row['labels']} | {' | '.join(columns)} | {gain} |")
    print("\n| | |\n|---|---|")
    for key in ("live_codes", "probe", "probe_untrained", "token_accuracy"):
        print(f"| {key} | {spread([result[key] for result in results])} |")
    print(f"| probe gain | {spread([r['probe'] - r['probe_untrained'] for r in results], sign='+')} |")
    print(f"| psnr_db | {', '.join(format(r['psnr_db'], '.1f') for r in results)} |")
    print(f"| seconds | {', '.join(str(r['seconds']) for r in results)} |\n")
    print(json.dumps(results))


def run_demo(seed: int, out: Path) -> dict[str, Any]:
    """One demo, or its stored result."""
    file = out / "result.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "beit",
            "demo",
            "--out",
            str(out / "demo"),
            "--seed",
            str(seed),
        ]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        file.write_text(finished.stdout.splitlines()[-1])
    return dict(json.loads(file.read_text()))


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation in per cent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):{sign}.1f} ± {100 * deviation:.1f}"


if __name__ == "__main__":
    main()
