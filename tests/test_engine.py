"""The inference engine: same answers for any batch and any kind of input, errors as answers."""

from __future__ import annotations

import io
import json
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit.checkpoints import CheckpointError, load, save
from beit.data import open_source
from beit.engine import Engine, Prediction
from beit.features import Embedding
from beit.image import IMAGENET_MEAN, IMAGENET_STD, BadImage, ImageSpec, preprocess, read_image
from beit.model import Beit, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

CONFIG = BeitConfig(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=6)
exact = partial(Engine, runtime="torch", precision="fp32")
NAMES = dict(enumerate(["ant", "bee", "cat", "dog", "eel", "fox"]))


@pytest.fixture(scope="module")
def model() -> BeitForImageClassification:
    model = BeitForImageClassification(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    model.id2label = dict(NAMES)
    model.image_spec = ImageSpec((32, 32), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return model.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eleven pictures of different sizes; the fifth and the last are broken."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    found = []
    for number in range(11):
        height, width = rng.integers(20, 90, 2)
        small = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        file = root / f"{number:02d}.png"
        Image.fromarray(small).resize((int(width), int(height))).save(file)
        found.append(file)
    found[4].write_bytes(found[4].read_bytes()[:60])
    found[10].write_text("no picture")
    return found


GOOD = [0, 1, 2, 3, 5, 6, 7, 8, 9]


@torch.no_grad()
def expected_scores(model: BeitForImageClassification, file: Path) -> torch.Tensor:
    image = torch.from_numpy(preprocess(read_image(file), model.image_spec))
    return model(image[None]).softmax(dim=1)[0]


def scores(predictions: list[Prediction]) -> np.ndarray:
    """(n, 6) probabilities in the order of the classes; NaN for errors."""
    rows = [dict(p.top) for p in predictions]
    return np.array([[row.get(name, np.nan) for name in NAMES.values()] for row in rows])


def test_answers_are_the_softmax_of_the_models_logits_in_the_order_of_the_pictures(
    model: BeitForImageClassification, files: list[Path]
) -> None:
    predictions = list(exact(model).classify(files, top=6))
    assert [p.path for p in predictions] == [str(file) for file in files]
    for number in GOOD:
        expected = expected_scores(model, files[number])
        np.testing.assert_allclose(scores(predictions)[number], expected.numpy(), atol=1e-6)
        answer = predictions[number]
        assert answer.error is None
        assert answer.label == NAMES[int(expected.argmax())]
        assert answer.score == pytest.approx(float(expected.max()), abs=1e-6)
        assert answer.top[0] == (answer.label, answer.score)
        assert [score for _, score in answer.top] == sorted((s for _, s in answer.top), reverse=True)
    assert len({predictions[number].label for number in GOOD}) > 1


def test_a_broken_picture_is_an_answer_with_an_error_and_changes_no_other(
    model: BeitForImageClassification, files: list[Path]
) -> None:
    every = list(exact(model, batch_size=4).classify(files, top=6))
    for number in (4, 10):
        assert every[number] == Prediction(str(files[number]), None, None, (), every[number].error)
        assert "not a readable picture" in str(every[number].error)
    good = list(exact(model, batch_size=4).classify([files[n] for n in GOOD], top=6))
    np.testing.assert_allclose(scores([every[n] for n in GOOD]), scores(good), atol=1e-6)


def test_a_batch_of_broken_pictures_only(model: BeitForImageClassification, files: list[Path]) -> None:
    predictions = list(exact(model, batch_size=1).classify([files[4], files[10]]))
    assert [p.label for p in predictions] == [None, None]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_any_batch_size_gives_the_same_scores(
    model: BeitForImageClassification, files: list[Path], batch_size: int
) -> None:
    alone = scores(list(exact(model, batch_size=5).classify(files, top=6)))
    np.testing.assert_allclose(
        scores(list(exact(model, batch_size=batch_size).classify(files, top=6))), alone, atol=1e-6
    )


def test_path_text_bytes_array_and_pillow_image_give_the_same_answer(
    model: BeitForImageClassification, files: list[Path]
) -> None:
    file = files[0]
    with Image.open(file) as image:
        image.load()
        given = [file, str(file), file.read_bytes(), image, read_image(file)]
    predictions = list(exact(model).classify(given, top=6))
    assert [p.path for p in predictions] == [str(file), str(file), "", "", ""]
    rows = scores(predictions)
    np.testing.assert_allclose(rows, rows[:1].repeat(5, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
    ],
    ids=["grey", "rgba", "float", "empty", "channels first"],
)
def test_an_array_that_is_no_rgb_picture_is_an_answer_with_an_error(
    model: BeitForImageClassification, files: list[Path], array: np.ndarray
) -> None:
    wrong, right = exact(model).classify([array, files[0]])
    assert wrong.label is None
    assert "uint8 (height, width, 3)" in str(wrong.error)
    assert right.label is not None


def test_pictures_may_come_from_an_endless_iterator_and_are_read_a_batch_ahead(
    model: BeitForImageClassification, files: list[Path]
) -> None:
    taken = []

    def stream() -> Iterator[Path]:
        for number in cycle(GOOD):
            taken.append(number)
            yield files[number]

    answers = exact(model, batch_size=2).classify(stream())
    assert taken == []
    for given in range(1, 40):
        assert next(answers).path == str(files[GOOD[(given - 1) % len(GOOD)]])
        assert given <= len(taken) <= given + 2 * 2 + 1


def test_nothing_that_was_answered_is_held(model: BeitForImageClassification) -> None:
    """A stream of any length takes the memory of its beginning."""
    given: list[weakref.ref[Image.Image]] = []
    most = 0

    def stream() -> Iterator[Image.Image]:
        for _ in range(200):
            picture = Image.new("RGB", (40, 40))
            given.append(weakref.ref(picture))
            yield picture

    for _ in exact(model, batch_size=4).classify(stream()):
        most = max(most, sum(picture() is not None for picture in given))
    assert most <= 3 * 4


def test_a_single_picture_and_a_source_need_no_list(
    model: BeitForImageClassification, files: list[Path]
) -> None:
    engine = exact(model)
    with Image.open(files[0]) as image:
        image.load()
        for single in (files[0], str(files[0]), files[0].read_bytes(), image, read_image(files[0])):
            (answer,) = engine.classify(single)
            assert answer.label == next(engine.classify([files[0]])).label
    source = open_source(files[0].parent)
    assert list(engine.classify(source)) == list(engine.classify(source.paths))


def test_many_threads_share_an_engine_and_get_their_own_answers(
    model: BeitForImageClassification, files: list[Path]
) -> None:
    engine = exact(model, batch_size=2)
    alone = [scores(list(engine.classify(files[n], top=6))) for n in GOOD]

    def ask(number: int) -> tuple[int, np.ndarray]:
        place = number % len(GOOD)
        return place, scores(list(engine.classify([files[GOOD[place]], files[4]], top=6)))

    with ThreadPoolExecutor(64) as pool:
        for place, answer in pool.map(ask, range(256)):
            np.testing.assert_allclose(answer[:1], alone[place], atol=1e-6)
            assert np.isnan(answer[1]).all()


def test_an_answer_is_frozen_and_says_how_long_the_model_took(
    model: BeitForImageClassification, files: list[Path]
) -> None:
    good, bad = exact(model).classify([files[0], files[4]])
    assert good.ms is not None
    assert good.ms > 0
    assert bad.ms is None
    with pytest.raises(FrozenInstanceError):
        good.label = "other"  # type: ignore[misc]


def test_no_pictures_give_no_answers(model: BeitForImageClassification) -> None:
    assert list(exact(model).classify([])) == []


@pytest.mark.parametrize(("top", "given"), [(1, 1), (3, 3), (6, 6), (50, 6)])
def test_as_many_classes_are_named_as_asked_for(
    model: BeitForImageClassification, files: list[Path], top: int, given: int
) -> None:
    assert len(next(iter(exact(model).classify(files, top=top))).top) == given


@pytest.mark.parametrize("top", [0, -1])
def test_fewer_than_one_class_is_refused(
    model: BeitForImageClassification, files: list[Path], top: int
) -> None:
    with pytest.raises(ValueError, match=f"top {top}"):
        list(exact(model).classify(files, top=top))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_of_fewer_than_one_picture_is_refused(
    model: BeitForImageClassification, batch_size: int
) -> None:
    with pytest.raises(ValueError, match=f"batch_size {batch_size}"):
        exact(model, batch_size=batch_size)


def test_an_answer_goes_through_json(model: BeitForImageClassification, files: list[Path]) -> None:
    for prediction in exact(model).classify(files, top=2):
        content = json.loads(json.dumps(prediction.to_dict()))
        assert content["path"] == prediction.path
        assert content["label"] == prediction.label
        assert content["score"] == prediction.score
        assert content["top"] == [list(pair) for pair in prediction.top]
        assert content["error"] == prediction.error


def test_classes_without_names_are_their_numbers(model: BeitForImageClassification) -> None:
    nameless = BeitForImageClassification(CONFIG)
    nameless.id2label = {1: "one"}
    assert exact(nameless).labels == ["0", "one", "2", "3", "4", "5"]


def test_a_folder_and_a_loaded_model_answer_alike(
    model: BeitForImageClassification, files: list[Path], tmp_path: Path
) -> None:
    save(model, tmp_path)
    for source in (tmp_path, str(tmp_path), load(tmp_path)):
        ours = scores(list(exact(source).classify(files[:3], top=6)))
        np.testing.assert_array_equal(ours, scores(list(exact(model).classify(files[:3], top=6))))


def test_logits_of_a_source_are_those_of_its_pictures_one_by_one(
    model: BeitForImageClassification, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("\n".join(str(files[n]) for n in GOOD))
    source = open_source(tmp_path / "list.txt")
    for batch_size in (1, 4, 100):
        logits = exact(model, batch_size=batch_size).logits_of(source)
        assert logits.shape == (9, 6)
        assert logits.dtype == np.float32
        for row, number in zip(logits, GOOD, strict=True):
            softmax = torch.from_numpy(row).softmax(dim=0)
            torch.testing.assert_close(softmax, expected_scores(model, files[number]), atol=1e-6, rtol=0)


def test_scoring_a_source_with_a_broken_picture_names_it(
    model: BeitForImageClassification, files: list[Path]
) -> None:
    with pytest.raises(BadImage, match=r"04\.png"):
        exact(model).logits_of(open_source(files[0].parent))


@pytest.mark.parametrize("pooling", ["mean", "cls", "tokens"])
@pytest.mark.parametrize("layer", [None, 0, 1, -1])
def test_embeddings_are_the_models_states_pooled(
    model: BeitForImageClassification, files: list[Path], pooling: Embedding, layer: int | None
) -> None:
    answers = list(exact(model, batch_size=4).embed(files, pooling, layer))
    assert [answer.path for answer in answers] == [str(file) for file in files]
    assert [answer.error is None for answer in answers] == [n in GOOD for n in range(len(files))]
    for number in GOOD[:3]:
        image = torch.from_numpy(preprocess(read_image(files[number]), model.image_spec))[None]
        with torch.no_grad():
            tokens = model.layers(image, [2 if layer is None else layer])[0][0]
            pooled = {"mean": tokens[1:].mean(dim=0), "cls": tokens[0], "tokens": tokens}[pooling]
            if pooling == "mean" and layer is None:
                pooled = model.fc_norm(pooled)
        vector = answers[number].vector
        assert vector is not None
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, pooled.numpy(), atol=1e-5)
        assert answers[number].to_dict()["vector"] == vector.tolist()


def test_the_last_embedding_is_what_the_head_gets(
    model: BeitForImageClassification, files: list[Path]
) -> None:
    engine = exact(model)
    (answer,) = engine.embed(files[0])
    assert answer.vector is not None
    with torch.no_grad():
        logits = model.head(torch.from_numpy(answer.vector))
    (row,) = engine.logits(preprocess(read_image(files[0]), model.image_spec)[None])
    torch.testing.assert_close(logits, row)


def test_an_encoder_without_classifier_embeds_through_its_last_norm(files: list[Path]) -> None:
    encoder = Beit(CONFIG).eval()
    image = torch.from_numpy(preprocess(read_image(files[0]), encoder.image_spec))[None]
    with torch.no_grad():
        expected = encoder(image)[0, 1:].mean(dim=0)
    (answer,) = exact(encoder).embed(files[0])
    np.testing.assert_allclose(answer.vector, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"layer": 3}, "layer 3 does not exist"),
        ({"layer": -4}, "layer -4"),
        ({"pooling": "both"}, "both"),
    ],
)
def test_a_feature_that_does_not_exist_is_refused_before_a_picture_is_read(
    model: BeitForImageClassification, wrong: dict[str, Any], cause: str
) -> None:
    with pytest.raises(ValueError, match=cause):
        exact(model).embed(iter(()), **wrong)


def test_training_does_not_go_on_in_the_engine(model: BeitForImageClassification) -> None:
    training = BeitForImageClassification(replace(CONFIG, drop_path_rate=0.9)).train()
    engine = exact(training)
    batch = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    assert torch.equal(engine.logits(batch), engine.logits(batch))
    assert not engine.logits(batch).requires_grad


def test_half_precision_is_close(model: BeitForImageClassification, files: list[Path]) -> None:
    full = scores(list(exact(model).classify(files[:3], top=6)))
    half = scores(list(Engine(model, "torch", "bf16").classify(files[:3], top=6)))
    assert 0 < np.abs(half - full).max() < 0.1


@pytest.mark.parametrize(
    "headless",
    [
        Beit(CONFIG),
        BeitForMaskedImageModeling(CONFIG.for_pretraining(10)),
        BeitForImageClassification(replace(CONFIG, num_classes=0)),
    ],
    ids=["encoder", "masked model", "classifier without classes"],
)
def test_a_model_without_classifier_says_how_to_get_one(headless: Beit, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no classifier; fine-tune it first: beit finetune"):
        exact(headless).classify([])
    save(headless, tmp_path / "pretrained")
    with pytest.raises(CheckpointError, match="pretrained has no classifier"):
        exact(tmp_path / "pretrained").classify([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_missing_gpu_is_named(model: BeitForImageClassification) -> None:
    with pytest.raises(ValueError, match="torch sees no GPU; use --device cpu"):
        exact(model, device="cuda")


def test_an_unknown_device_is_a_value_error(model: BeitForImageClassification) -> None:
    with pytest.raises(ValueError, match="gpu0"):
        exact(model, device="gpu0")


def test_grey_and_turned_pictures_are_prepared_as_the_door_does(
    model: BeitForImageClassification,
) -> None:
    stream = io.BytesIO()
    grey = Image.fromarray(np.arange(48 * 40, dtype=np.uint8).reshape(48, 40))
    grey.getexif()[274] = 3
    grey.save(stream, "PNG", exif=grey.getexif())
    (answer,) = exact(model).classify([stream.getvalue()], top=6)
    turned = np.asarray(grey.rotate(180).convert("RGB"))
    (expected,) = exact(model).classify([turned], top=6)
    np.testing.assert_allclose(scores([answer]), scores([expected]), atol=1e-6)
