"""Names of models: short names and hub ids become local files; classes become words.

Only what is typed as `hub:owner/name` or as a released model's short name is ever downloaded, by
huggingface-hub, which caches and resumes; a path never touches the network. Nothing here imports torch.

Sources: the release notes and papers of BEiT and BEiT v2; ImageNet's synsets with WordNet's names.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from beit.atomic import not_there


class HubError(ValueError):
    """A model that cannot be found or fetched: why, and what to type next."""

    exit_code = 5


# --- Released models -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Released:
    """A published checkpoint, as its authors describe it. None is "not published", never a guess."""

    name: str
    """The published file's name without .pth, or the hub folder's where there is no such file."""
    task: str
    """masked-image, classification, segmentation, tokenizer or features."""
    img_size: int
    release: str | None = None
    """Tag of the GitHub release that holds the file."""
    hub: str | None = None
    """Folder on the hub that is downloaded for this name."""
    also: tuple[str, ...] = ()
    """Other hub folders with the same weights."""
    num_classes: int | None = None
    num_parameters: int | None = None
    """Heads included, index buffers not; those of segmentation models to the million."""
    top1: float | None = None
    """ImageNet-1k top-1 of the authors, percent."""
    miou: float | None = None
    """ADE20k mIoU of the authors, single scale, percent."""
    licence: str | None = "MIT"
    """Of the authors' file; timm marks its copies apache-2.0."""
    num_bytes: int | None = None
    sha256: str | None = None
    """Of the authors' file: all of it or, where no more is published, the first 8 hex digits."""

    @property
    def url(self) -> str | None:
        """Where the authors' file is; for people, as nothing here downloads it."""
        if self.release is None:
            return None
        return f"https://github.com/addf400/files/releases/download/{self.release}/{self.name}.pth"


MIM, CLS, SEG, VQ = "masked-image", "classification", "segmentation", "tokenizer"
V1, V2 = "v1.0", "BEiT-v2"

# fmt: off
_ROWS = (
    # BEiT: pre-trained on ImageNet-22k without labels, then fine-tuned with them on 22k, 1k or ADE20k.
    Released("beit_base_patch16_224_pt22k", MIM, 224, V1, "microsoft/beit-base-patch16-224-pt22k",
             num_parameters=91_965_776),
    Released("beit_base_patch16_224_pt22k_ft22k", CLS, 224, V1,
             "microsoft/beit-base-patch16-224-pt22k-ft22k", ("timm/beit_base_patch16_224.in22k_ft_in22k",),
             num_classes=21841, num_parameters=102_557_713),
    Released("beit_base_patch16_224_pt22k_ft1k", CLS, 224, V1,
             num_classes=1000, num_parameters=86_530_984, top1=83.7),
    Released("beit_base_patch16_224_pt22k_ft22kto1k", CLS, 224, V1,
             "microsoft/beit-base-patch16-224", ("timm/beit_base_patch16_224.in22k_ft_in22k_in1k",),
             num_classes=1000, num_parameters=86_530_984, top1=85.2, num_bytes=176_830_615,
             sha256="9370c265f91e2da137926b2662f12aa4010b42120a28db70bc2bfda7aa9106a9"),
    Released("beit_base_patch16_384_pt22k_ft22kto1k", CLS, 384, V1,
             "microsoft/beit-base-patch16-384", ("timm/beit_base_patch16_384.in22k_ft_in22k_in1k",),
             num_classes=1000, num_parameters=86_744_104, top1=86.8),
    Released("beit_large_patch16_224_pt22k", MIM, 224, V1, "microsoft/beit-large-patch16-224-pt22k",
             num_parameters=311_534_016),
    Released("beit_large_patch16_224_pt22k_ft22k", CLS, 224, V1,
             "microsoft/beit-large-patch16-224-pt22k-ft22k",
             ("timm/beit_large_patch16_224.in22k_ft_in22k",),
             num_classes=21841, num_parameters=325_792_593),
    Released("beit_large_patch16_224_pt22k_ft1k", CLS, 224, V1,
             num_classes=1000, num_parameters=304_430_568, top1=86.0),
    Released("beit_large_patch16_224_pt22k_ft22kto1k", CLS, 224, V1,
             "microsoft/beit-large-patch16-224", ("timm/beit_large_patch16_224.in22k_ft_in22k_in1k",),
             num_classes=1000, num_parameters=304_430_568, top1=87.4),
    Released("beit_large_patch16_384_pt22k_ft22kto1k", CLS, 384, V1,
             "microsoft/beit-large-patch16-384", ("timm/beit_large_patch16_384.in22k_ft_in22k_in1k",),
             num_classes=1000, num_parameters=304_998_888, top1=88.4),
    Released("beit_large_patch16_512_pt22k_ft22kto1k", CLS, 512, V1,
             "microsoft/beit-large-patch16-512", ("timm/beit_large_patch16_512.in22k_ft_in22k_in1k",),
             num_classes=1000, num_parameters=305_674_728, top1=88.6),
    Released("beit_base_patch16_640_pt22k_ft22ktoade20k", SEG, 640, V1,
             "microsoft/beit-base-finetuned-ade-640-640",
             num_classes=150, num_parameters=163_000_000, miou=53.6),
    Released("beit_large_patch16_640_pt22k_ft22ktoade20k", SEG, 640, V1,
             "microsoft/beit-large-finetuned-ade-640-640",
             num_classes=150, num_parameters=441_000_000, miou=56.7),
    # The paper's plain ViT, pre-trained on ImageNet-1k: absolute positions, no LayerScale.
    Released("beit_base_patch16_224_pt1k_800ep", MIM, 224, V1, num_parameters=92_089_856),
    # BEiT v2: pre-trained on ImageNet-1k, 300 or 1600 epochs.
    Released("beitv2_base_patch16_224_pt1k_300e", MIM, 224, V2, num_parameters=106_143_056),
    Released("beitv2_base_patch16_224_pt1k_300e_ft1k", CLS, 224, V2,
             num_classes=1000, num_parameters=86_530_984, top1=85.0),
    Released("beitv2_base_patch16_224_pt1k", MIM, 224, V2, num_parameters=106_143_056),
    Released("beitv2_base_patch16_224_pt1k_ft1k", CLS, 224, V2,
             "timm/beitv2_base_patch16_224.in1k_ft_in1k",
             num_classes=1000, num_parameters=86_530_984, top1=85.5),
    Released("beitv2_base_patch16_224_pt1k_ft21k", CLS, 224, V2,
             "timm/beitv2_base_patch16_224.in1k_ft_in22k",
             num_classes=21841, num_parameters=102_557_713),
    Released("beitv2_base_patch16_224_pt1k_ft21kto1k", CLS, 224, V2,
             "timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k",
             num_classes=1000, num_parameters=86_530_984, top1=86.5),
    Released("beitv2_base_patch16_224_pt1k_ftade20k", SEG, 512, V2,
             num_classes=150, num_parameters=163_000_000, miou=53.1),
    Released("beitv2_base_patch16_224_pt1k_ft21ktoade20k", SEG, 512, V2,
             num_classes=150, num_parameters=163_000_000, miou=53.5),
    Released("beitv2_large_patch16_224_pt1k_300e", MIM, 224, V2, num_parameters=336_728_512),
    Released("beitv2_large_patch16_224_pt1k_300e_ft1k", CLS, 224, V2,
             num_classes=1000, num_parameters=304_430_568, top1=86.6),
    Released("beitv2_large_patch16_224_pt1k", MIM, 224, V2, num_parameters=336_728_512),
    Released("beitv2_large_patch16_224_pt1k_ft1k", CLS, 224, V2,
             "timm/beitv2_large_patch16_224.in1k_ft_in1k",
             num_classes=1000, num_parameters=304_430_568, top1=87.3),
    Released("beitv2_large_patch16_224_pt1k_ft21k", CLS, 224, V2,
             "timm/beitv2_large_patch16_224.in1k_ft_in22k",
             num_classes=21841, num_parameters=325_792_593),
    Released("beitv2_large_patch16_224_pt1k_ft21kto1k", CLS, 224, V2,
             "timm/beitv2_large_patch16_224.in1k_ft_in22k_in1k",
             num_classes=1000, num_parameters=304_430_568, top1=88.4),
    Released("beitv2_large_patch16_224_pt1k_ftade20k", SEG, 512, V2,
             num_classes=150, num_parameters=441_000_000, miou=56.7),
    Released("beitv2_large_patch16_224_pt1k_ft21ktoade20k", SEG, 512, V2,
             num_classes=150, num_parameters=441_000_000, miou=57.5),
    # BEiT v2's tokenizers; the hash is the end of the name.
    Released("vqkd_encoder_base_decoder_1x768x12_clip-d93179da", VQ, 224, V2,
             num_parameters=94_655_008, sha256="d93179da"),
    Released("vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7", VQ, 224, V2,
             num_parameters=108_829_216, sha256="d5036aa7"),
    Released("vqkd_encoder_base_decoder_1x768x12_dino-663c55d7", VQ, 224, V2, sha256="663c55d7"),
    # Relatives that are BEiTs inside: DiT (pages of documents), data2vec-vision.
    Released("dit-base", MIM, 224, hub="microsoft/dit-base"),
    Released("dit-large", MIM, 224, hub="microsoft/dit-large"),
    Released("dit-base-finetuned-rvlcdip", CLS, 224, hub="microsoft/dit-base-finetuned-rvlcdip",
             num_classes=16),
    Released("dit-large-finetuned-rvlcdip", CLS, 224, hub="microsoft/dit-large-finetuned-rvlcdip",
             num_classes=16),
    Released("data2vec-vision-base", "features", 224, hub="facebook/data2vec-vision-base", licence=None),
    Released("data2vec-vision-base-ft1k", CLS, 224, hub="facebook/data2vec-vision-base-ft1k",
             num_classes=1000, licence=None),
    Released("data2vec-vision-large", "features", 224, hub="facebook/data2vec-vision-large", licence=None),
    Released("data2vec-vision-large-ft1k", CLS, 224, hub="facebook/data2vec-vision-large-ft1k",
             num_classes=1000, licence=None),
)
# fmt: on
RELEASED: dict[str, Released] = {row.name: row for row in _ROWS}

# What may be typed -> hub folder: short names, and the last parts of the ids.
_FOLDERS: dict[str, str | None] = {
    **{hub.partition("/")[2]: hub for row in _ROWS for hub in (row.hub, *row.also) if hub},
    **{row.name: row.hub for row in _ROWS},
}

# Of `model.VARIANTS` the names, for those who do not wait for torch.
SIZES = (
    "beit_base_patch16_224", "beit_base_patch16_384", "beit_base_patch16_512",
    "beit_large_patch16_224", "beit_large_patch16_384", "beit_large_patch16_512",
    "beit_base_patch16_224_in22k", "beit_large_patch16_224_in22k", "beit_base_patch16_224_8k_vocab",
    "beit_large_patch16_224_8k_vocab", "beit_base_patch16_224_pt1k",
    "beit_base_patch16_224_pt1k_8k_vocab", "beit_large_patch16_224_pt1k_8k_vocab",
    "beitv2_base_patch16_224", "beitv2_large_patch16_224", "beitv2_base_patch16_224_in22k",
    "beitv2_large_patch16_224_in22k", "beitv2_base_patch16_224_8k_vocab",
    "beitv2_large_patch16_224_8k_vocab", "beit_small_patch16_224", "beit_tiny_patch16_224",
    "beit_tiny_patch8_64", "beit_mini_patch8_32",
)  # fmt: skip


# --- Names to files ------------------------------------------------------------------------------

# What is read of a folder: nothing else in it, such as a page or a graph, is of the model.
CONFIGS = ["config.json", "preprocessor_config.json"]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


def is_size(model: str) -> bool:
    """Whether a model is the name of a size, to begin from nothing; not a place or a released model."""
    return "/" not in model and not Path(model).exists() and not is_remote(model)


def is_remote(source: str) -> bool:
    """Whether `resolve` would look on the hub: `hub:...`, or a released name and no path of that name."""
    if source.startswith("hub:"):
        return True
    return not os.path.exists(source) and _FOLDERS.get(source.partition("@")[0]) is not None


def resolve(source: str, revision: str | None = None) -> Path:
    """The local file or folder that a model's name means; downloads it where it is a name of the hub.

    source: a path (stays one, and never touches the network); hub:owner/name[@revision]; a name that
        `beit models` lists, or the last part of its hub id, both with [@revision].
    revision: branch, tag or commit of a hub folder.

    Of a hub folder only the configs and the weights are fetched, safetensors if there are any. With
    BEIT_OFFLINE=1 or HF_HUB_OFFLINE=1 only what was downloaded before is used. A file that bears a
    released name and size must have the published sha256. Errors: HubError; ValueError for a request
    that makes no sense.
    """
    asked = source.startswith("hub:")
    if not asked and os.path.exists(source):
        if revision is not None:
            raise ValueError(
                f"{source} is a local path, which has no revision {revision}; leave that out"
            )
        _check_released(Path(source))
        return Path(source)
    name, _, at = source.removeprefix("hub:").partition("@")
    if at and revision is not None and at != revision:
        raise ValueError(f"{source} and revision {revision} are two revisions; give one")
    if name in _FOLDERS:
        folder = _FOLDERS[name]
        if folder is None:
            url = RELEASED[name].url
            raise HubError(f"{name} is not on the hub; download {url} by hand and give the file's path")
    elif not asked:
        raise HubError(_unknown(source))
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        folder = name
    else:
        raise ValueError(f"{source} must be hub:owner/name or hub:owner/name@revision")
    return _download(folder, at or revision)


def other_names() -> list[str]:
    """What a model may be called besides its size: released names, and files of the working folder."""
    return [*_FOLDERS, *sorted(os.listdir())]


def _unknown(source: str) -> str:
    if source in SIZES:
        trained = [name for name in RELEASED if name.startswith(source)]
        meant = f", such as {' or '.join(trained[:3])}" if trained else ""
        return (
            f"{source} is a size, which has no weights; give a model of `beit models`{meant}, or the "
            f"folder of a training: beit finetune DATA -m {source} -o RUN"
        )
    folder = os.path.dirname(source)
    if re.fullmatch(r"[\w-]+/[\w.-]+(@.+)?", source) and not os.path.isdir(folder):
        return f"{source} does not exist; for a folder of the hub write hub:{source}"
    if folder:
        return f"{not_there(source)} (`beit models` lists the released ones)"
    near = difflib.get_close_matches(source, other_names(), n=3)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{source} does not exist and is no released model's name; {meant}`beit models` lists them"


def _download(folder: str, revision: str | None) -> Path:
    place = _snapshot(folder, revision, [*CONFIGS, *SAFETENSORS])
    if not any(place.glob("model*.safetensors")):
        place = _snapshot(folder, place.name, PICKLES)  # the name is the commit: both calls see the same
    weights = [*place.glob("model*.safetensors"), *place.glob("pytorch_model*.bin")]
    if not (weights and (place / "config.json").exists()):
        where = f"what was downloaded of hub:{folder}" if is_offline() else f"hub:{folder}"
        next_step = "run once without --offline" if is_offline() else "give another, or a local path"
        raise HubError(
            f"{where} lacks config.json, or model.safetensors and pytorch_model.bin; {next_step}"
        )
    return place


def _snapshot(folder: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                folder, revision=revision, allow_patterns=list(patterns), local_files_only=is_offline()
            )
        )
    except Exception as error:  # what a network does wrong has no common base across HTTP clients
        disk = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)
        if isinstance(error, OSError) and error.errno in disk:
            raise
        raise HubError(_explain(error, folder, revision)) from error


def _explain(error: Exception, folder: str, revision: str | None) -> str:
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its home before 0.25
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{folder}"
    if isinstance(error, GatedRepoError):
        return f"{folder} is gated; accept its terms at {page}, then set HF_TOKEN to your token"
    if isinstance(error, RepositoryNotFoundError):
        return f"{page} does not exist or is private; check the name, or set HF_TOKEN to your token"
    if isinstance(error, RevisionNotFoundError):
        return f"{folder} has no revision {revision}; {page}/commits/main lists them"
    if is_offline() and isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        at = f" at {revision}" if revision else ""
        return (
            f"{folder}{at} has not been downloaded yet and the network is off; run once without "
            "--offline, BEIT_OFFLINE and HF_HUB_OFFLINE, or give a local path"
        )
    why = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"could not download {folder}: {why}; try again, what has arrived is kept, or give a local path"
    )


def is_offline() -> bool:
    """Whether BEIT_OFFLINE or HF_HUB_OFFLINE forbids the network; `--offline` sets the first."""
    given = (os.environ.get(name, "").upper() for name in ("BEIT_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value in ("1", "ON", "YES", "TRUE") for value in given)


def _check_released(file: Path) -> None:
    row = RELEASED.get(file.stem)
    if row is None or row.sha256 is None or not file.is_file():
        return
    if row.num_bytes is not None and row.num_bytes != file.stat().st_size:
        return  # an older release or somebody's own, and no broken copy of this one
    found = sha256_of(file)
    if not found.startswith(row.sha256):
        raise HubError(
            f"{file} has sha256 {found}, but {row.sha256} is published for that name; "
            f"download {row.url} again, or rename the file if it is another"
        )


def model_files(place: str) -> list[Path]:
    """What is read of a model on this disk: by this it is known, and no command writes over it."""
    folder = Path(place)
    if not folder.is_dir():
        return [folder]
    files = {file for pattern in (*CONFIGS, *SAFETENSORS, *PICKLES) for file in folder.glob(pattern)}
    for index in folder.glob("*.index.json"):  # shards may have any names
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            files |= {folder / name for name in json.loads(index.read_bytes())["weight_map"].values()}
    return sorted(file for file in files if file.is_file())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of a model folder's weight files one after another, in 64 hex digits."""
    files = model_files(str(path))
    digest = hashlib.sha256()
    for file in (f for f in files if f.suffix != ".json") if path.is_dir() else files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- Classes to words ----------------------------------------------------------------------------


def class_names(count: int) -> list[str] | None:
    """ImageNet's names for a head of 1000 or 21841 classes, in its order; None for another count.

    A name is WordNet's, synonyms after commas: "tabby, tabby cat". Names are distinct: those that
    several classes of the list share (crane, the bird and the machine) end in their synset,
    "crane (n02012849)".
    """
    table = _classes(count)
    if table is None:
        return None
    shared = Counter(table.values())
    return [name if shared[name] == 1 else f"{name} ({synset})" for synset, name in table.items()]


def synsets(count: int) -> list[str] | None:
    """ImageNet's folder names for a head of 1000 or 21841 classes, in its order: "n02123045"."""
    table = _classes(count)
    return None if table is None else list(table)


def _classes(count: int) -> dict[str, str] | None:
    """{synset: names}."""
    if count == 21841:
        return _read_labels("imagenet22k.txt")
    if count == 1000:  # has its own names only for what the other list lacks
        full = _read_labels("imagenet22k.txt")
        return {synset: name or full[synset] for synset, name in _read_labels("imagenet1k.txt").items()}
    return None


@cache
def _read_labels(file: str) -> dict[str, str]:
    text = (Path(__file__).with_name("labels") / file).read_text(encoding="utf-8")
    return {line[:9]: line[10:] for line in text.splitlines()}
