"""VQ-KD against the outputs of the original code (golden) and its published counts."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import beit.tokenizer
import beit.vqkd
from beit.tokenizer_files import load_tokenizer, save_tokenizer
from beit.vqkd import VQKD, NormEMAVectorQuantizer, VQKDConfig, mean_patches, patch_pixels
from beit.weight_files import CheckpointError

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


def test_a_new_tokenizer_begins_as_published() -> None:
    torch.manual_seed(0)
    config = VQKDConfig(32, 8, 96, 1, 1, 4, 64, 32, 96, layer_norm_eps=1e-3)
    tokenizer = VQKD(config)
    for layer in (*tokenizer.encode_task_layer, *tokenizer.decode_task_layer):
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not layer.bias.any()
    lengths = tokenizer.quantize.embedding.weight.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(64))
    assert {m.eps for m in tokenizer.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}
    published = VQKDConfig(224, 16, 768, 12, 3, 12, 8192, 32, 512, 1e-6, 0.99, 0)
    assert VQKDConfig() == published


def test_a_saved_tokenizer_gives_the_same_tokens(tiny: VQKD, tmp_path: Path) -> None:
    save_tokenizer(tiny, tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_tokenizer(tmp_path).encode(images), tiny.encode(images))


def test_another_grid_than_its_own_has_tokens_and_features_too(tiny: VQKD) -> None:
    token_ids = tiny.encode(torch.rand(1, 3, 64, 32))
    assert token_ids.shape == (1, 8, 4)
    assert tiny.decode_features(token_ids).shape == (1, 32, 20)
    with pytest.raises(ValueError, match="a side of 36 pixels is not a multiple of the token stride 8"):
        tiny.encode(torch.rand(1, 3, 36, 32))


def test_it_says_that_it_cannot_draw(tiny: VQKD) -> None:
    assert not tiny.can_draw
    with pytest.raises(ValueError, match="decode_features"):
        tiny.decode(torch.zeros(1, 4, 4, dtype=torch.int64))


def test_a_token_looks_as_the_mean_of_the_patches_that_took_it() -> None:
    """One that none took has the mean colour of all. Left is red, right is blue, above is brighter."""
    red, blue = torch.tensor([0.8, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.4])
    patches = torch.stack([red, red / 2, blue])[:, :, None, None].expand(3, 3, 4, 4).clone()
    patches[2, :, :2] *= 2
    sums = torch.zeros(3, 48).index_add_(0, torch.tensor([2, 2, 0]), patches.flatten(1))
    seen = mean_patches(sums, torch.tensor([1.0, 0.0, 2.0]))
    assert (seen.shape, seen.dtype) == ((3, 3, 4, 4), torch.uint8)
    assert (seen[2] == torch.tensor([153, 0, 0], dtype=torch.uint8)[:, None, None]).all()
    assert (seen[0, 2, :2] == 204).all()
    assert (seen[0, 2, 2:] == 102).all()
    assert seen[1, :, 0, 0].tolist() == [102, 0, 51]
    assert (seen[1] == seen[1, :, :1, :1]).all()


def test_mean_patches_are_saved_and_drawn_each_in_its_place(tiny: VQKD, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (tiny.vocab_size, 3, 8, 8)
    tiny.mean_patches = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    save_tokenizer(tiny, tmp_path)
    back = load_tokenizer(tmp_path)
    assert back.can_draw
    assert back.state_dict().keys() == VQKD(tiny.config).state_dict().keys()
    ids = torch.randint(tiny.vocab_size, (2, 2, 3), generator=generator)
    drawn = back.decode(ids)
    assert drawn.shape == (2, 3, 16, 24)
    for b, y, x in np.ndindex(2, 2, 3):
        patch = drawn[b, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] * 255
        torch.testing.assert_close(patch, tiny.mean_patches[ids[b, y, x]].float())


def test_a_folder_without_mean_patches_loads_and_wrong_ones_are_refused(
    tiny: VQKD, tmp_path: Path
) -> None:
    save_tokenizer(tiny, tmp_path)
    assert not (tmp_path / "mean_patches.safetensors").exists()
    assert not load_tokenizer(tmp_path).can_draw
    save_file({"mean_patches": torch.zeros(2, 3, 8, 8)}, tmp_path / "mean_patches.safetensors")
    with pytest.raises(CheckpointError, match=r"mean_patches is \(2, 3, 8, 8\)"):
        load_tokenizer(tmp_path)


def test_a_step_of_the_tiny_original_costs_the_same(tiny: VQKD) -> None:
    with np.load(GOLDEN / "vqkd-tiny.npz") as z:
        images, target = torch.from_numpy(z["input"]), torch.from_numpy(z["rec_target"])
        quantised = tiny.quantize(tiny.project(images))
        codes = quantised.codes.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        assert np.abs(codes.detach().numpy() - z["quantized"]).max() < 1e-5
        assert abs(quantised.commitment.item() - z["commit_loss"]) < 1e-6
        output = tiny(images, target)
        assert abs(output.loss.item() - z["commit_loss"] - z["rec_loss"]) < 1e-5
        assert abs(output.error.item() - z["rec_loss"]) < 1e-5
        assert np.array_equal(output.token_ids.flatten(1).numpy(), z["ids"])
        # How far the second best code was: no rounding decided between two.
        directions = F.normalize(tiny.project(images), dim=-1).flatten(0, 1)
        two = (2 - 2 * directions @ tiny.quantize.embedding.weight.T).topk(2, largest=False).values
        assert np.abs((two[:, 1] - two[:, 0]).detach().numpy() - z["margin"]).max() < 1e-5
        # The original counts in evaluation, too.
        tiny.quantize.cluster_size.copy_(torch.from_numpy(z["cluster_size_before"]))
        tiny.quantize.count(torch.bincount(output.token_ids.flatten(), minlength=64))
        after = tiny.quantize.cluster_size.numpy()
        assert np.abs(after - z["cluster_size_after_one_eval_call"]).max() < 1e-5


# --- The quantiser's training ----------------------------------------------------------------------


def quantizer(codes: Tensor, **options: float) -> NormEMAVectorQuantizer:
    """A quantiser in training whose codebook is given, and begun."""
    sizes: dict[str, Any] = {"vocab_size": len(codes), "code_dim": codes.shape[1], **options}
    made = NormEMAVectorQuantizer(VQKDConfig(**sizes)).train()
    made.embedding.weight.copy_(codes)
    made.embedding.initted.fill_(1)
    return made


@pytest.mark.parametrize("start", ["ema", "kmeans"])
def test_three_training_steps_equal_the_original(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(GOLDEN / "vqkd-quantizer-train.npz") as file:
        golden = {k: torch.from_numpy(file[k]) for k in file.files if k != "config"}
        assert json.loads(str(file["config"]))["decay"] == 0.9
    ours = quantizer(golden[f"{start}_weight_start"], codebook_decay=0.9)
    if start == "kmeans":
        ours.embedding.initted.zero_()
        rows = golden["kmeans_picked_rows"]  # the original's dice
        monkeypatch.setattr(beit.vqkd, "pick_directions", lambda given, count: given[rows])
    for step in range(3):
        expected = {
            k.removeprefix(f"{start}_step{step}_"): v
            for k, v in golden.items()
            if f"{start}_step{step}" in k
        }
        z = expected["z"].permute(0, 2, 3, 1).clone().requires_grad_()  # (B, h, w, K)
        output = ours(z)
        assert torch.equal(output.token_ids.flatten(), expected["ids"])
        codes = output.codes.permute(0, 3, 1, 2)
        torch.testing.assert_close(codes, expected["z_q"], atol=1e-6, rtol=0)
        torch.testing.assert_close(output.commitment, expected["loss"], atol=1e-6, rtol=0)
        ((codes * expected["out_weighting"]).sum() + output.commitment).backward()
        assert z.grad is not None
        torch.testing.assert_close(z.grad.permute(0, 3, 1, 2), expected["grad_z"], atol=1e-6, rtol=1e-5)
        for name, value in [
            ("weight_after", ours.embedding.weight.data),
            ("usage_after", ours.cluster_size),
            ("embedding_cluster_size_after", ours.embedding.cluster_size.data),
            ("initted", ours.embedding.initted),
        ]:
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def directions(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=-1)


def test_without_revival_an_unused_code_stays_for_ever() -> None:
    far = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    ours = quantizer(far)
    for _ in range(30):
        ours(torch.tensor([[1.0, 0.1], [1.0, -0.1]]))
    assert torch.equal(ours.embedding.weight[0], far[0])
    assert ours.cluster_size[0] == 0
    assert ours.cluster_size[1].item() == pytest.approx(2 * (1 - 0.99**30), rel=1e-4)
    assert "unused_steps" not in ours.state_dict()  # a published file has none


def test_with_revival_a_code_unused_so_long_takes_the_place_of_a_point() -> None:
    far = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    ours = quantizer(far, revive_after_steps=3)
    given = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1]]), dim=-1)
    for _ in range(3):
        assert torch.equal(ours.embedding.weight[0], far[0])
        ours(given)
    assert (ours.embedding.weight[0] - given).norm(dim=-1).min() < 1e-6


def test_the_quantiser_computes_in_float32_under_autocast() -> None:
    close_by = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.02], [1.0, 0.04]]), dim=-1)
    ours = quantizer(close_by).eval()
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(close_by)
    assert output.token_ids.tolist() == [0, 1, 2]
    assert output.codes.dtype == output.commitment.dtype == torch.float32


def test_the_projection_is_not_rounded_under_autocast(tiny: VQKD) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        z = tiny.project(images)
    assert z.dtype == torch.float32
    assert not torch.equal(z, z.bfloat16().float())


def test_the_error_is_counted_in_float32_whatever_the_teachers_precision(tiny: VQKD) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    target = directions(32, 20).view(2, 16, 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output = tiny(images, target)
        said = tiny.say(tiny.quantize(tiny.project(images)).codes.unflatten(1, (4, 4)))
    assert output.error.dtype == output.loss.dtype == torch.float32
    expected = 1 - F.cosine_similarity(said.double(), target.double(), dim=-1).mean()
    assert output.error.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_batch_that_is_not_finite_moves_no_code() -> None:
    ours = quantizer(directions(4, 3), revive_after_steps=1)
    before = ours.embedding.weight.clone()
    ours(torch.full((5, 3), float("nan")))
    assert torch.equal(ours.embedding.weight, before)


def test_parts_of_a_batch_move_the_codebook_as_the_whole_does(tiny: VQKD) -> None:
    """The first step begins it, the second moves it; what is begun once is not begun again."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.rand(4, 3, 32, 32, generator=generator) for _ in range(2)]
    whole, parts = copy.deepcopy(tiny).train(), tiny.train()
    for tokenizer in (whole, parts):
        tokenizer.quantize.embedding.initted.zero_()
    for number, images in enumerate(steps):
        torch.manual_seed(number)
        whole(images, torch.zeros(4, 16, 20))
        torch.manual_seed(number)
        parts.begin_codebook(images.split(2))
        before = parts.quantize.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        outputs = [parts(part, torch.zeros(2, 16, 20), moves_codebook=False) for part in images.split(2)]
        for name, value in parts.quantize.state_dict().items():
            assert torch.equal(value, before[name]), name
        directions, token_ids = (
            torch.cat([getattr(output, name) for output in outputs])
            for name in ("directions", "token_ids")
        )
        parts.update_codebook(directions, token_ids)
        for name, value in whole.quantize.state_dict().items():
            torch.testing.assert_close(parts.quantize.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_a_codebook_that_is_not_begun_waits_for_its_caller(tiny: VQKD) -> None:
    tiny.train().quantize.embedding.initted.zero_()
    before = tiny.quantize.embedding.weight.clone()
    tiny(torch.rand(2, 3, 32, 32), torch.zeros(2, 16, 20), moves_codebook=False)
    assert torch.equal(tiny.quantize.embedding.weight, before)
    assert not tiny.quantize.embedding.initted


def test_a_step_reaches_every_weight_and_not_the_codebook(tiny: VQKD) -> None:
    tiny.train()
    tiny.quantize.embedding.initted.fill_(1)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tiny(images, directions(32, 20).view(2, 16, 20)).loss.backward()
    for name, parameter in tiny.named_parameters():
        if name.startswith("quantize."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


# Three steps, the first with k-means, the others with revival; a rank has half of each batch.
STEPS = """
import sys, torch, torch.distributed as dist
from safetensors.torch import save_file
from beit.vqkd import NormEMAVectorQuantizer, VQKDConfig
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
batches = torch.randn(3, 2, 24, 5, generator=torch.Generator().manual_seed(9))
torch.manual_seed(rank)
config = VQKDConfig(vocab_size=64, code_dim=5, revive_after_steps=1)
quantizer = NormEMAVectorQuantizer(config).train()
for batch in batches:
    quantizer(batch[rank])
save_file(quantizer.state_dict(), f"{folder}/{rank}.safetensors")
dist.destroy_process_group()
"""


def test_two_processes_make_the_codebook_that_one_makes_of_both_halves(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STEPS]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=ENVIRONMENT) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))

    batches = torch.randn(3, 2, 24, 5, generator=torch.Generator().manual_seed(9))
    torch.manual_seed(0)
    alone = NormEMAVectorQuantizer(VQKDConfig(vocab_size=64, code_dim=5, revive_after_steps=1)).train()
    start = alone.embedding.embed_avg.clone()
    for batch in batches:
        alone(batch)
    for name, value in alone.state_dict().items():
        if name != "embedding.embed_avg":  # as each process began, and never used
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, atol=1e-6, rtol=1e-6)
    assert not torch.equal(alone.embedding.weight, start)
    assert (alone.unused_steps == 0).all()


# --- The teacher of those who have none --------------------------------------------------------------


def test_pixels_teach_each_patch_by_its_own_alone() -> None:
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    told = patch_pixels(images, 8)
    assert told.shape == (2, 12, 192)
    patch = images[1, :, 8:16, 16:24]  # row 1, column 2 of 4 x 3
    expected = ((patch - 0.45) / 0.27).reshape(192)  # channel by channel, row by row
    torch.testing.assert_close(told[1, 5], expected)


def test_the_teacher_of_pixels_tells_colours_apart() -> None:
    red, blue = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    red[:, 0], blue[:, 2] = 1.0, 1.0
    assert F.cosine_similarity(patch_pixels(red, 8), patch_pixels(blue, 8), dim=-1).item() < 0.2
