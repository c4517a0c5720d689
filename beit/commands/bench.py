"""`beit bench`: how fast each installed runtime answers with a model on this machine, and what it takes.

Every case runs in a process of its own, so that its peak memory is its own; the rounds go through all
cases in turn, so that what else the machine does meets all of them. Only the model is timed: its input is
prepared noise. The ceiling is what a product of two matrices reaches here in the same number format, on as
many threads.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from cyclopts.types import PositiveInt
from rich.console import Console
from rich.table import Table

from beit.checkpoints import load_model, save
from beit.engine import Engine
from beit.flops import forward_flops, measured_flops, measured_int8_operations
from beit.graph_cache import machine
from beit.graphs import about_of, installed, is_graph, multiplies_bf16, open_graph
from beit.model import BeitConfig, BeitForImageClassification
from beit.progress import peak_memory_mib
from beit.ranges import Numbers


@Parameter(name="*")
@dataclass(frozen=True)
class Bench:
    model: str
    """Model folder or file, hub:owner/name, a name that `beit models` lists, or a file of `beit export`."""
    _: KW_ONLY
    batch_sizes: Numbers = (1, 4, 16)
    """Pictures that a model sees at once."""
    threads: PositiveInt | None = None
    """Of each runtime; its own choice if not given."""
    repeats: PositiveInt = 10
    """Batches timed in a round, after one that is not."""
    rounds: PositiveInt = 3
    """Times that all cases are gone through."""
    graphs: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = ()
    """Files of `beit export` to time beside it, such as one in int8."""
    json: bool = False
    """Print one JSON line instead of a table."""


def bench(settings: Bench) -> dict[str, Any]:
    """Time a model in every runtime and precision that is installed."""
    given = [Path(settings.model)] if is_graph(settings.model) else []
    for graph in (*given, *settings.graphs):
        open_graph(graph)  # a wrong file is named before anything is timed
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_of(settings, Path(folder), bool(given))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
        for _ in range(settings.rounds):
            for name, case in cases.items():
                runs[name].append(in_a_process(case))
    flops = forward_flops(config_of(settings))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    peaks = {p: ceiling(p) / 1e9 for p in ("fp32", "bf16", "int8")}
    rows = [row(name, batch, runs[name], flops) for name in runs for batch in settings.batch_sizes]
    for each in rows:
        peak, speed = peaks.get(each["precision"]), each["gflops"]
        each["share_of_ceiling"] = speed / peak if peak else None
    result = {
        "model": settings.model,
        "machine": machine(),
        "threads": settings.threads,
        "versions": {name: version(name) for name in PACKAGES if find_spec(name.replace("-", "_"))},
        "ceiling_gflops": peaks,
        "rows": rows,
    }
    if settings.json:
        print(json.dumps(result))
    else:
        show(result)
    return result


PACKAGES = ("beit", "torch", "openvino", "onnxruntime", "transformers", "timm")


def cases_of(settings: Bench, folder: Path, is_file: bool) -> dict[str, dict[str, Any]]:
    """What a process needs to know of each case, by its name."""
    common = {
        "batch_sizes": settings.batch_sizes,
        "threads": settings.threads,
        "repeats": settings.repeats,
    }
    found: dict[str, dict[str, Any]] = {}
    if not is_file:
        precisions = ("fp32", "bf16") if multiplies_bf16() else ("fp32",)
        for runtime in ("torch", "openvino", "onnx"):
            for precision in precisions if runtime != "onnx" else ("fp32",):
                if installed(runtime):
                    case = {"runtime": runtime, "precision": precision, "model": settings.model}
                    found[f"beit {runtime} {precision}"] = {**common, **case}
                    Engine(settings.model, runtime, precision)  # type: ignore[arg-type]  # made, not timed
        rivals = [name for name in ("transformers", "timm") if find_spec(name)]
        model = load_model(settings.model)
        if isinstance(model, BeitForImageClassification) and model.config.num_classes:
            for name in rivals:
                place = folder / name
                save(model, place, to=name)  # type: ignore[arg-type]
                found[f"{name} fp32"] = {
                    **common, "runtime": name, "precision": "fp32", "model": str(place),
                }  # fmt: skip
    for graph in [Path(settings.model)] * is_file + list(settings.graphs):
        about = about_of(graph)
        case = {"runtime": "file", "precision": about.precision, "model": str(graph)}
        found[graph.name if graph.name not in found else str(graph)] = {**common, **case}
    return found


def config_of(settings: Bench) -> BeitConfig:
    """The sizes, for counting operations."""
    if is_graph(settings.model):
        return BeitConfig(**about_of(Path(settings.model)).config)
    return load_model(settings.model).config


def ceiling(precision: str) -> float:
    """Operations a second of a product of matrices on this processor."""
    if precision == "int8":
        return measured_int8_operations()
    return measured_flops(torch.device("cpu"), precision)


def in_a_process(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case and return what it measured."""
    words = [sys.executable, "-m", "beit.commands.bench", json.dumps(case)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case['runtime']} {case['precision']} failed:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def row(name: str, batch: int, runs: list[dict[str, Any]], flops: float) -> dict[str, Any]:
    """The numbers of a case and a batch size, of all rounds together."""
    ms = np.concatenate([run["ms"][str(batch)] for run in runs])
    p50, p99 = float(np.percentile(ms, 50)), float(np.percentile(ms, 99))
    speed = 1000 * batch / p50
    return {
        "name": name,
        "precision": runs[0]["precision"],
        "batch": batch,
        "images_per_second": speed,
        "ms_p50": p50,
        "ms_p99": p99,
        "ms_min": float(ms.min()),
        "batches": len(ms),
        "peak_mib": max(run["peak_mib"][str(batch)] for run in runs),
        "gflops": speed * flops / 1e9,
    }


def show(result: dict[str, Any]) -> None:
    """One table."""
    peaks = ", ".join(f"{name} {each:,.0f}" for name, each in result["ceiling_gflops"].items())
    table = Table(
        title=f"{result['model']} on {result['machine']}", caption=f"ceiling, GFLOP/s: {peaks}"
    )
    table.add_column("what", no_wrap=True)
    for column in ("batch", "images/s", "ms p50", "ms p99", "peak MiB", "of ceiling"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in result["rows"]:
        share = each["share_of_ceiling"]
        table.add_row(
            each["name"],
            str(each["batch"]),
            f"{each['images_per_second']:.2f}",
            f"{each['ms_p50']:.1f}",
            f"{each['ms_p99']:.1f}",
            f"{each['peak_mib']:,.0f}",
            "" if share is None else f"{share:.0%}",
        )
    Console(highlight=False).print(table)


# --- In the process of a case --------------------------------------------------------------------


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds a batch, {batch: [...]}, the peak memory up to it, {batch: MiB}, and the precision."""
    run, size, precision = runner(case)
    ms: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for batch in sorted(case["batch_sizes"]):
        images = np.random.default_rng(0).standard_normal((batch, 3, *size), np.float32)
        run(images)
        ms[str(batch)] = []
        for _ in range(case["repeats"]):
            began = time.perf_counter()
            run(images)
            ms[str(batch)].append(1000 * (time.perf_counter() - began))
        peaks[str(batch)] = peak_memory_mib()
    return {"ms": ms, "peak_mib": peaks, "precision": precision}


def runner(case: dict[str, Any]) -> tuple[Any, tuple[int, int], str]:
    """What answers (B, 3, H, W) float32, the (H, W) it takes, and the precision it computes in."""
    if case["runtime"] in ("transformers", "timm"):
        if case["threads"]:
            torch.set_num_threads(case["threads"])
        model, size = rival(case["runtime"], case["model"])

        def run(images: np.ndarray) -> Any:
            with torch.no_grad():
                return model(torch.from_numpy(images))

        return run, size, case["precision"]
    if case["runtime"] == "file":
        engine = Engine(case["model"], threads=case["threads"])
    else:
        engine = Engine(case["model"], case["runtime"], case["precision"], case["threads"])
    return engine.usual_array, engine.image_spec.size, engine.precision


def rival(name: str, folder: str) -> tuple[Any, tuple[int, int]]:
    """Another library's model with the same weights, and its (H, W)."""
    if name == "transformers":
        import transformers

        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder, attn_implementation="sdpa"
        ).eval()
        size = model.config.image_size
        return model, (size, size) if isinstance(size, int) else tuple(size)
    import timm  # type: ignore[import-not-found]

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model, tuple(model.patch_embed.img_size)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
