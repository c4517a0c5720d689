"""VQ-KD against the outputs of the original code (golden) and its published counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from beit.checkpoints import load_tokenizer, save_tokenizer
from beit.vqkd import VQKD, VQKDConfig

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def tiny() -> VQKD:
    tokenizer = VQKD(VQKDConfig(32, 8, 48, 3, 2, 4, 64, 8, 20)).eval()
    tokenizer.load_state_dict(load_file(GOLDEN / "vqkd-tiny.safetensors"))
    return tokenizer


@torch.no_grad()
def test_tokens_and_features_are_those_of_the_original(tiny: VQKD) -> None:
    with np.load(GOLDEN / "vqkd-tiny.npz") as z:
        images = torch.from_numpy(z["input"])
        token_ids = tiny.encode(images)
        assert token_ids.shape == (4, 4, 4)
        assert np.array_equal(token_ids.flatten(1).numpy(), z["ids"])
        assert np.abs(tiny.project(images).numpy() - z["to_quantizer"]).max() < 1e-5
        assert np.abs(tiny.decode_features(token_ids).numpy() - z["decoder_output"]).max() < 1e-5
        given = torch.from_numpy(z["ids_in"]).unflatten(1, (4, 4))
        drawn = tiny.decode_features(given).numpy()
        assert np.abs(drawn - z["decoder_output_from_ids_in"]).max() < 1e-5


@pytest.mark.parametrize(("depth", "count"), [(3, 108_829_216), (1, 94_655_008)])
def test_trained_parameters_are_as_many_as_published(depth: int, count: int) -> None:
    with torch.device("meta"):
        tokenizer = VQKD(VQKDConfig(decoder_depth=depth))
    assert sum(p.numel() for p in tokenizer.parameters() if p.requires_grad) == count
    assert depth != 3 or len(tokenizer.state_dict()) == 220


def test_a_saved_tokenizer_gives_the_same_tokens(tiny: VQKD, tmp_path: Path) -> None:
    save_tokenizer(tiny, tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_tokenizer(tmp_path).encode(images), tiny.encode(images))


def test_it_says_that_it_cannot_draw(tiny: VQKD) -> None:
    assert not tiny.can_draw
    with pytest.raises(ValueError, match="decode_features"):
        tiny.decode(torch.zeros(1, 4, 4, dtype=torch.int64))
