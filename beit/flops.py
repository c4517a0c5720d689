"""Floating-point operations of a BEiT, counted from its config, and what a device could do a second.

A multiplication and an addition count as two. Only matrix products are counted, as is usual for MFU
(model FLOPs utilisation, arXiv 2204.02311, appendix B); what gradient checkpointing computes anew is not.
"""

from __future__ import annotations

import functools
import re
import time

import torch

from beit.model import BeitConfig
from beit.precision import Precision, autocast, resolve_precision

# Dense bf16 peaks of NVIDIA's data sheets, TFLOP/s; the first match wins.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
    "A10": 125,
}  # fmt: skip


def forward_flops(config: BeitConfig, masked: float = 0.0) -> float:
    """FLOPs of one image's forward pass.

    masked: patches whose tokens are guessed, for pre-training, where the last block and v2's last extra one
        finish these alone; 0 counts the classifier instead.
    """
    patches, width = config.grid[0] * config.grid[1], config.embed_dim
    tokens = 1 + patches
    finish = (1 + 2 * config.mlp_ratio) * width**2  # of a token, once it has seen the others
    block = tokens * (3 * width**2 + finish) + 2 * tokens**2 * width
    products = 1.0 * patches * config.in_chans * config.patch_size**2 * width
    extra = config.head_layers if masked and config.early_layer else 0
    products += (config.depth + extra) * block
    if masked:
        products += (2 if extra else 1) * masked * width * config.vocab_size
        products -= (tokens - masked) * finish
        if extra and config.early_layer < config.depth:  # its class token is finished as well
            products -= (patches - masked) * finish
    else:
        products += width * config.num_classes
    return 2.0 * products


def training_flops(config: BeitConfig, masked: float = 0.0) -> float:
    """FLOPs of one image's training step: the backward pass is two forward passes."""
    return 3.0 * forward_flops(config, masked)


def peak_flops(device: torch.device, precision: Precision, tflops: float = 0.0) -> tuple[float, str]:
    """(FLOP/s, how it is known) that MFU is a share of: given, of the data sheet, or measured here."""
    if tflops:
        return tflops * 1e12, "as given"
    resolved = resolve_precision(precision, device)
    if device.type == "cuda" and resolved == "bf16":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAK_TFLOPS.items():
            if re.search(rf"\b{known}\b", name):
                return peak * 1e12, f"the data sheet's for {known}, bf16"
    return measured_flops(device, resolved), f"measured here by a matrix product, {resolved}"


@functools.cache
def measured_flops(device: torch.device, precision: Precision) -> float:
    """What `measure_flops` came to when it was first asked for."""
    return measure_flops(device, precision)


def measure_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s of the best of some products of two square matrices.

    A processor with AMX is at its best with 2,048 a side (2.0 TFLOP/s in bf16; 1.1 with 1,024).
    """
    sizes = (8192,) if device.type == "cuda" else (1024, 2048)
    return max(_product_flops(device, precision, size) for size in sizes)


def measured_int8_operations() -> float:
    """Operations a second of the best of some int8 products that torch has from oneDNN, on a processor."""
    best = 0.0
    for size in (1024, 2048):
        one = torch.randint(-128, 127, (size, size), dtype=torch.int8)
        for _ in range(6):
            began = time.perf_counter()
            torch._int_mm(one, one)
            best = max(best, 2.0 * size**3 / (time.perf_counter() - began))
    return best


def _product_flops(device: torch.device, precision: Precision, size: int) -> float:
    one = torch.randn(size, size, device=device)
    best = float("inf")
    with torch.no_grad(), autocast(precision, device):
        matrix = torch.mm(one, one)  # in bf16 where autocast says so
        for _ in range(6):
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
