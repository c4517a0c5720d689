"""Tokenizers, against golden outputs of OpenAI's dVAE, published counts and closed forms."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit.tokenizer import (
    DalleConfig,
    DalleConv2d,
    DalleDecoder,
    DalleEncoder,
    DalleTokenizer,
    DiscreteVAE,
    DiscreteVAEConfig,
    PixelTargets,
    Tokenizer,
    map_pixels,
    unmap_pixels,
)

GOLDEN = Path(__file__).parent / "golden"
TINY_DALLE = DalleConfig(vocab_size=48, n_hid=8, n_init=8, img_size=32)
TINY = DiscreteVAEConfig(img_size=16, vocab_size=12, code_dim=4, hidden_dim=8, num_layers=2)
GUMBEL = replace(TINY, quantizer="gumbel")


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        numbers = {key: file[key] for key in file.files}
    return {k: torch.from_numpy(v) for k, v in numbers.items() if v.dtype.kind != "U"}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def directions(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=-1)


def model(config: DiscreteVAEConfig = TINY) -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(config)


# --- OpenAI's dVAE -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dalle() -> DalleTokenizer:
    tokenizer = DalleTokenizer(TINY_DALLE)
    expected = golden("dalle-tiny")
    tokenizer.load_state_dict({k: v for k, v in expected.items() if ".blocks." in k})
    return tokenizer.eval()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_parameters_of_the_dvae_have_the_published_names_and_shapes(part: str) -> None:
    expected = {key: value.shape for key, value in golden("dalle-tiny").items() if key.startswith(part)}
    state = DalleTokenizer(TINY_DALLE).state_dict()
    ours = {key: value.shape for key, value in state.items() if key.startswith(part)}
    assert ours == expected
    assert len(ours) == {"encoder": 74, "decoder": 76}[part]


@pytest.mark.parametrize("view", ["square", "rect"])
@torch.no_grad()
def test_dvae_equals_the_original(dalle: DalleTokenizer, view: str) -> None:
    expected = {
        key[len(view) + 1 :]: value
        for key, value in golden("dalle-tiny").items()
        if key.startswith(view)
    }
    assert torch.equal(map_pixels(expected["raw"]), expected["mapped"])
    logits = dalle.encoder(expected["mapped"])
    torch.testing.assert_close(logits, expected["logits"], atol=2e-5, rtol=0)
    ids = dalle.encode(expected["raw"])
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected["ids"])
    assert dalle.decoder is not None
    one_hot = F.one_hot(ids, 48).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(dalle.decoder(one_hot), expected["decoder_output"], atol=5e-6, rtol=0)
    torch.testing.assert_close(dalle.decode(ids), expected["reconstruction"], atol=5e-6, rtol=0)


@torch.no_grad()
def test_in_float16_every_convolution_but_the_last_takes_and_gives_fp16(dalle: DalleTokenizer) -> None:
    """Against the method restated: operands, results and sums rounded to fp16, the rest in float64."""
    half = copy.deepcopy(dalle).use_float16()
    weights = {k: v.half().double() for k, v in dalle.encoder.state_dict().items()}
    gain = torch.tensor(1 / 64).double()

    def conv(x: Tensor, name: str) -> Tensor:
        w = weights[f"{name}.w"]
        return F.conv2d(x, w, weights[f"{name}.b"], padding=w.shape[-1] // 2).half().double()

    expected = golden("dalle-tiny")
    x = conv(expected["square_mapped"].half().double(), "blocks.input")
    for group in range(1, 5):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            path = x
            for i in range(1, 5):
                path = conv(path.relu(), f"{name}.res_path.conv_{i}")
            known = conv(x, f"{name}.id_path") if f"{name}.id_path.w" in weights else x
            x = (known + (gain * path).half().double()).half().double()
        if group < 4:
            x = F.max_pool2d(x, 2)
    head = dalle.encoder.blocks.output.conv  # in float32
    restated = F.conv2d(x.relu(), head.w.double(), head.b.double())
    logits = half.encoder(expected["square_mapped"])
    assert logits.dtype == torch.float32
    noise = (restated - expected["square_logits"]).abs().max().item()  # what fp16 costs
    assert (logits - restated).abs().max().item() < noise / 2
    assert (logits - expected["square_logits"]).abs().max().item() > noise / 10
    ids = half.encode(expected["square_raw"])
    assert (ids == expected["square_ids"]).float().mean() > 0.9
    assert half.decode(ids).dtype == torch.float32
    assert {v.dtype for v in half.state_dict().values()} == {torch.float32}
    assert torch.equal(
        half.use_float16(False).encoder(expected["square_mapped"]),
        dalle.encoder(expected["square_mapped"]),
    )


def test_in_float16_the_ends_that_meet_the_tokens_stay_in_float32(dalle: DalleTokenizer) -> None:
    half = copy.deepcopy(dalle).use_float16()
    ends = [half.encoder.blocks.output.conv, half.decoder.blocks.input]
    assert {end.dtype for end in ends} == {torch.float32}
    others = [m for m in half.modules() if isinstance(m, DalleConv2d) and m not in ends]
    assert {other.dtype for other in others} == {torch.float16}


def test_pixel_maps_equal_the_original() -> None:
    expected = golden("dalle-pixels")
    for ours, theirs in [
        (map_pixels(expected["value"]), expected["map_pixels"]),
        (unmap_pixels(expected["value"]), expected["unmap_pixels"]),
        (map_pixels(expected["byte_over_255"]), expected["map_of_byte_over_255"]),
    ]:
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)


def test_pixel_maps_undo_each_other() -> None:
    pixels = torch.linspace(0, 1, 256)
    torch.testing.assert_close(unmap_pixels(map_pixels(pixels)), pixels, atol=2e-7, rtol=0)
    assert map_pixels(torch.zeros(1, dtype=torch.float16)).dtype == torch.float32


def test_the_full_dvae_has_the_published_sizes() -> None:
    with torch.device("meta"):
        encoder, decoder = DalleEncoder(DalleConfig()), DalleDecoder(DalleConfig())
    assert (count(encoder), len(encoder.state_dict())) == (53_786_240, 74)
    assert (count(decoder), len(decoder.state_dict())) == (43_829_766, 76)
    tokens = encoder(torch.empty(1, 3, 112, 112, device="meta"))
    assert tokens.shape == (1, 8192, 14, 14)
    assert decoder(tokens).shape == (1, 6, 112, 112)


def test_a_dvae_without_decoder_encodes_but_cannot_draw(dalle: DalleTokenizer) -> None:
    alone = DalleTokenizer(TINY_DALLE, with_decoder=False)
    alone.encoder.load_state_dict(dalle.encoder.state_dict())
    x = pictures(1, 3, 16, 24)
    assert torch.equal(alone.encode(x), dalle.encode(x))
    with pytest.raises(ValueError, match="loaded without its decoder, so it cannot draw"):
        alone.decode(alone.encode(x))


def test_tokenizers_tell_their_vocabulary_stride_and_view() -> None:
    tokenizers: list[tuple[Tokenizer, int, int, int]] = [
        (DalleTokenizer(TINY_DALLE), 48, 8, 32),
        (model(), 12, 4, 16),
        (model(replace(GUMBEL, num_layers=3)), 12, 8, 16),
    ]
    for tokenizer, vocab_size, stride, pixels in tokenizers:
        assert tokenizer.vocab_size == vocab_size
        assert tokenizer.stride == stride
        assert tokenizer.view_size == (pixels, pixels)
        ids = tokenizer.encode(pictures(1, 3, pixels, pixels))
        assert ids.shape == (1, pixels // stride, pixels // stride)


@pytest.mark.parametrize("kind", ["dalle", "vq", "gumbel"])
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 16, 20), "a side of 20 pixels is not a multiple of the token stride 8; use 16 or 24"),
        ((1, 3, 31, 16), "a side of 31 pixels is not a multiple of the token stride 8; use 24 or 32"),
        ((1, 3, 0, 16), "a side of 0 pixels.*; use 8"),
        ((1, 1, 16, 16), r"images are \(1, 1, 16, 16\); a tokenizer takes \(B, 3, height, width\)"),
        ((3, 16, 16), r"images are \(3, 16, 16\); a tokenizer takes \(B, 3, height, width\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused_with_what_does(
    kind: str, shape: tuple[int, ...], words: str
) -> None:
    tokenizer: DalleTokenizer | DiscreteVAE
    if kind == "dalle":
        tokenizer = DalleTokenizer(TINY_DALLE, with_decoder=False)
    else:
        tokenizer = model(replace(TINY if kind == "vq" else GUMBEL, num_layers=3))
        with pytest.raises(ValueError, match=words):
            tokenizer(torch.zeros(shape))
    with pytest.raises(ValueError, match=words):
        tokenizer.encode(torch.zeros(shape))


# --- Our own: shapes and state -------------------------------------------------------------------


def test_published_customized_dvae_has_the_published_sizes() -> None:
    with torch.device("meta"):
        published = DiscreteVAE(DiscreteVAEConfig(code_dim=512, hidden_dim=256, quantizer="gumbel"))
    assert count(published) == 20_081_411
    assert count(published.encoder) == 7_953_408
    assert count(published.decoder) == 7_933_699
    assert count(published.codebook) == 4_194_304
    names = set(published.state_dict())
    for level in range(3):
        for part in ("encoder", "decoder"):
            assert f"{part}.{2 * level}.0.weight" in names
            assert {f"{part}.{2 * level + 1}.net.{i}.bias" for i in (0, 2, 4)} <= names
    assert {"encoder.6.weight", "decoder.6.weight", "codebook.weight"} <= names
    assert len(names) == 2 * (3 * 8 + 2) + 1


@pytest.mark.parametrize("config", [TINY, GUMBEL])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_pictures_become_a_grid_of_ids_and_come_back(config: DiscreteVAEConfig, num_layers: int) -> None:
    vae = model(replace(config, num_layers=num_layers)).eval()
    stride = 2**num_layers
    x = pictures(2, 3, 3 * stride, 2 * stride)
    ids = vae.encode(x)
    assert ids.shape == (2, 3, 2)
    assert ids.dtype == torch.int64
    assert set(ids.flatten().tolist()) <= set(range(12))
    drawn = vae.decode(ids)
    assert drawn.shape == x.shape
    assert torch.equal(drawn, drawn.clamp(0, 1))


@pytest.mark.parametrize("config", [TINY, GUMBEL])
def test_what_is_drawn_beyond_black_and_white_is_cut(config: DiscreteVAEConfig) -> None:
    vae = model(config).eval()
    vae.decoder[-1].bias.data = torch.tensor([-3.0, 0.0, 3.0])
    ids = torch.arange(12).view(1, 3, 4)
    drawn, raw = vae.decode(ids), vae.draw(vae.codebook(ids).permute(0, 3, 1, 2))
    assert raw.min() < 0
    assert raw.max() > 1
    assert torch.equal(drawn, raw.clamp(0, 1))


@pytest.mark.parametrize("config", [TINY, GUMBEL])
def test_a_forward_in_evaluation_changes_no_state(config: DiscreteVAEConfig) -> None:
    vae = model(config)
    vae(pictures(4, 3, 16, 16))  # so that codebook and statistics have begun
    vae.eval()
    before = copy.deepcopy(vae.state_dict())
    vae(pictures(4, 3, 16, 16, seed=1))
    vae.encode(pictures(4, 3, 16, 16, seed=1))
    after = vae.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("config", [TINY, GUMBEL])
def test_a_saved_state_dict_gives_the_same_ids_and_pictures(
    config: DiscreteVAEConfig, tmp_path: Path
) -> None:
    vae = model(config)
    for seed in range(3):
        vae(pictures(4, 3, 16, 16, seed=seed))
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    torch.manual_seed(99)
    loaded = DiscreteVAE(config)
    loaded.load_state_dict(torch.load(tmp_path / "vae.pt", weights_only=True))
    x = pictures(4, 3, 16, 16, seed=8)
    ids = vae.eval().encode(x)
    assert len(ids.unique()) > 1
    assert torch.equal(loaded.eval().encode(x), ids)
    assert torch.equal(loaded.decode(ids), vae.decode(ids))


@pytest.mark.parametrize("config", [TINY, GUMBEL])
def test_ids_are_those_of_the_forward(config: DiscreteVAEConfig) -> None:
    vae = model(config)
    vae(pictures(4, 3, 16, 16))
    x = pictures(4, 3, 16, 16, seed=1)
    assert torch.equal(vae.eval()(x).token_ids, vae.encode(x))


def test_output_of_a_step_is_what_it_says() -> None:
    vae = model()
    x = pictures(4, 3, 16, 16, seed=1)
    out = vae.eval()(x)
    codes = vae.codebook.weight[out.token_ids]
    reconstruction = (vae.decoder(codes.permute(0, 3, 1, 2)) + 1) / 2
    torch.testing.assert_close(out.reconstruction, reconstruction)
    torch.testing.assert_close(out.loss, ((reconstruction - x) ** 2).mean())


# --- Our own: the codebook -----------------------------------------------------------------------


def test_the_nearest_code_is_the_one_at_the_smallest_distance() -> None:
    vae = model()
    vae.codebook.weight.copy_(directions(12, 4))
    points = directions(50, 4, seed=1)
    distances = torch.cdist(points.double(), vae.codebook.weight.double())
    assert torch.equal(vae.nearest(points), distances.argmin(dim=-1))


def started(codes: Tensor, **options: float) -> DiscreteVAE:
    """A model in training whose codebook is given."""
    vocab_size, code_dim = codes.shape
    vae = model(replace(TINY, vocab_size=vocab_size, code_dim=code_dim, **options)).train()
    vae.codebook.weight.copy_(codes)
    return vae


def test_codes_are_chosen_in_float32_under_autocast() -> None:
    close_by = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.02], [1.0, 0.04]]), dim=-1)
    vae = started(close_by)
    with torch.autocast("cpu", torch.bfloat16):
        assert vae.nearest(close_by).tolist() == [0, 1, 2]


def test_used_codes_move_to_the_mean_of_what_they_were_given_and_others_stay() -> None:
    codes = torch.eye(4)[:3]
    vae = started(codes, codebook_decay=0.9)
    given = torch.tensor([[0.8, 0.6, 0.0, 0.0], [0.8, -0.6, 0.0, 0.0], [0.0, 0.6, 0.8, 0.0]])
    ids = vae.nearest(given)
    assert ids.tolist() == [0, 0, 2]
    vae.update_codebook(given, ids)
    # Code 0: the mean of its two is its own direction. Code 2: 0.9 (0, 0, 1) + 0.1 (0, 0.6, 0.8).
    expected = codes.clone()
    expected[2] = torch.tensor([0.0, 0.06, 0.98, 0.0]) / (0.06**2 + 0.98**2) ** 0.5
    torch.testing.assert_close(vae.codebook.weight.data, expected)
    assert torch.equal(vae.codebook.weight[1], codes[1])
    assert vae.unused_steps.tolist() == [0, 1, 0]


def test_a_batch_that_is_not_finite_moves_and_revives_no_code() -> None:
    codes = torch.eye(4)[:3]
    vae = started(codes, revive_after_steps=1)
    nothing = torch.full((5, 4), float("nan"))
    vae.update_codebook(nothing, torch.zeros(5, dtype=torch.int64))
    assert torch.equal(vae.codebook.weight, codes)


def test_a_new_codebook_is_of_unit_length_and_ours_are_the_published_defaults() -> None:
    lengths = model().codebook.weight.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(12))
    assert DiscreteVAEConfig() == DiscreteVAEConfig(112, 8192, 16, 128, 3, "vq", 0.95, 20, 0.9)


@pytest.mark.parametrize("config", [TINY, GUMBEL])
def test_parts_of_a_batch_move_the_codebook_as_the_whole_does(config: DiscreteVAEConfig) -> None:
    """Gumbel's is moved by its gradient alone."""
    whole = model(config).train()
    parts = copy.deepcopy(whole)
    x = pictures(4, 3, 16, 16)
    before = whole.codebook.weight.clone()
    torch.manual_seed(0)
    whole(x)
    outputs = [parts(part, moves_codebook=False) for part in x.split(2)]
    assert torch.equal(parts.codebook.weight, before)
    torch.manual_seed(0)
    directions, token_ids = (
        torch.cat([getattr(output, name) for output in outputs]) for name in ("directions", "token_ids")
    )
    parts.update_codebook(directions, token_ids)
    torch.testing.assert_close(parts.codebook.weight, whole.codebook.weight)
    assert torch.equal(before, whole.codebook.weight) == (config is GUMBEL)


def test_the_directions_are_counted_in_float32_under_autocast() -> None:
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = model().directions(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 3, 3))


def test_the_pull_of_a_code_does_not_depend_on_how_many_points_it_was_given() -> None:
    def moved(copies: int) -> Tensor:
        vae = started(torch.eye(4)[:3])
        given = torch.tensor([[0.8, 0.6, 0.0, 0.0]]).repeat(copies, 1)
        vae.update_codebook(given, vae.nearest(given))
        return vae.codebook.weight[0].clone()

    torch.testing.assert_close(moved(1), moved(50))


@pytest.mark.parametrize("revive_after_steps", [1, 5])
def test_a_code_unused_for_so_many_steps_takes_the_place_of_a_point(revive_after_steps: int) -> None:
    far = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    vae = started(far, revive_after_steps=revive_after_steps)
    given = F.normalize(torch.tensor([[1.0, 0.1, 0.0, 0.0], [1.0, 0.0, 0.2, 0.0]]), dim=-1)
    for step in range(1, revive_after_steps + 1):
        assert torch.equal(vae.codebook.weight[0], far[0])
        vae.update_codebook(given, vae.nearest(given))
        assert vae.unused_steps[0] == step % revive_after_steps
    assert any(torch.equal(vae.codebook.weight[0], point) for point in given)
    assert vae.unused_steps.tolist() == [0, 0]


def test_codes_are_never_revived_when_told_so() -> None:
    far = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    vae = started(far, revive_after_steps=0)
    given = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    for _ in range(30):
        vae.update_codebook(given, vae.nearest(given))
    assert torch.equal(vae.codebook.weight, far)
    assert vae.unused_steps.tolist() == [30, 0]


def test_more_idle_codes_than_points_are_revived_over_several_steps() -> None:
    vae = started(directions(40, 4), revive_after_steps=1)
    before = vae.codebook.weight.clone()
    given = directions(3, 4, seed=2)
    vae.update_codebook(given, vae.nearest(given))
    in_place = (vae.codebook.weight == before).all(dim=-1)
    assert 40 - 6 <= int(in_place.sum()) <= 40 - 4  # 1 to 3 used ones moved, 3 idle ones revived


def test_codes_stay_of_unit_length_and_the_training_moves_them() -> None:
    vae = model(replace(TINY, revive_after_steps=2)).train()
    seen = []
    for seed in range(6):
        vae(pictures(2, 3, 16, 16, seed=seed))
        seen.append(vae.codebook.weight.clone())
        lengths = vae.codebook.weight.norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones(12), atol=1e-6, rtol=0)
    assert not torch.equal(seen[0], seen[-1])


def test_no_gradient_reaches_the_codebook() -> None:
    vae = model().train()
    vae(pictures(2, 3, 16, 16)).loss.backward()
    assert vae.codebook.weight.grad is None
    assert all(p.grad is not None for p in (*vae.encoder.parameters(), *vae.decoder.parameters()))


def test_gradients_go_straight_through_the_quantiser() -> None:
    vae = model()
    vae(pictures(4, 3, 16, 16))
    vae.eval()
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, 3, 3, generator=generator)
    upstream = torch.randn(2, 4, 3, 3, generator=generator)
    through, direct = z.clone().requires_grad_(), z.clone().requires_grad_()
    codes, ids, _ = vae.quantise_vq(through)
    (codes * upstream).sum().backward()
    (vae.directions(direct).permute(0, 3, 1, 2) * upstream).sum().backward()
    torch.testing.assert_close(through.grad, direct.grad)
    torch.testing.assert_close(codes, vae.codebook.weight[ids].permute(0, 3, 1, 2))


# --- Our own: the published quantiser ------------------------------------------------------------


def test_gumbel_codes_are_the_softmax_of_logits_and_noise_over_the_temperature() -> None:
    vae = model(replace(GUMBEL, temperature=0.5))
    z = torch.randn(2, 12, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    codes, ids, _ = vae.train().quantise_gumbel(z)
    torch.manual_seed(4)
    noise = -torch.empty_like(z).exponential_().log()
    weights = ((z + noise) / 0.5).softmax(dim=1)
    expected = torch.einsum("bvhw,vk->bkhw", weights, vae.codebook.weight)
    torch.testing.assert_close(codes, expected)
    assert torch.equal(ids, z.argmax(dim=1))


def test_in_evaluation_gumbel_gives_the_likeliest_code_itself() -> None:
    vae = model(GUMBEL).eval()
    z = torch.randn(2, 12, 3, 3, generator=torch.Generator().manual_seed(1))
    codes, ids, directions = vae.quantise_gumbel(z)
    assert torch.equal(codes, vae.codebook.weight[z.argmax(dim=1)].permute(0, 3, 1, 2))
    assert torch.equal(ids, z.argmax(dim=1))
    assert directions.shape == (2, 3, 3, 0)


def test_a_step_with_the_gumbel_quantiser_lowers_the_loss_and_reaches_every_weight() -> None:
    vae = model(GUMBEL).train()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    x = pictures(4, 3, 16, 16)

    def loss() -> Tensor:
        torch.manual_seed(5)  # the same noise
        return vae(x).loss

    before = loss()
    before.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    optimiser.step()
    assert loss().item() < before.item()


def test_a_few_steps_with_the_vq_quantiser_lower_the_reconstruction_error() -> None:
    vae = model(replace(TINY, hidden_dim=16)).train()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    colours = pictures(8, 3, 1, 1).expand(8, 3, 16, 16)  # plain pictures: a code each is enough
    errors = []
    for _ in range(80):
        out = vae(colours)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
        errors.append(out.loss.item())
    assert errors[-1] < errors[0] / 4


def test_pixel_targets_are_a_patchs_pixels_without_mean_and_deviation() -> None:
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    targets = PixelTargets().encode(images)
    assert targets.shape == (2, 2, 3, 192)
    patch = images[1, :, 8:16, 16:24].flatten().double()
    expected = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    torch.testing.assert_close(targets[1, 1, 2].double(), expected, atol=1e-5, rtol=1e-5)
    assert (PixelTargets().encode(torch.full((1, 3, 8, 8), 0.3)).abs() < 1e-3).all()
    with pytest.raises(ValueError, match="no tokens to draw"):
        PixelTargets().decode(torch.zeros(1, 1, 1, dtype=torch.int64))


def test_a_flat_patch_is_raised_no_more_than_maes_epsilon_allows() -> None:
    """1e-6 under the root: contrast of one level in 255 is still told."""
    images = torch.full((1, 3, 8, 8), 0.5)
    images[0, :, ::2] += 1 / 255
    targets = PixelTargets().encode(images)
    variance = images.var().item()
    assert targets.std().item() == pytest.approx((variance / (variance + 1e-6)) ** 0.5, rel=1e-3)


def test_pixel_targets_are_drawn_with_the_mean_and_deviation_of_their_patch() -> None:
    """True targets give the picture; a guess of nothing gives each patch's mean, one of twice the
    contrast twice the distance from it."""
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    pixels = PixelTargets()
    targets = pixels.encode(images)
    torch.testing.assert_close(pixels.draw(targets, images), images, atol=1e-5, rtol=0)
    mean = pixels.draw(torch.zeros_like(targets), images)
    assert mean[1, :, 8:16, 16:24].unique().item() == pytest.approx(images[1, :, 8:16, 16:24].mean())
    expected = (2 * images - mean).clamp(0, 1)
    torch.testing.assert_close(pixels.draw(2 * targets, images), expected, atol=1e-5, rtol=0)
    strong = 5 * images - 4 * mean
    assert strong.min() < 0
    assert strong.max() > 1
    torch.testing.assert_close(pixels.draw(5 * targets, images), strong.clamp(0, 1), atol=1e-5, rtol=0)
