"""Two questions about tokenizers: how fast DALL-E's encodes, and what to teach VQ-KD without a teacher.

    python benchmarks/visual_tokens.py speed
    python benchmarks/visual_tokens.py targets DATA --arm pixels own_average clusters

`targets` trains a small tokenizer on one target (or our dVAE), pre-trains `beit_mini_patch8_32` on its
tokens, and probes that: everything equal but the target. `clusters` has no tokenizer: its tokens are
clusters of what the running average of the model in training says of the whole picture. DATA has train/
and val/ pictures with classes; they are kept in memory at 64 pixels, and crops have 48. Times are of the
processor.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit.checkpoints import load_model
from beit.commands.train_tokenizer import model_features
from beit.data import ImageSource, epoch_order, open_source
from beit.image import ImageSpec, resize_and_crop
from beit.masking import sample_mask
from beit.metrics import codebook_use
from beit.model import Beit, BeitForMaskedImageModeling, variant
from beit.optim import EMA, adamw, cosine_schedule, param_groups
from beit.probe import fit_best_probe
from beit.tokenizer import (
    DalleConfig,
    DalleTokenizer,
    DiscreteVAE,
    DiscreteVAEConfig,
    nearest_codes,
    pick_directions,
    revive_codes,
    update_codes,
)
from beit.vqkd import KMEANS_ITERATIONS, VQKD, VQKDConfig, patch_pixels, patch_tokens

KEPT, SIZE, PATCH, BATCH = 64, 48, 8, 64  # pixels, pixels, pixels, pictures


# --- How fast DALL-E's dVAE encodes ---------------------------------------------------------------


def speed() -> None:
    """Milliseconds a picture at 112 pixels, least of four batches of four; the weights are random."""
    images = torch.rand(4, 3, 112, 112)

    def new() -> DalleTokenizer:
        torch.manual_seed(0)
        return DalleTokenizer(DalleConfig(), with_decoder=False).eval()

    plain, last = new(), new().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compiled = new()
    compiled.encoder = torch.compile(compiled.encoder)  # type: ignore[assignment]
    expected = plain.encode(images)

    def bf16() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain.encode(images)

    ways: dict[str, Callable[[], Tensor]] = {
        "as it is": lambda: plain.encode(images),
        "channels last": lambda: last.encode(images),
        "compiled": lambda: compiled.encode(images),
        "bf16 autocast": bf16,
        "use_float16": lambda: new().use_float16().encode(images),
    }
    for name, encode in ways.items():
        same = (encode() == expected).float().mean().item()
        times = []
        for _ in range(1 if name == "use_float16" else 4):
            began = time.process_time()
            encode()
            times.append(time.process_time() - began)
        print(f"{name}: {min(times) / len(images) * 1000:.0f} ms, {same:.1%} of the tokens", flush=True)


# --- What to teach without a teacher --------------------------------------------------------------


def pixels(images: Tensor) -> Tensor:
    """What `--teacher none` is."""
    return patch_pixels(images, PATCH)


def normed_pixels(images: Tensor) -> Tensor:
    """MAE's: each patch of mean 0 and variance 1."""
    return F.layer_norm(pixels(images), (3 * PATCH**2,), eps=1e-3)


def gradients(images: Tensor) -> Tensor:
    """Of each quarter of a patch the square root of its mean gradient in 8 directions; all 32 together
    of mean 0 and variance 1, less where a patch is flat."""
    grey = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    angles = torch.arange(8) * (math.pi / 4)
    directed = F.relu(angles.cos()[:, None, None] * across + angles.sin()[:, None, None] * down)
    quarters = F.pixel_unshuffle(F.avg_pool2d(directed, PATCH // 2), 2).flatten(2).mT
    return F.layer_norm(quarters.sqrt(), (32,), eps=1e-3)


def gradients_colours(images: Tensor) -> Tensor:
    """Gradients, and the mean colour of each quarter; both weigh the same."""
    colours = F.pixel_unshuffle(F.avg_pool2d((images - 0.45) / 0.27, PATCH // 2), 2).flatten(2).mT
    return torch.cat([gradients(images) / 32**0.5, colours / 12**0.5], dim=-1)


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels": pixels,
    "normed_pixels": normed_pixels,
    "gradients": gradients,
    "gradients_colours": gradients_colours,
}


LATE = 10_000  # a step at which an average has its whole decay; these have it from the first on


class OwnAverage:
    """Pixels, and what the running average of the tokenizer's own encoder says of them; both weigh the
    same. Pixels alone keep it from saying one thing of all."""

    def __init__(self, tokenizer: VQKD) -> None:
        self.encoder = copy.deepcopy(tokenizer.encoder).requires_grad_(False).eval()
        self.average = EMA(tokenizer.encoder, decay=0.99)

    def __call__(self, images: Tensor) -> Tensor:
        said = patch_tokens(self.encoder, 2 * images - 1)
        features = F.normalize(F.layer_norm(said, said.shape[-1:]), dim=-1)
        return torch.cat([F.normalize(pixels(images), dim=-1), features], dim=-1)

    def update(self, tokenizer: VQKD) -> None:
        """Follow the encoder after a step."""
        self.average.update(tokenizer.encoder, LATE)
        self.average.copy_to(self.encoder)


class OnlineClusters:
    """Tokens without a tokenizer: the nearest of centres that follow what the running average of the
    model in training says of each patch, whole pictures seen (iBOT and CAPI do so, with other losses)."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.centres = torch.empty(0)
        self.unused_steps = torch.zeros(vocab_size, dtype=torch.int64)

    def follow(self, model: BeitForMaskedImageModeling) -> None:
        """Take a model to average."""
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.average = EMA(model, decay=0.996)

    def update(self, model: BeitForMaskedImageModeling) -> None:
        """Follow the model after a step."""
        self.average.update(model, LATE)
        self.average.copy_to(self.model)

    def directions(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] -> unit vectors (B, L, D) of layer 3. Without the mean of all patches, which
        would otherwise be most of each."""
        said = self.model.layers(2 * images - 1, [3])[0][:, 1:]
        said = F.layer_norm(said, said.shape[-1:])
        return F.normalize(said - said.mean(dim=(0, 1)), dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor, learn: bool = False) -> Tensor:
        """Token ids (B, h, w). If it is to learn, the centres move, and idle ones go elsewhere."""
        directions = self.directions(images)
        flat = directions.flatten(0, 1)
        if not len(self.centres):
            self.centres = pick_directions(flat, self.vocab_size)
            for _ in range(KMEANS_ITERATIONS):
                update_codes(self.centres, flat, nearest_codes(self.centres, flat), decay=0)
        token_ids = nearest_codes(self.centres, directions)
        if learn:
            counts = update_codes(self.centres, flat, token_ids.flatten(), decay=0.99)
            revive_codes(self.centres, self.unused_steps, counts, flat, 20)
        return token_ids.unflatten(1, (SIZE // PATCH, SIZE // PATCH))


class Pictures:
    """A source in memory, uint8 (n, KEPT, KEPT, 3)."""

    def __init__(self, source: ImageSource) -> None:
        spec = ImageSpec((KEPT, KEPT), crop_ratio=1.0)
        self.pixels = np.stack([resize_and_crop(source.read(i), spec) for i in range(len(source))])
        self.labels = torch.from_numpy(np.asarray(source.labels)).long()

    def batch(self, step: int, seed: int) -> Tensor:
        """Random crops, half of them mirrored: (BATCH, 3, SIZE, SIZE) in [0, 1]."""
        epoch, place = divmod(step, len(self.pixels) // BATCH)
        chosen = epoch_order(len(self.pixels), seed, epoch)[place * BATCH : (place + 1) * BATCH]
        rng = np.random.default_rng([seed, step])
        crops = []
        for i in chosen:
            top, left = rng.integers(0, KEPT - SIZE + 1, 2)
            crop = self.pixels[i, top : top + SIZE, left : left + SIZE]
            crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        return as_images(np.stack(crops))

    def centres(self) -> list[Tensor]:
        """All of them, cut in the middle, in batches."""
        edge = (KEPT - SIZE) // 2
        cut = self.pixels[:, edge : edge + SIZE, edge : edge + SIZE]
        return [as_images(part) for part in np.array_split(cut, len(cut) // BATCH)]


def as_images(array: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(array.copy()).permute(0, 3, 1, 2).float() / 255


def train_tokenizer(
    arm: str, teacher: Beit | None, vocab_size: int, steps: int, seed: int, train: Pictures
) -> DiscreteVAE | VQKD:
    """Our dVAE, or a VQ-KD with the encoder of `beit_mini_patch8_32` and one decoder block."""
    target = TARGETS.get(arm, pixels)
    if arm == "second_stage":
        if teacher is None:
            raise SystemExit("second_stage comes after another arm, or with --teacher")
        grid = (SIZE // PATCH, SIZE // PATCH)
        target = partial(model_features, teacher.eval().requires_grad_(False), grid)
    torch.manual_seed(seed)
    tokenizer: DiscreteVAE | VQKD
    if arm == "dvae":
        tokenizer = DiscreteVAE(DiscreteVAEConfig(SIZE, vocab_size, hidden_dim=32))
    else:
        width = target(torch.zeros(1, 3, SIZE, SIZE)).shape[-1]
        if arm == "own_average":
            width += 96
        sizes = VQKDConfig(SIZE, PATCH, 96, 4, 1, 4, vocab_size, 32, width, revive_after_steps=20)
        tokenizer = VQKD(sizes)
    own = OwnAverage(tokenizer) if arm == "own_average" and isinstance(tokenizer, VQKD) else None
    target = own or target
    optimizer = adamw([p for p in tokenizer.parameters() if p.requires_grad], 1e-3, (0.9, 0.99), 1e-4)
    tokenizer.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, steps, steps // 10, 1e-3, 1e-5)
        images = train.batch(step, seed)
        output = tokenizer(images) if arm == "dvae" else tokenizer(images, target(images))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if own and isinstance(tokenizer, VQKD):
            own.update(tokenizer)
    return tokenizer.eval()


def pretrain(
    tokenizer: DiscreteVAE | VQKD | OnlineClusters, steps: int, seed: int, train: Pictures
) -> tuple[BeitForMaskedImageModeling, float, float]:
    """A pre-trained model, and the loss and token accuracy of its last hundred steps."""
    torch.manual_seed(seed)
    config = variant("beit_mini_patch8_32").for_pretraining(tokenizer.vocab_size)
    model = BeitForMaskedImageModeling(replace(config, img_size=SIZE)).train()
    online = tokenizer if isinstance(tokenizer, OnlineClusters) else None
    if online:
        online.follow(model)
    optimizer = adamw(param_groups(model, 0.05), 3e-3)
    last: list[tuple[float, float]] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, steps, steps // 8, 3e-3, 1e-5)
        images, rng = train.batch(step, seed), np.random.default_rng([seed, step, 7])
        masks = torch.from_numpy(np.stack([sample_mask((6, 6), 14, rng, 3) for _ in images]))
        token_ids = online.encode(images, learn=True) if online else tokenizer.encode(images)
        targets = token_ids[masks]
        logits = model(2 * images - 1, masks)
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        if online:
            online.update(model)
        accuracy = (logits.argmax(dim=-1) == targets).float().mean().item()
        last = [*last[-99:], (loss.item(), accuracy)]
    mean_loss, accuracy = np.mean(last, axis=0)
    return model, float(mean_loss), float(accuracy)


@torch.no_grad()
def probe(model: Beit, train: Pictures, val: Pictures) -> dict[int, float]:
    """Accuracy of a linear probe on the mean patch of layers 3 and 4."""
    model.eval()

    def features(pictures: Pictures) -> list[Tensor]:
        states = [model.layers(2 * images - 1, [3, 4]) for images in pictures.centres()]
        return [torch.cat([layers[i][:, 1:].mean(dim=1) for layers in states]) for i in (0, 1)]

    held_out = torch.from_numpy(np.random.default_rng(0).random(len(train.labels)) < 0.2)
    found = {}
    for layer, seen, unseen in zip((3, 4), features(train), features(val), strict=True):
        fitting = seen[~held_out], train.labels[~held_out]
        choosing = seen[held_out], train.labels[held_out]
        with torch.enable_grad():
            best, _ = fit_best_probe(fitting, choosing, num_classes=int(train.labels.max()) + 1)
        found[layer] = best.accuracy(unseen, val.labels)
    return found


def targets(given: argparse.Namespace) -> None:
    """A JSON line an arm. `second_stage` has the model of the arm before it as its teacher."""
    train, val = (Pictures(open_source(given.data, split, labelled=True)) for split in ("train", "val"))
    model = load_model(given.teacher) if given.teacher else None
    for arm in given.arm:
        began = time.process_time()
        tokenizer: DiscreteVAE | VQKD | OnlineClusters
        if arm == "clusters":
            tokenizer = OnlineClusters(given.vocab_size)
        else:
            tokenizer = train_tokenizer(arm, model, given.vocab_size, given.steps, given.seed, train)
        row = {"arm": arm, "seed": given.seed, "tokenizer_cpu_s": time.process_time() - began}
        began = time.process_time()
        model, loss, accuracy = pretrain(tokenizer, given.pretrain_steps, given.seed, train)
        row |= {"loss": loss, "token_accuracy": accuracy, "pretrain_cpu_s": time.process_time() - began}
        token_ids = torch.cat([tokenizer.encode(images).flatten() for images in val.centres()])
        use = codebook_use(torch.bincount(token_ids, minlength=given.vocab_size).numpy())
        row |= {"live": use.live, "perplexity": use.perplexity}
        for layer, score in probe(model, train, val).items():
            row[f"probe_{layer}"] = score
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(rounded), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask = parser.add_subparsers(dest="what", required=True)
    ask.add_parser("speed")
    comparing = ask.add_parser("targets")
    comparing.add_argument("data")
    arms = ["dvae", "second_stage", "own_average", "clusters", *TARGETS]
    comparing.add_argument("--arm", choices=arms, nargs="+", required=True)
    comparing.add_argument("--teacher", default="", help="model folder, if second_stage comes first")
    comparing.add_argument("--vocab-size", type=int, default=1024)
    comparing.add_argument("--steps", type=int, default=400)
    comparing.add_argument("--pretrain-steps", type=int, default=1176)
    comparing.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "speed":
        speed()
    else:
        targets(given)


if __name__ == "__main__":
    main()
