"""`beit bench-pretrain` on the smallest encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli

import beit.commands.bench_pretrain
from beit.commands.bench_pretrain import transformers_step
from beit.flops import training_flops
from beit.model import VARIANTS, BeitForMaskedImageModeling
from beit.tokenizer import DiscreteVAE

from .conftest import Done

PARTS = ["model", "tokenizer", "loader", "all together", "transformers fp32"]


def test_each_part_is_timed_and_mfu_is_its_share_of_the_peak(
    cli: Cli, shapes: Path, tokenizer: Done
) -> None:
    options = {"model": "beit_mini_patch8_32", "tokenizer": tokenizer.folder, "precision": "fp32"}
    code, out, err = cli(
        "bench-pretrain", shapes / "train", "--json", turns=2, steps=1, peak_tflops=0.5, **options
    )
    assert code == 0, err
    result = json.loads(out)
    assert list(result["parts"]) == PARTS
    config = VARIANTS["beit_mini_patch8_32"].for_pretraining(32)
    flops = training_flops(config, 6)  # 75 of 196 patches, of 16
    assert result["gflop_an_image"] == pytest.approx(flops / 1e9)
    for name, row in result["parts"].items():
        assert 0 < row["least_ms"] <= row["ms_an_image"] <= row["most_ms"]
        assert row["images_per_second"] == pytest.approx(1000 / row["ms_an_image"])
        if name in ("tokenizer", "loader"):
            assert "mfu_percent" not in row
        else:
            assert row["mfu_percent"] == pytest.approx(100 * row["images_per_second"] * flops / 0.5e12)


def test_what_was_read_ahead_is_used_up_before_the_clock_starts(
    cli: Cli, shapes: Path, tokenizer: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches a process are ready when a turn comes: they took no time of it."""
    asked: dict[str, list[int]] = {}
    make_parts = beit.commands.bench_pretrain.make_parts

    def noted(*args: Any) -> dict[str, Any]:
        def note(name: str) -> Any:
            return lambda steps: asked.setdefault(name, []).append(steps)

        return {name: note(name) for name in make_parts(*args)}

    monkeypatch.setattr(beit.commands.bench_pretrain, "make_parts", noted)
    options = {"model": "beit_mini_patch8_32", "tokenizer": tokenizer.folder, "turns": 2, "steps": 3}
    code, _, err = cli("bench-pretrain", shapes / "train", workers=5, **options)
    assert code == 0, err
    assert asked["loader"] == [1, 10, 3 * 16, 10, 3 * 16]
    assert asked["all together"] == [1, 10, 3, 10, 3]
    assert asked["model"] == [1, 3, 3]


def test_the_peak_is_measured_in_each_turn(
    cli: Cli, shapes: Path, tokenizer: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1e9, 9e9, 3e9])
    monkeypatch.setattr(beit.commands.bench_pretrain, "measure_flops", lambda *_: next(rates))
    options = {"model": "beit_mini_patch8_32", "tokenizer": tokenizer.folder, "turns": 3, "steps": 1}
    code, out, err = cli("bench-pretrain", shapes / "train", "--json", **options)
    assert code == 0, err
    assert json.loads(out)["peak_tflops"] == 3e-3


def test_bench_pretrain_may_be_two_words(cli: Cli) -> None:
    code, out, _ = cli("bench", "pretrain", "--help")
    assert code == 0
    assert "part by part" in out


def test_a_table_for_people(cli: Cli, tokenizer: Done) -> None:
    code, out, _ = cli(
        "bench-pretrain", model="beit_mini_patch8_32", tokenizer=tokenizer.folder, turns=1, steps=1
    )
    assert code == 0
    for part in ("model", "tokenizer", "loader", "all together", "GFLOP an image"):
        assert part in out


def test_a_step_has_as_many_pictures_as_were_asked_for(
    cli: Cli, shapes: Path, tokenizer: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": "beit_mini_patch8_32", "tokenizer": tokenizer.folder, "turns": 1, "steps": 1}
    code, _, err = cli("bench-pretrain", shapes / "train", **options, batch_size=37)
    assert code == 2
    assert "has 36 pictures, and a step takes 37" in err
    encoded = []
    encode = DiscreteVAE.encode
    monkeypatch.setattr(DiscreteVAE, "encode", lambda s, x: encoded.append(len(x)) or encode(s, x))
    assert cli("bench-pretrain", **options, batch_size=72, precision="fp32", workers=0)[0] == 0
    assert set(encoded) == {72}


@pytest.mark.parametrize(
    "kind", [{}, {"rel_pos_bias": "none", "use_abs_pos_emb": True}, {"rel_pos_bias": "per_block"}]
)
def test_transformers_is_timed_on_the_same_network_or_not_at_all(kind: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = replace(VARIANTS["beit_mini_patch8_32"].for_pretraining(32), **kind)
    made = []
    init = transformers.BeitForMaskedImageModeling.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.BeitForMaskedImageModeling,
            "__init__",
            lambda model, given: made.append(model) or init(model, given),
        )
        given = (
            torch.zeros(1, 3, 32, 32),
            torch.ones(1, 4, 4, dtype=torch.bool),
            torch.zeros(1, 4, 4).long(),
        )
        assert transformers_step(config, *given, False) is not None
        assert transformers_step(replace(config, early_layer=3), *given, False) is None
    ours = sum(p.numel() for p in BeitForMaskedImageModeling(config).parameters())
    theirs = sum(p.numel() for p in made[0].parameters())
    assert theirs == ours


def test_a_wrong_model_is_named(cli: Cli) -> None:
    code, out, err = cli("bench-pretrain", model="beit_mini_patch8_23")
    assert (code, out) == (2, "")
    assert "did you mean beit_mini_patch8_32" in err
