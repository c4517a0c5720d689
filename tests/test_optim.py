"""Parameter groups, schedule and a short training, against numbers of the original code."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from beit.model import (
    VARIANTS,
    Beit,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
)
from beit.optim import (
    EMA,
    adamw,
    cosine_schedule,
    has_weight_decay,
    layer_id,
    layer_scale,
    param_groups,
    set_learning_rate,
    update,
)

GOLDEN = Path(__file__).parent / "golden"
FINETUNE, PRETRAIN = "optim-v1-finetune-base-decay0.65", "optim-v1-pretrain-base"


def golden_groups(name: str) -> tuple[Beit, dict[str, Any], list[dict[str, Any]]]:
    """A model without memory, what the original says of its parameters, and our groups."""
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    with torch.device("meta"):
        model: Beit
        if name == PRETRAIN:
            model = BeitForMaskedImageModeling(VARIANTS["beit_base_patch16_224_8k_vocab"])
        else:
            model = BeitForImageClassification(VARIANTS["beit_base_patch16_224"])
    decay = expected["base_weight_decay"]
    return model, expected, param_groups(model, decay, expected["layer_decay"], model.config.depth)


@pytest.mark.parametrize("name", [FINETUNE, PRETRAIN])
def test_each_parameter_has_the_decay_and_the_rate_of_the_original(name: str) -> None:
    _, expected, groups = golden_groups(name)
    ours = {
        key: (group["lr_scale"], group["weight_decay"], list(parameter.shape))
        for group in groups
        for key, parameter in zip(group["names"], group["params"], strict=True)
    }
    theirs = {
        key: (row["lr_scale"], row["weight_decay"], row["shape"])
        for key, row in expected["params"].items()
    }
    assert ours.keys() == theirs.keys()
    for key, (scale, decay, shape) in theirs.items():
        assert ours[key] == (pytest.approx(scale, rel=1e-12), decay, shape), key


@pytest.mark.parametrize(("name", "count"), [(FINETUNE, 28), (PRETRAIN, 2)])
def test_groups_are_those_of_the_original(name: str, count: int) -> None:
    _, expected, groups = golden_groups(name)
    assert len(groups) == expected["num_groups"] == count
    ours = [(g["weight_decay"], len(g["params"]), g["names"][0], g["names"][-1]) for g in groups]
    theirs = [(g["weight_decay"], g["num_params"], g["first"], g["last"]) for g in expected["groups"]]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize(
    ("size", "decay", "count", "least"),
    [
        ("base", 0.65, 28, 3.70e-3), ("base", 0.85, 28, 0.121),
        ("large", 0.75, 52, 7.53e-4), ("large", 0.9, 52, 0.0718),
    ],
)  # fmt: skip
def test_groups_and_least_rates_of_both_sizes(size: str, decay: float, count: int, least: float) -> None:
    with torch.device("meta"):
        model = BeitForImageClassification(VARIANTS[f"beit_{size}_patch16_224"])
    groups = param_groups(model, 0.05, decay, model.config.depth)
    assert len(groups) == count
    assert min(group["lr_scale"] for group in groups) == pytest.approx(least, rel=2e-3)
    scale_of = {name: group["lr_scale"] for group in groups for name in group["names"]}
    above = model.config.depth + 1
    for name, layer in (
        ("cls_token", 0), ("patch_embed.proj.weight", 0), ("blocks.0.norm1.weight", 1),
        (f"blocks.{above - 2}.attn.proj.weight", above - 1), ("fc_norm.bias", above), ("head.bias", above),
    ):  # fmt: skip
        assert scale_of[name] == pytest.approx(decay ** (above - layer), rel=1e-12), name


def test_layers_are_numbered_as_in_the_original() -> None:
    _, expected, _ = golden_groups(FINETUNE)
    for name, row in expected["params"].items():
        assert layer_id(name, 12) == row["layer_id"], name
    scales = [layer_scale(layer, 12, 0.65) for layer in range(14)]
    assert scales == pytest.approx(expected["layer_scales"], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("mask_token", 0), ("pos_embed", 0), ("rel_pos_bias.relative_position_bias_table", 13),
     ("norm.weight", 13), ("lm_head.bias", 13), ("cls_pt_layers.0.norm1.weight", 13)],
)  # fmt: skip
def test_tokens_belong_below_and_what_follows_the_blocks_above(name: str, layer: int) -> None:
    assert layer_id(name, 12) == layer


def test_mask_token_and_bias_tables_decay_but_class_token_and_positions_do_not() -> None:
    matrix = torch.zeros(1, 1, 4)
    assert has_weight_decay("mask_token", matrix)
    assert has_weight_decay("rel_pos_bias.relative_position_bias_table", matrix)
    assert not has_weight_decay("cls_token", matrix)
    assert not has_weight_decay("pos_embed", matrix)
    assert not has_weight_decay("blocks.0.attn.proj.bias", matrix)
    assert not has_weight_decay("blocks.0.gamma_1", torch.zeros(4))


def test_every_trained_parameter_is_in_one_group_and_no_frozen_one_is() -> None:
    model = BeitForImageClassification(
        BeitConfig(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3)
    )
    model.cls_token.requires_grad_(False)
    for decay in (None, 0.5):
        grouped = [id(p) for group in param_groups(model, 0.05, decay, 2) for p in group["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_rate_of_a_group_is_the_schedule_times_its_scale() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    groups = [
        {"params": [model[0].weight], "lr_scale": 0.25},
        {"params": [model[0].bias], "lr_scale": 1.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.008)
    assert [group["lr"] for group in optimizer.param_groups] == [0.002, 0.008]


# --- Schedule ------------------------------------------------------------------------------------

SCHEDULES = json.loads(str(np.load(GOLDEN / "lr-schedules.npz")["config"]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_that_of_the_original(name: str) -> None:
    says = SCHEDULES[name]
    with np.load(GOLDEN / "lr-schedules.npz") as file:
        expected = file[name]
    total = says["epochs"] * says["steps_per_epoch"]
    warmup = says["warmup_epochs"] * says["steps_per_epoch"]
    if says["warmup_steps"] > 0:
        warmup = says["warmup_steps"]
    ours = [
        cosine_schedule(
            step, total, warmup, says["base_value"], says["final_value"], says["start_warmup_value"]
        )
        for step in range(total)
    ]
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-18)


def test_schedule_rises_in_a_line_and_falls_in_a_cosine() -> None:
    rates = [cosine_schedule(step, 110, 10, base=1.0, final=0.2) for step in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(10) / 9, atol=1e-12)
    np.testing.assert_allclose(rates[60], 0.6, atol=1e-12)  # half way down: the middle of the two
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert 0.2 < rates[-1] < 0.2 + 0.8 * (math.pi / 100) ** 2 / 2


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (5, 5), (3, 1), (3, 2), (2, 1)])
def test_schedule_of_a_very_short_run_stays_between_its_ends(total: int, warmup: int) -> None:
    rates = [cosine_schedule(step, total, warmup, base=1.0, final=0.1) for step in range(total)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[0] == (0.0 if warmup else 1.0)
    assert warmup < 2 or rates[warmup - 1] == 1.0


# --- The original engine's four steps --------------------------------------------------------------

RUN = BeitConfig(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4).for_pretraining(32)


def golden_run() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(GOLDEN / "unilm-v1-pretrain-run.npz") as file:
        return {k: file[k] for k in file.files if k != "config"}, json.loads(str(file["config"]))


def test_four_training_steps_are_those_of_the_original_engine() -> None:
    expected, says = golden_run()
    model = BeitForMaskedImageModeling(RUN)
    model.load_state_dict(load_file(GOLDEN / "unilm-v1-pretrain-shared.safetensors"))
    optimizer = adamw(param_groups(model.train(), says["weight_decay"]), says["lr"], says["betas"])
    total = says["epochs"] * says["steps_per_epoch"]
    warmup = says["warmup_epochs"] * says["steps_per_epoch"]
    for number in range(4):
        lr = cosine_schedule(says["start_step"] + number, total, warmup, says["lr"], says["min_lr"])
        set_learning_rate(optimizer, lr)
        mask = torch.from_numpy(expected["step_masks"][number])
        labels = torch.from_numpy(expected["step_labels"][number])[mask]
        logits = model(torch.from_numpy(expected["step_inputs"][number]), mask)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        norm = update(optimizer, loss, says["clip_grad"]).norm
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        assert lr == pytest.approx(expected["log_lr"][number], rel=1e-12)
        assert loss.item() == pytest.approx(expected["log_loss"][number], abs=1e-5)
        assert norm.item() == pytest.approx(expected["log_grad_norm"][number], rel=1e-4)
        assert accuracy.item() == pytest.approx(expected["log_mlm_acc"][number], abs=1e-6)

    final = load_file(GOLDEN / "unilm-v1-pretrain-run.safetensors")
    ours = model.state_dict()
    assert ours.keys() == final.keys()
    for name, weight in final.items():
        torch.testing.assert_close(ours[name], weight, atol=3e-4, rtol=0, msg=name)
    model.eval()
    image, mask = torch.from_numpy(expected["input"]), torch.from_numpy(expected["bool_masked_pos"])
    with torch.no_grad():
        tokens = Beit.forward(model, image, mask)
        ours = {"logits_masked": model(image, mask), "logits_all": model.logits(tokens)}
    for name, logits in ours.items():
        torch.testing.assert_close(logits, torch.from_numpy(expected[name]), atol=1e-4, rtol=0)


def test_the_four_steps_of_the_original_moved_the_weights() -> None:
    """So that agreement above means something: by far more than its tolerance."""
    start = load_file(GOLDEN / "unilm-v1-pretrain-shared.safetensors")
    final = load_file(GOLDEN / "unilm-v1-pretrain-run.safetensors")
    for name in ("patch_embed.proj.weight", "mask_token", "lm_head.weight", "norm.weight"):
        assert float((start[name] - final[name]).abs().max()) > 3e-3, name


# --- Update --------------------------------------------------------------------------------------


def one_update(poison: str = "", clip: float = 0.5) -> tuple[nn.Module, Any, Any]:
    """Two good steps of a small model, and a third that may be poisoned, with real updates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = adamw(list(model.parameters()), lr=0.1, weight_decay=0.1)
    for step in range(3):
        before = (
            [p.detach().clone() for p in model.parameters()],
            [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()],
        )
        loss = model(torch.full((4, 3), 1.0 + step)).square().sum()
        loss.backward()
        if step == 2 and poison == "loss":
            loss = loss * math.nan
        elif step == 2 and poison:
            assert model[2].weight.grad is not None
            model[2].weight.grad[1, 2] = float(poison)
        state = update(optimizer, loss, clip)
    return model, (optimizer, before), state


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("poison", ["loss", "nan", "inf", "-inf"])
def test_an_update_that_is_not_finite_moves_not_a_bit(poison: str, clip: float) -> None:
    model, (optimizer, (weights, moments)), state = one_update(poison, clip)
    assert state.skipped.item() == 1
    for parameter, weight, before in zip(model.parameters(), weights, moments, strict=True):
        assert torch.equal(parameter, weight)
        assert before["step"].item() == 2
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_a_finite_update_is_torchs_own(clip: float) -> None:
    model, (optimizer, _), state = one_update(clip=clip)
    assert state.skipped.item() == 0
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for step in range(3):
        plain.zero_grad()
        theirs(torch.full((4, 3), 1.0 + step)).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        plain.step()
    assert torch.equal(state.norm, norm)
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is None
    assert not hasattr(optimizer, "found_inf")


def test_an_update_without_any_before_it_can_be_left_out() -> None:
    """The very first step: moments appear, as zeros."""
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    optimizer = adamw(list(layer.parameters()), lr=0.1)
    loss = layer(torch.full((1, 2), math.nan)).sum()
    loss.backward()
    update(optimizer, loss)
    assert torch.equal(layer.weight, before)
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


# --- Average -------------------------------------------------------------------------------------


def test_average_follows_the_closed_form_and_leaves_integers_alone() -> None:
    model = nn.BatchNorm1d(3)
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(6, 3)).astype(np.float32)

    def become(row: np.ndarray) -> None:
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(row))
            model.running_mean.copy_(torch.from_numpy(2 * row))
            model.num_batches_tracked += 1

    become(rows[0])
    average = EMA(model, 0.9)
    for number, row in enumerate(rows[1:]):
        become(row)
        average.update(model, 1000 + number)
    shares = np.array([0.9**5, *(0.1 * 0.9 ** (5 - i) for i in range(1, 6))])
    expected = (shares[:, None] * rows.astype(np.float64)).sum(axis=0)
    np.testing.assert_allclose(average.tensors["weight"], expected, rtol=1e-5)
    np.testing.assert_allclose(average.tensors["running_mean"], 2 * expected, rtol=1e-5)
    assert "num_batches_tracked" not in average.tensors
    other = nn.BatchNorm1d(3)
    average.copy_to(other)
    assert torch.equal(other.weight, average.tensors["weight"])
    assert other.num_batches_tracked == 0
    np.testing.assert_array_equal(model.weight.detach(), rows[-1])  # the model keeps its own


def test_the_average_of_a_short_run_is_of_its_last_weights() -> None:
    """With 0.9999 from the first step on, 93 % of it would be how it began."""
    model = nn.Linear(1, 1, bias=False)
    average = EMA(model, 0.9999)
    start = average.tensors["weight"].clone()
    model.weight.data += 1
    kept = 1.0
    for step in range(780):
        average.update(model, step)
        kept *= (1 + step) / (10 + step)
        np.testing.assert_allclose(average.tensors["weight"] - start, 1 - kept, rtol=1e-5)
    assert kept < 1e-12


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5])
def test_an_average_of_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"is not between 0 and 1; 0\.9999 is usual"):
        EMA(nn.Linear(1, 1), decay)
