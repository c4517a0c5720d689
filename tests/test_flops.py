"""FLOPs of a BEiT against torch's own count of a forward pass, and the published size."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from beit.flops import forward_flops, measured_flops, peak_flops, training_flops
from beit.model import VARIANTS, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

SMALL = BeitConfig(
    img_size=(32, 48), patch_size=8, embed_dim=24, depth=3, num_heads=4, mlp_ratio=3, num_classes=7
)


def counted(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    # As plain products: torch counts nothing of the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    return counter.get_total_flops()


def test_a_classifier_costs_what_torch_counts() -> None:
    model = BeitForImageClassification(SMALL).eval()
    assert forward_flops(SMALL) == counted(model, torch.zeros(1, 3, 32, 48))


@pytest.mark.parametrize("masked", [1, 9])
def test_guessing_tokens_costs_what_torch_counts(masked: int) -> None:
    config = SMALL.for_pretraining(50)
    model = BeitForMaskedImageModeling(config).eval()
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask.view(-1)[:masked] = True
    assert forward_flops(config, masked) == counted(model, torch.zeros(1, 3, 32, 48), mask)


@pytest.mark.parametrize("masked", [1, 9])
@pytest.mark.parametrize("early_layer", [2, 3])
def test_patch_aggregation_costs_what_torch_counts(masked: int, early_layer: int) -> None:
    config = replace(SMALL.for_pretraining(50), early_layer=early_layer)
    model = BeitForMaskedImageModeling(config).eval()
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask.view(-1)[:masked] = True

    class Aggregated(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return model.forward_aggregated(*inputs)

    assert forward_flops(config, masked) == counted(Aggregated(), torch.zeros(1, 3, 32, 48), mask)


def test_a_base_models_pretraining_step_is_104_gflop_an_image() -> None:
    """108.2 if the last block were finished for all 197 tokens, and not for the 75 that are guessed."""
    config = VARIANTS["beit_base_patch16_224_8k_vocab"]
    spared = 6 * 122 * 9 * 768**2
    assert training_flops(config, 75) == pytest.approx(108.2e9 - spared, rel=1e-3)
    assert spared == pytest.approx(3.9e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_known_gpus_have_the_data_sheets_peak(name: str, peak: int) -> None:
    with mock.patch("torch.cuda.get_device_name", return_value=name):
        assert peak_flops(torch.device("cuda"), "bf16")[0] == peak * 1e12


def test_a_given_peak_wins_and_another_device_is_measured() -> None:
    assert peak_flops(torch.device("cpu"), "fp32", tflops=1.5) == (1.5e12, "as given")
    measured, how = peak_flops(torch.device("cpu"), "fp32")
    assert how == "measured here by a matrix product, fp32"
    assert 1e8 < measured < 1e14
    assert measured == measured_flops(torch.device("cpu"), "fp32"), "measured once"
    with (
        mock.patch("torch.cuda.get_device_name", return_value="NVIDIA A10G"),
        mock.patch("beit.flops.measured_flops", return_value=5.0),
    ):
        assert peak_flops(torch.device("cuda"), "bf16")[0] == 5.0


def test_data_sheets_tell_of_bf16_alone() -> None:
    with (
        mock.patch("torch.cuda.get_device_name", return_value="NVIDIA H100 80GB HBM3"),
        mock.patch("beit.flops.measured_flops", return_value=5.0),
    ):
        assert peak_flops(torch.device("cuda"), "bf16")[0] == 989e12
        assert peak_flops(torch.device("cuda"), "fp32")[0] == 5.0
