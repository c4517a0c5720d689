"""BEiT vision transformers: tokenizers, masked pre-training, fine-tuning, probes, classification.

The public names; each is imported when it is first used, so that `import beit` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beit.checkpoints import load, load_model, save
    from beit.engine import Engine, Prediction
    from beit.features import BeitFeatures, extract_features
    from beit.handover import LoadReport, to_classifier
    from beit.image import BadImage, ImageSpec, preprocess, read_image
    from beit.masking import sample_mask
    from beit.model import (
        VARIANTS,
        Beit,
        BeitConfig,
        BeitForImageClassification,
        BeitForMaskedImageModeling,
    )
    from beit.tokenizer import (
        DalleConfig,
        DalleTokenizer,
        DiscreteVAE,
        DiscreteVAEConfig,
        Tokenizer,
    )
    from beit.tokenizer_files import load_tokenizer, save_tokenizer
    from beit.vqkd import VQKD, VQKDConfig
    from beit.weight_files import CheckpointError

__version__ = version("beit")

_PLACES = {
    "beit.checkpoints": ("load", "load_model", "save"),
    "beit.engine": ("Engine", "Prediction"),
    "beit.features": ("BeitFeatures", "extract_features"),
    "beit.handover": ("LoadReport", "to_classifier"),
    "beit.image": ("BadImage", "ImageSpec", "preprocess", "read_image"),
    "beit.masking": ("sample_mask",),
    "beit.model": (
        "VARIANTS", "Beit", "BeitConfig", "BeitForImageClassification", "BeitForMaskedImageModeling",
    ),
    "beit.tokenizer": ("DalleConfig", "DalleTokenizer", "DiscreteVAE", "DiscreteVAEConfig", "Tokenizer"),
    "beit.tokenizer_files": ("load_tokenizer", "save_tokenizer"),
    "beit.vqkd": ("VQKD", "VQKDConfig"),
    "beit.weight_files": ("CheckpointError",),
}  # fmt: skip
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "VARIANTS",
    "VQKD",
    "BadImage",
    "Beit",
    "BeitConfig",
    "BeitFeatures",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "CheckpointError",
    "DalleConfig",
    "DalleTokenizer",
    "DiscreteVAE",
    "DiscreteVAEConfig",
    "Engine",
    "ImageSpec",
    "LoadReport",
    "Prediction",
    "Tokenizer",
    "VQKDConfig",
    "__version__",
    "extract_features",
    "load",
    "load_model",
    "load_tokenizer",
    "preprocess",
    "read_image",
    "sample_mask",
    "save",
    "save_tokenizer",
    "to_classifier",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'beit' has no attribute {name!r}")
    return getattr(import_module(_PLACE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
