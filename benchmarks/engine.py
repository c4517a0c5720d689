"""How fast the engine answers beside transformers, with which memory, and how equal.

    python benchmarks/engine.py speed --models beit_base_patch16_384 beit_large_patch16_224
    python benchmarks/engine.py memory --pictures 1000
    python benchmarks/engine.py ahead --pictures 200
    python benchmarks/engine.py sizes --model beit_base_patch16_384
    python benchmarks/engine.py parity --model RUN --data PICTURES --int8 FILE

speed: random weights, prepared noise, batch 1 and 4; each case in a process of its own, all cases in turn,
so that what else the machine does meets all of them; ratios are to transformers (sdpa, fp32) of the same
run. memory: the same photographs-sized JPEGs are classified from files; peak (VmHWM) when 100 and when all
are done. ahead: pictures a second from files beside those of the model alone, in turns. sizes: a graph of
any size beside one of the model's own, at that size, batch 1, in turns. parity: against torch in fp32 on
photographs, with a trained model. For speed and memory int8 graphs are calibrated on noise, all layers in
int8; what they answer is judged by parity. Linux only. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import beit.export
from beit.checkpoints import load_model, save
from beit.commands.bench import PACKAGES, ceiling, in_a_process, rival
from beit.data import open_source
from beit.engine import Engine, Runtime
from beit.export import export
from beit.flops import forward_flops
from beit.graph_cache import machine
from beit.graphs import SUFFIX_OF, multiplies_bf16, open_graph
from beit.image import preprocess, read_image
from beit.model import VARIANTS, BeitForImageClassification
from beit.progress import peak_memory_mib

RATIO_TO = "transformers fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    speed_ = kinds.add_parser("speed")
    speed_.add_argument("--models", nargs="+", default=["beit_base_patch16_384"])
    speed_.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    speed_.add_argument("--repeats", type=int, default=5)
    speed_.add_argument("--rounds", type=int, default=3)
    memory_ = kinds.add_parser("memory")
    memory_.add_argument("--model", default="beit_base_patch16_384")
    memory_.add_argument("--pictures", type=int, default=1000)
    memory_.add_argument("--cases", nargs="+", help="such as 'openvino int8'; all where not given")
    memory_.add_argument(
        "--theirs", type=int, help="pictures that transformers gets; as many, if not given"
    )
    memory_.add_argument("--one", help=argparse.SUPPRESS)
    ahead_ = kinds.add_parser("ahead")
    ahead_.add_argument("--model", default="beit_base_patch16_224")
    ahead_.add_argument("--pictures", type=int, default=200)
    ahead_.add_argument("--batch-size", type=int, default=4)
    ahead_.add_argument("--rounds", type=int, default=3)
    sizes_ = kinds.add_parser("sizes")
    sizes_.add_argument("--model", default="beit_base_patch16_384")
    sizes_.add_argument("--max-size", type=int, default=640)
    sizes_.add_argument("--rounds", type=int, default=8)
    parity_ = kinds.add_parser("parity")
    parity_.add_argument("--model", required=True)
    parity_.add_argument("--data", required=True)
    parity_.add_argument("--int8", nargs="*", default=[])
    parity_.add_argument("--pictures", type=int, default=200)
    given = parser.parse_args()
    if given.what == "memory" and given.one:
        print(json.dumps(classify_all(json.loads(given.one))))
        return
    {"speed": speed, "memory": memory, "ahead": ahead, "sizes": sizes, "parity": parity}[given.what](
        given
    )
    print(f"\n{machine()}, {torch.get_num_threads()} threads; {', '.join(versions())}")


def versions() -> Iterator[str]:
    from importlib.metadata import PackageNotFoundError, version

    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


# --- Models --------------------------------------------------------------------------------------


def make_model(name: str, folder: Path) -> Path:
    """A model with random weights, biases and classes that differ, saved as transformers has it."""
    torch.manual_seed(0)
    model = BeitForImageClassification(VARIANTS[name]).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "table" in key:
                parameter.normal_(0, 0.5)
            if key == "head.weight":
                parameter.normal_(0, 0.05)
    place = folder / name
    save(model, place)
    size = model.config.image_height_width
    noise = np.random.default_rng(0).standard_normal((8, 3, *size), np.float32)
    int8 = folder / f"{name}-int8.xml"
    beit.export.TRIES = (0,)  # on noise layers would be left out that are not on photographs
    export(model, int8, "openvino", precision="int8", pictures=list(noise), anyway=True)
    return place


def cases(place: Path) -> dict[str, dict[str, Any]]:
    precisions = ("fp32", "bf16") if multiplies_bf16() else ("fp32",)
    found = {RATIO_TO: {"runtime": "transformers", "precision": "fp32", "model": str(place)}}
    for runtime in ("torch", "openvino"):
        for precision in precisions:
            case = {"runtime": runtime, "precision": precision, "model": str(place)}
            found[f"{runtime} {precision}"] = case
            Engine(place, runtime, precision)  # type: ignore[arg-type]  # its graph is made now
    int8 = place.parent / f"{place.name}-int8.xml"
    found["openvino int8"] = {"runtime": "file", "precision": "int8", "model": str(int8)}
    return found


# --- Speed ---------------------------------------------------------------------------------------


def speed(given: argparse.Namespace) -> None:
    peaks = {"fp32": ceiling("fp32"), "bf16": ceiling("bf16"), "int8": ceiling("int8")}
    told = ", ".join(f"{peak / 1e9:.0f} {name}" for name, peak in peaks.items())
    print(f"matrix products reach, in G operations a second: {told}\n")
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            place = make_model(name, Path(folder))
            rest = {"batch_sizes": given.batch_sizes, "threads": None, "repeats": given.repeats}
            ms: dict[tuple[str, str], list[float]] = {}
            for _ in range(given.rounds):
                for case, settings in cases(place).items():
                    for batch, times in in_a_process({**settings, **rest})["ms"].items():
                        ms.setdefault((case, batch), []).extend(times)
        flops = forward_flops(VARIANTS[name])
        print(f"| {name} | batch | ms a picture, median (min to max) | x {RATIO_TO} | of ceiling |")
        print("|---|---|---|---|---|")
        for (case, batch), times in ms.items():
            each = np.array(times) / int(batch)
            ratio = np.median(ms[RATIO_TO, batch]) / np.median(times)
            peak = peaks.get(case.split()[-1])
            share = f"{1000 * flops / np.median(each) / peak:.0%}" if peak else ""
            spread = f"{np.median(each):.0f} ({each.min():.0f} to {each.max():.0f})"
            print(f"| {case} | {batch} | {spread} | {ratio:.2f} | {share} |")
        print()


# --- Memory --------------------------------------------------------------------------------------


def memory(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = make_model(given.model, Path(folder))
        photos = write_pictures(Path(folder) / "photos")
        print("| | peak MiB at 100 | at the end | x transformers | growth |")
        print("|---|---|---|---|---|")
        first = None
        for name, case in cases(place).items():
            if given.cases and name not in (*given.cases, RATIO_TO):
                continue
            count = given.pictures if name != RATIO_TO else given.theirs or given.pictures
            case = {**case, "photos": str(photos), "count": count}
            words = [sys.executable, __file__, "memory", "--one", json.dumps(case)]
            if case["runtime"] != "transformers":
                words = [sys.executable, "-c", OURS, json.dumps(case)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            peak = json.loads(done.stdout.splitlines()[-1])
            first = first or peak["end"]
            growth = peak["end"] / peak["at_100"] - 1
            row = (
                f"{peak['at_100']:.0f}",
                f"{peak['end']:.0f}",
                f"{peak['end'] / first:.2f}",
                f"{growth:+.1%}",
            )
            print(f"| {name} | {' | '.join(row)} |", flush=True)


def write_pictures(folder: Path, count: int = 20) -> Path:
    """JPEGs of 500 x 375, the usual size of a photograph of ImageNet."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((500, 375)).save(folder / f"{number:02d}.jpg")
    return folder


# As a user's process does it: torch is there only if the engine needs it.
OURS = """
import json, sys
from pathlib import Path
from beit.engine import Engine
case = json.loads(sys.argv[1])
files = sorted(Path(case["photos"]).iterdir())
asked = () if case["runtime"] == "file" else (case["runtime"], case["precision"])
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
peaks = {}
stream = (files[i % len(files)] for i in range(case["count"]))
for number, _ in enumerate(Engine(case["model"], *asked, batch_size=1).classify(stream), 1):
    if number == min(100, case["count"]):
        peaks["at_100"] = peak()
print(json.dumps({**peaks, "end": peak()}))
"""


def classify_all(case: dict[str, Any]) -> dict[str, float]:
    """Classify pictures one by one with transformers in this process; the peaks of its memory."""
    from beit.image import transformers_spec

    files = sorted(Path(case["photos"]).iterdir())
    model, size = rival("transformers", case["model"])
    peaks = {}
    for number in range(1, case["count"] + 1):
        image = read_image(files[number % len(files)])
        batch = torch.from_numpy(preprocess(image, transformers_spec(size[0])))[None]
        with torch.inference_mode():
            model(batch).logits.softmax(dim=1).topk(5)
        if number == min(100, case["count"]):
            peaks["at_100"] = peak_memory_mib()
    return {**peaks, "end": peak_memory_mib()}


# --- Decoding ahead --------------------------------------------------------------------------------------


def ahead(given: argparse.Namespace) -> None:
    """How much of the model's own pace is left when pictures are read and prepared beside it."""
    with tempfile.TemporaryDirectory() as folder:
        place = make_model(given.model, Path(folder))
        photos = sorted(write_pictures(Path(folder) / "photos").iterdir())
        files = [photos[number % len(photos)] for number in range(given.pictures)]
        print("| | model alone, pictures a second | from files | share |")
        print("|---|---|---|---|")
        for name, case in list(cases(place).items())[1:]:
            asked = () if case["runtime"] == "file" else (case["runtime"], case["precision"])
            engine = Engine(case["model"], *asked, batch_size=given.batch_size)
            batch = np.stack(
                [preprocess(read_image(f), engine.image_spec) for f in files[: given.batch_size]]
            )
            paces: dict[str, list[float]] = {"alone": [], "files": []}
            engine.logits_array(batch)
            for _ in range(given.rounds):
                began = time.perf_counter()
                for _ in range(len(files) // given.batch_size):
                    engine.logits_array(batch)
                between = time.perf_counter()
                answered = sum(1 for _ in engine.classify(files))
                paces["alone"].append(
                    len(files) // given.batch_size * given.batch_size / (between - began)
                )
                paces["files"].append(answered / (time.perf_counter() - between))
            alone, whole = (np.median(paces[kind]) for kind in ("alone", "files"))
            print(f"| {name} | {alone:.1f} | {whole:.1f} | {whole / alone:.1%} |", flush=True)


# --- Any size ------------------------------------------------------------------------------------


def sizes(given: argparse.Namespace) -> None:
    """What it costs at the usual size that a graph takes others too."""
    print(f"| {given.model} | one size, ms | any to {given.max_size}, ms | times |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(make_model(given.model, Path(folder)))
        image = np.zeros((1, 3, *model.config.image_height_width), np.float32)
        for to, precisions in (
            ("openvino", ("fp32", "bf16")),
            ("onnx", ("fp32",)),
            ("torch", ("fp32",)),
        ):
            files = [Path(folder) / f"{name}{SUFFIX_OF[to]}" for name in ("one", "any")]
            export(model, files[0], to)  # type: ignore[arg-type]
            export(model, files[1], to, max_size=given.max_size)  # type: ignore[arg-type]
            for precision in precisions:
                took: dict[Path, list[float]] = {file: [] for file in files}
                graphs = {file: open_graph(file, precision) for file in files}
                for graph in graphs.values():
                    graph(image)
                for _ in range(given.rounds):
                    for file, graph in graphs.items():
                        began = time.perf_counter()
                        graph(image)
                        took[file].append(1000 * (time.perf_counter() - began))
                one, free = (float(np.median(each)) for each in took.values())
                print(f"| {to} {precision} | {one:.0f} | {free:.0f} | {free / one:.2f} |", flush=True)


# --- Parity --------------------------------------------------------------------------------------


def parity(given: argparse.Namespace) -> None:
    source = open_source(given.data, "val")
    chosen = np.linspace(0, len(source) - 1, min(given.pictures, len(source))).round().astype(int)
    pictures = [source.read(int(i)) for i in chosen]
    exact = Engine(given.model, "torch", "fp32")
    expected, vectors = outputs(exact, pictures)
    labelled = len(source.labels) > 0
    every = (
        open_source(given.data, "val", labelled=True).with_classes(exact.labels) if labelled else None
    )
    print("| | same best class | least cosine of features | top-1 of all | ms in all |")
    print("|---|---|---|---|---|")
    candidates: list[tuple[str, Runtime, str]] = [
        ("torch", "torch", "fp32"), ("torch", "torch", "bf16"), ("openvino", "openvino", "fp32"),
        ("openvino", "openvino", "bf16"), ("onnx", "onnx", "fp32"),
    ]  # fmt: skip
    engines = [(f"{name} {p}", Engine(given.model, runtime, p)) for name, runtime, p in candidates]  # type: ignore[arg-type]
    engines += [(Path(file).name, Engine(file)) for file in given.int8]
    for name, engine in engines:
        logits, features = outputs(engine, pictures)
        same = (logits.argmax(axis=1) == expected.argmax(axis=1)).mean() if len(logits) else float("nan")
        cosine = "" if features is None else f"{cosines(features, vectors).min():.5f}"
        top1, took = "", ""
        if every is not None and len(logits):
            began = time.perf_counter()
            top1 = f"{(engine.logits_of(every).argmax(axis=1) == every.labels).mean():.2%}"
            took = f"{1000 * (time.perf_counter() - began):.0f}"
        print(f"| {name} | {same:.2%} | {cosine} | {top1} | {took} |", flush=True)


def outputs(engine: Engine, pictures: list[np.ndarray]) -> tuple[np.ndarray, Any]:
    """Logits and features; a graph file holds one of both."""
    from beit.graphs import GraphError

    logits, features = np.empty((0, 0)), None
    prepared = [preprocess(picture, engine.image_spec) for picture in pictures]
    parts = [np.stack(prepared[i : i + 16]) for i in range(0, len(prepared), 16)]
    with contextlib.suppress(GraphError):
        features = np.concatenate([engine.features_array(part) for part in parts])
    with contextlib.suppress(ValueError):
        logits = np.concatenate([engine.logits_array(part) for part in parts])
    return logits, features


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return np.asarray((ours * theirs).sum(axis=1) / norms)


if __name__ == "__main__":
    main()
