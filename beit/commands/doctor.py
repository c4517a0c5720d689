"""`beit doctor`: versions, processor, caches and speed of this machine, and what would make it faster."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cyclopts import Parameter
from PIL import features

from beit.cache import cache_folder
from beit.engine import Engine
from beit.flops import forward_flops, measured_flops
from beit.model import BeitConfig, BeitForImageClassification
from beit.workers import available_processors

# Extra: (a module and the package that holds it, what it is for).
EXTRAS = {
    "openvino": ("openvino", "openvino", "int8 and mostly faster answers on a processor"),
    "onnx": ("onnxruntime", "onnxruntime", "export to ONNX, and running it"),
    "faiss": ("faiss", "faiss-cpu", "beit search --approximate"),
    "parquet": ("pyarrow", "pyarrow", "pictures and results in Parquet"),
    "remote": ("fsspec", "fsspec", "pictures at s3://, gs://, hf://"),
    "demo": ("sklearn", "scikit-learn", "beit demo"),
    "serve": ("fastapi", "fastapi", "beit serve"),
    "tensorboard": ("tensorboard", "tensorboard", "--tensorboard"),
}
# What the kernels of torch and OpenVINO look for, by the names of /proc/cpuinfo.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp",
         "bf16", "i8mm")  # fmt: skip
SMALL = BeitConfig(embed_dim=384, depth=12, num_heads=6)  # 22 million parameters, 224 px
SECONDS = 0.6  # a forward pass is repeated for so long


@Parameter(name="*")
@dataclass(frozen=True)
class Doctor:
    json: bool = False
    """Print one JSON object instead of words."""


def doctor(settings: Doctor = Doctor()) -> dict[str, Any]:
    """Look at this machine, time it for about two seconds, and say what would help."""
    facts = {
        "versions": versions(),
        "extras": {extra: installed(module, package) for extra, (module, package, _) in EXTRAS.items()},
        "machine": machine(),
        "caches": caches(),
        "speed": speed(),
    }
    facts["advice"] = advice(facts)
    if settings.json:
        print(json.dumps(facts))
    else:
        show(facts)
    return facts


# --- Facts ---------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of what beit stands on."""
    names = ("beit", "torch", "numpy", "pillow", "safetensors", "huggingface-hub")
    found = {name: _version(name) or "not installed" for name in names}
    return {"python": platform.python_version(), **found, "system": platform.platform(terse=True)}


def installed(module: str, package: str) -> str | None:
    """The version of an extra's library; None where it is missing."""
    return None if find_spec(module) is None else _version(package) or "unknown version"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Processor, memory, devices, threads."""
    facts = {"name": platform.processor() or platform.machine(), "flags": ""}
    memory = 0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                facts["name"] = value
            elif key in ("flags", "Features"):
                facts["flags"] = value
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):  # not Linux
        pass
    words = facts["flags"].split()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": facts["name"],
        "flags": [flag for flag in FLAGS if flag in words],
        "processors": available_processors(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "mps": torch.backends.mps.is_available(),
    }


def caches() -> dict[str, dict[str, Any]]:
    """Where what can be made or fetched again lies, and how much room it takes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {
        "indices of pictures": cache_folder("index"),
        "indices of vectors": cache_folder("faiss"),
        "graphs of models": cache_folder("graphs"),
        "hashes": cache_folder("hashes"),
        "downloads": Path(HF_HUB_CACHE),
    }
    return {
        what: {"path": str(path), "mib": round(_size(path) / 2**20, 1), "free_gib": _free_gib(path)}
        for what, path in places.items()
    }


def _size(folder: Path) -> int:
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(here, name)
            if not os.path.islink(file) and os.path.isfile(file):
                total += os.path.getsize(file)
    return total


def _free_gib(path: Path) -> float:
    there = next(p for p in (path, *path.parents) if p.exists())
    return round(shutil.disk_usage(there).free / 2**30, 1)


def speed() -> dict[str, Any]:
    """Matrix products and a small BEiT's forward pass, a picture at a time, on the best device here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    products = {
        precision: round(measured_flops(device, precision) / 1e9) for precision in ("fp32", "bf16")
    }
    torch.manual_seed(0)
    model = BeitForImageClassification(SMALL)
    picture = np.zeros((1, 3, *SMALL.image_height_width), np.float32)
    forward: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        engine = Engine(model, "torch", precision, device=device.type)
        engine.features_array(picture)
        times: list[float] = []
        while sum(times) < SECONDS:
            start = time.perf_counter()
            engine.features_array(picture)
            times.append(time.perf_counter() - start)
        forward[precision] = round(1000 * float(np.median(times)), 1)
    best = min(forward, key=lambda precision: forward[precision])
    share = forward_flops(SMALL) / (forward[best] / 1000) / (products[best] * 1e9)
    return {
        "device": device.type,
        "gflops": products,
        "small_beit_ms": forward,
        "small_beit_share": round(share, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }


# --- Words ---------------------------------------------------------------------------------------


def advice(facts: dict[str, Any]) -> list[str]:
    """What to do for more speed here, the most useful first."""
    machine, speed = facts["machine"], facts["speed"]
    found = []
    if speed["device"] == "cpu" and facts["extras"]["openvino"] is None:
        found.append('pip install "beit[openvino]": graphs and int8, mostly the fastest on a processor')
    if speed["device"] == "cpu" and _has_driver():
        found.append(
            f"there is a GPU, and torch {torch.__version__} sees none; pytorch.org/get-started has the "
            "install line of one that does, and `nvidia-smi` tells which CUDA the driver takes"
        )
    if not features.check_feature("libjpeg_turbo"):
        found.append("Pillow decodes JPEGs without libjpeg-turbo; pip install --force-reinstall pillow")
    if machine["torch_threads"] < machine["processors"]:
        found.append(
            f"torch uses {machine['torch_threads']} of {machine['processors']} processors; "
            "unset OMP_NUM_THREADS, or give --threads"
        )
    rates = speed["gflops"]
    if speed["device"] == "cpu" and rates["bf16"] < rates["fp32"]:
        found.append("bf16 is slower than fp32 on this processor; --precision auto knows")
    if 0 < machine["memory_gib"] < 4:
        found.append(f"{machine['memory_gib']} GiB of memory: use base models, and --batch-size 1")
    for what, cache in facts["caches"].items():
        if cache["free_gib"] < 1:
            found.append(f"the disk of the {what} has {cache['free_gib']} GiB left: {cache['path']}")
    return found


def _has_driver() -> bool:
    return sys.platform == "linux" and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd")))


def show(facts: dict[str, Any]) -> None:
    """One screen."""
    machine, speed = facts["machine"], facts["speed"]
    rows = [("versions", ", ".join(f"{name} {value}" for name, value in facts["versions"].items()))]
    for number, (extra, found) in enumerate(facts["extras"].items()):
        words = found or f'missing: {EXTRAS[extra][2]}; pip install "beit[{extra}]"'
        rows.append(("" if number else "extras", f"{extra:12} {words}"))
    gpus = "; ".join(machine["gpus"]) or ("Apple's" if machine["mps"] else "none")
    flags = ", ".join(machine["flags"]) or "none that matter are known"
    rows += [
        ("processor", f"{machine['processor']}, {machine['processors']} for this process"),
        ("", f"instructions: {flags}"),
        ("", f"torch threads: {machine['torch_threads']}; memory: {machine['memory_gib']} GiB"),
        ("GPU", gpus),
    ]
    for number, (what, cache) in enumerate(facts["caches"].items()):
        told = f"{cache['mib']:,} MiB, {cache['free_gib']:,} GiB free: {cache['path']}"
        rows.append(("" if number else "caches", f"{what}: {told}"))
    rates, times = speed["gflops"], speed["small_beit_ms"]
    rows += [
        ("speed", f"matrix products: {rates['fp32']:,} GFLOP/s in fp32, {rates['bf16']:,} in bf16"),
        (
            "",
            f"a small BEiT, one picture of 224 px: {times['fp32']} ms in fp32, {times['bf16']} in bf16",
        ),
        (
            "",
            f"which is {speed['small_beit_share']:.0%} of what the products allow; on {speed['device']}",
        ),
    ]
    for number, line in enumerate(facts["advice"] or ["nothing to add"]):
        rows.append(("" if number else "for speed", line))
    for title, words in rows:
        print(f"{title:10} {words}")
