"""Logits and gradients on random weights, against the BEiT of transformers (an optional package)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beit.model import Beit, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

transformers = pytest.importorskip("transformers", minversion="5.0")

CONFIG = BeitConfig(
    img_size=48, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=9, layer_norm_eps=1e-6
)
SHARED = CONFIG.for_pretraining(vocab_size=40)
PLAIN = replace(CONFIG, rel_pos_bias="none", use_abs_pos_emb=True, init_values=0.0, pooling="cls")
PLAIN_SHARED = PLAIN.for_pretraining(vocab_size=40)

# Their names of ours, in this order; {i} is the block.
NAMES = {
    "patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
    "pos_embed": "beit.embeddings.position_embeddings",
    "cls_token": "beit.embeddings.cls_token",
    "mask_token": "beit.embeddings.mask_token",
    "rel_pos_bias": "beit.shared_position_bias",
    "blocks": "beit.layers",
    "attn.relative_position_bias_table": "relative_position_bias.relative_position_bias_table",
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.proj": "attention.o_proj",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "fc_norm": "beit.pooler.layernorm",
    "head": "classifier",
}


def their_state(state: dict[str, Tensor], masked: bool) -> dict[str, Tensor]:
    """Our weights, or gradients, under the names of transformers."""
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("norm."):  # the masked model has its norm beside the encoder
            theirs[("" if masked else "beit.") + name.replace("norm", "layernorm")] = value
            continue
        for ours, their in NAMES.items():
            if name.startswith(ours) or f".{ours}" in name:
                name = name.replace(ours, their, 1)
        if "attn.qkv.weight" in name:
            parts = value.chunk(3)  # query, key, value
            for letter, part in zip("qkv", parts, strict=True):
                theirs[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            theirs[name] = value
    return theirs


def pair(config: BeitConfig) -> tuple[Beit, nn.Module]:
    """Ours and theirs with the same random weights: no zero table, no zero token, no equal gammas."""
    masked = config.use_mask_token
    ours = (BeitForMaskedImageModeling if masked else BeitForImageClassification)(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            spread = 2 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5
            if name.endswith("relative_position_bias_table"):
                spread = 1.0
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    their_config = transformers.BeitConfig(
        image_size=config.img_size,
        patch_size=config.patch_size,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=int(config.mlp_ratio * config.embed_dim),
        layer_norm_eps=config.layer_norm_eps,
        layer_scale_init_value=config.init_values,
        use_mask_token=masked,
        use_absolute_position_embeddings=config.use_abs_pos_emb,
        use_relative_position_bias=config.rel_pos_bias == "per_block",
        use_shared_relative_position_bias=config.rel_pos_bias == "shared",
        # Their masked model normalises twice unless its encoder believes that it pools the mean.
        use_mean_pooling=masked or config.pooling == "mean",
        vocab_size=config.vocab_size,
        num_labels=config.num_classes,
        attn_implementation="sdpa",  # their other one rounds the softmax to float32
    )
    kind = "BeitForMaskedImageModeling" if masked else "BeitForImageClassification"
    theirs = getattr(transformers, kind)(their_config).eval()
    theirs.load_state_dict(their_state(ours.state_dict(), masked))
    return ours, theirs


def images() -> Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def mask() -> Tensor:
    return torch.rand(3, 36, generator=torch.Generator().manual_seed(3)) < 0.4


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="bias-per-block-mean-pooling"),
        pytest.param(replace(CONFIG, pooling="cls"), id="bias-per-block-cls-pooling"),
        pytest.param(replace(CONFIG, init_values=0.0), id="no-layer-scale"),
        pytest.param(replace(CONFIG, rel_pos_bias="shared"), id="shared-bias"),
        pytest.param(PLAIN, id="absolute-positions-cls-pooling"),
        pytest.param(replace(CONFIG, layer_norm_eps=1e-2), id="another-epsilon"),
    ],
)
@torch.no_grad()
def test_class_logits_match_transformers(config: BeitConfig) -> None:
    ours, theirs = pair(config)
    logits: Any = theirs(images()).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(ours(images()), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [pytest.param(SHARED, id="shared-bias"), pytest.param(PLAIN_SHARED, id="absolute-positions")],
)
@torch.no_grad()
def test_masked_logits_match_transformers(config: BeitConfig) -> None:
    ours, theirs = pair(config)
    logits: Any = theirs(images(), bool_masked_pos=mask()).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(ours(images(), mask()), logits[mask()], atol=1e-5, rtol=0)
    logits = theirs(images()).logits
    torch.testing.assert_close(ours(images()), logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_at_another_size_match_transformers() -> None:
    ours, theirs = pair(PLAIN)
    x = torch.randn(2, 3, 64, 40, generator=torch.Generator().manual_seed(4))
    logits: Any = theirs(x).logits
    torch.testing.assert_close(ours(x), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="classifier"),
        pytest.param(PLAIN, id="plain-classifier"),
        pytest.param(SHARED, id="masked"),
    ],
)
def test_gradients_match_transformers_in_float64(config: BeitConfig) -> None:
    ours, theirs = (model.double() for model in pair(config))
    x = images().double()
    if config.use_mask_token:
        labels = torch.arange(int(mask().sum())) % config.vocab_size
        loss = nn.functional.cross_entropy(ours(x, mask()), labels)
        their_loss: Any = theirs(x, bool_masked_pos=mask(), labels=labels).loss
    else:
        labels = torch.tensor([1, 0, 4])
        loss = nn.functional.cross_entropy(ours(x), labels)
        their_loss = theirs(x, labels=labels).loss
    torch.testing.assert_close(loss, their_loss, atol=1e-12, rtol=1e-12)
    loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    converted = their_state(gradients, config.use_mask_token)
    assert converted.keys() == expected.keys()
    for name, gradient in converted.items():
        difference = (gradient - expected[name]).norm()
        assert difference <= 1e-10 * expected[name].norm(), name
        assert gradient.any(), name
