"""Features of pictures: the states of chosen layers, pooled.

BEiT's most useful features lie in its middle: layer 9 of 12 in the base model, 14 of 24 in the large.

Shapes: n pictures, D width; a feature is float32 (n, D), or (n, 2D) for `both`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from beit.graphs import EmbedPooling, Output
from beit.image import Source, preprocess, read_image
from beit.model import Beit
from beit.precision import Precision, autocast

Pooling = Literal["mean", "cls", "both"]

IN_MEMORY_BYTES = 2 << 30  # of features; what is more lies in a temporary file


def default_layer(depth: int) -> int:
    """The layer to probe where none is named: the paper's 9 of 12 and 14 of 24, else three quarters."""
    return {12: 9, 24: 14}.get(depth, max(1, round(0.75 * depth)))


def pool_tokens(tokens: Tensor, pooling: Pooling) -> Tensor:
    """(B, 1 + L, D) -> (B, D): the mean of the patches, the class token, or both side by side."""
    if pooling == "mean":
        return tokens[:, 1:].mean(dim=1)
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "both":
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    raise ValueError(f"pooling {pooling!r} is not one of {', '.join(get_args(Pooling))}")


def embed(
    model: Beit, images: Tensor, pooling: EmbedPooling = "mean", layer: int | None = None
) -> Tensor:
    """What a model makes of normalised images (B, 3, H, W), as one tensor of its own dtype.

    pooling: "mean" of the patches or "cls", the class token: (B, D); "tokens", all: (B, 1 + L, D).
    layer: the states after that block, without a norm; 0 is the input, negative ones count from the end.
        None is the end: the last block and the model's last norm, so that a classifier's own pooling
        gives what its head gets.
    """
    Output("features", pooling, layer).check(model.config.depth)
    (states,) = model.layers(images, [model.config.depth if layer is None else layer])
    if layer is None:
        states = model.norm(states)  # nothing in a classifier from the mean, whose norm comes after it
    if pooling == "tokens":
        return states
    if pooling == "cls":
        return states[:, 0]
    mean = states[:, 1:].mean(dim=1)
    after = getattr(model, "fc_norm", None) if layer is None else None
    return mean if after is None else after(mean)


def pooled(features: Tensor, pooling: Pooling) -> Tensor:
    """The columns of `both` features (n, 2D) that are a pooling's."""
    width = features.shape[1] // 2
    return {"cls": features[:, :width], "mean": features[:, width:], "both": features}[pooling]


@torch.no_grad()
def layer_states(
    model: Beit, batches: Iterable[Tensor], layers: Sequence[int], precision: Precision = "auto"
) -> Iterator[list[Tensor]]:
    """The (B, 1 + L, D) float32 states of the layers for each batch (B, 3, H, W), on the model's device.

    The states are those of the blocks, without a norm. The model is put into evaluation mode.
    """
    model.eval()
    device = model.cls_token.device
    for images in batches:
        with autocast(precision, device):
            states = model.layers(images.to(device), layers)
        yield [state.float() for state in states]


def extract_features(
    model: Beit,
    batches: Iterable[Tensor],
    layers: list[int],
    pooling: Pooling = "mean",
    precision: Precision = "auto",
    count: int | None = None,
) -> dict[int, Tensor]:
    """Features of every batch of normalised images (B, 3, H, W), for all layers in one pass.

    count: pictures in all, where that is known: then features of more than 2 GiB are kept in a temporary
        file and memory stays small.
    Returns {layer: (n, D) float32 on the CPU}.
    """
    parts = (
        torch.stack([pool_tokens(state, pooling) for state in states], dim=1).cpu()
        for states in layer_states(model, batches, layers, precision)
    )
    if count is None:
        return dict(zip(layers, torch.cat(list(parts)).unbind(dim=1), strict=True))
    width = model.config.embed_dim * (2 if pooling == "both" else 1)
    features = storage((len(layers), count, width), torch.float32)
    place = 0
    for part in parts:
        features[:, place : place + len(part)] = part.transpose(0, 1)
        place += len(part)
    return dict(zip(layers, features, strict=True))


def storage(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor: in memory up to 2 GiB, else in a temporary file that goes with the process."""
    if np.prod(shape, dtype=np.int64) * dtype.itemsize <= IN_MEMORY_BYTES:
        return torch.empty(shape, dtype=dtype)
    kind = {torch.float32: np.float32, torch.float16: np.float16}[dtype]
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, dtype=kind, shape=shape))


class BeitFeatures:
    """A transformer in scikit-learn's sense: pictures in, features out, any estimator on top.

        make_pipeline(BeitFeatures(beit.load("beit_base_patch16_224_pt22k")), LogisticRegression())

    model: a loaded encoder or classifier; it is never trained, and clones share it.
    layer: block to read, counted from 1; 9 of 12, 14 of 24, else three quarters where None.
    pooling: mean of the patches, class token, or both.

    X is a sequence of paths, bytes, Pillow images or uint8 (H, W, 3) arrays. `transform` returns float32
    (n, D), or (n, 2D) for both, and raises BadImage for a picture that cannot be read.
    """

    def __init__(
        self,
        model: Beit,
        layer: int | None = None,
        pooling: Pooling = "mean",
        batch_size: int = 32,
        precision: Precision = "auto",
    ) -> None:
        self.model = model
        self.layer = layer
        self.pooling = pooling
        self.batch_size = batch_size
        self.precision = precision

    def fit(self, X: Sequence[Source], y: object = None) -> BeitFeatures:
        """Nothing is learned."""
        return self

    def transform(self, X: Sequence[Source]) -> np.ndarray:
        """Features of pictures, in their order."""
        model: object = self.model
        if not isinstance(model, Beit):
            raise ValueError(f"model {model!r} is not a loaded one: BeitFeatures(beit.load({model!r}))")
        if not len(X):
            raise ValueError("no pictures to take features of; give a list of one or more")
        layer = default_layer(self.model.config.depth) if self.layer is None else self.layer
        chunks = (X[begin : begin + self.batch_size] for begin in range(0, len(X), self.batch_size))
        batches = (
            torch.from_numpy(np.stack([preprocess(read_image(x), self.model.image_spec) for x in chunk]))
            for chunk in chunks
        )
        return extract_features(self.model, batches, [layer], self.pooling, self.precision)[
            layer
        ].numpy()

    def fit_transform(self, X: Sequence[Source], y: object = None) -> np.ndarray:
        """The same as `transform`."""
        return self.transform(X)

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """ "beit0", "beit1", ..."""
        width = self.model.config.embed_dim * (2 if self.pooling == "both" else 1)
        return np.array([f"beit{i}" for i in range(width)], dtype=object)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments it was made with."""
        return {name: getattr(self, name) for name in ("model", *_SETTINGS)}

    def set_params(self, **params: Any) -> BeitFeatures:
        """Change arguments by name. Raises ValueError for one that does not exist."""
        for name, value in params.items():
            if name not in ("model", *_SETTINGS):
                raise ValueError(
                    f"BeitFeatures has no parameter {name!r}; it has model, {', '.join(_SETTINGS)}"
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        return f"BeitFeatures({type(self.model).__name__}, {settings})"

    def __sklearn_clone__(self) -> BeitFeatures:
        return BeitFeatures(**self.get_params())

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=[]),
            requires_fit=False,
            input_tags=InputTags(two_d_array=False, string=True),
        )


_SETTINGS = ("layer", "pooling", "batch_size", "precision")
