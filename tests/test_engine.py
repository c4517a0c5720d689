"""The inference engine: same answers for any batch and any kind of input, errors as answers."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
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

from beit.checkpoints import load, load_model, save
from beit.data import open_source
from beit.engine import Engine, Prediction, agree
from beit.export import export
from beit.graph_cache import known_choice, making
from beit.graphs import EmbedPooling, Graph, GraphError, Output, open_graph
from beit.image import IMAGENET_MEAN, IMAGENET_STD, BadImage, ImageSpec, preprocess, read_image
from beit.model import Beit, BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling
from beit.torch_model import TorchModel
from beit.weight_files import CheckpointError

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


def test_a_compiled_engine_gives_the_same_answers(
    model: BeitForImageClassification, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_eagerly(block: torch.nn.Module) -> None:  # the tracing of torch.compile, no C++ compiler
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="aot_eager")

    copied = copy.deepcopy(model)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    answers = list(Engine(copied, "torch", "fp32", batch_size=4, compile=True).classify(files))
    assert compiled == list(copied.blocks)
    expected = list(exact(model, batch_size=4).classify(files))
    assert [answer.label for answer in answers] == [answer.label for answer in expected]
    scores = [[answer.score or 0.0 for answer in side] for side in (answers, expected)]
    np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "tokens"])
@pytest.mark.parametrize("layer", [None, 0, 1, -1])
def test_embeddings_are_the_models_states_pooled(
    model: BeitForImageClassification, files: list[Path], pooling: EmbedPooling, layer: int | None
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


def test_a_device_that_torch_knows_and_that_is_not_here_is_named(
    model: BeitForImageClassification,
) -> None:
    with pytest.raises(ValueError, match="device meta is not here; use auto, cpu, cuda or cuda:1"):
        exact(model, device="meta")


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


# --- Other runtimes --------------------------------------------------------------------------------------

RUNTIMES = [("openvino", "fp32"), ("openvino", "bf16"), ("onnx", "fp32"), ("torch", "bf16")]


@pytest.fixture(scope="module")
def folder(model: BeitForImageClassification, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("saved") / "model"
    save(model, saved)
    return saved


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Graphs are made once for this file, and not in the home of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home / "beit" / "graphs"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of every mode, a very long one, one pixel, an animation, and two that are none."""
    root = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(2)
    colours = Image.fromarray(rng.integers(0, 256, (4, 4, 4), dtype=np.uint8)).resize((50, 40))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        colours.convert("RGB").convert(mode).save(root / f"{mode}.png")
    colours.convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (30, 30), dtype=np.uint16)).save(root / "deep.png")
    colours.convert("RGB").resize((900, 3)).save(root / "long.png")
    colours.convert("RGB").resize((1, 1)).save(root / "one.png")
    frames = [Image.new("RGB", (20, 20), (40 * n, 9, 9)) for n in range(3)]
    frames[0].save(root / "moving.gif", save_all=True, append_images=frames[1:])
    (root / "empty.jpg").touch()
    (root / "page.jpg").write_text("<html>not found</html>")
    return sorted(root.iterdir())


@pytest.mark.parametrize(("runtime", "precision"), RUNTIMES)
def test_every_runtime_gives_the_answers_of_torch_also_for_odd_pictures(
    runtime: Any, precision: Any, folder: Path, odd: list[Path]
) -> None:
    plain = exact(folder)
    ours = list(Engine(folder, runtime, precision, batch_size=3).classify(odd, top=6))
    theirs = list(plain.classify(odd, top=6))
    assert [answer.error for answer in ours] == [answer.error for answer in theirs]
    assert sum(answer.error is not None for answer in ours) == 2
    tolerance = {"fp32": 1e-5, "bf16": 0.05}[precision]
    np.testing.assert_allclose(scores(ours), scores(theirs), atol=tolerance)
    for one, other in zip(ours, theirs, strict=True):
        if other.error is None and other.top[0][1] - other.top[1][1] > 2 * tolerance:
            assert one.label == other.label


@pytest.mark.parametrize(("runtime", "precision"), RUNTIMES)
def test_every_runtime_embeds_as_torch_does(
    runtime: Any, precision: Any, folder: Path, files: list[Path]
) -> None:
    pictures = [files[n] for n in GOOD]
    ours, theirs = (
        np.stack(
            [answer.vector for answer in engine.embed(pictures, "mean", 1) if answer.vector is not None]
        )
        for engine in (Engine(folder, runtime, precision), exact(folder))
    )
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    assert ((ours * theirs).sum(axis=1) / norms).min() >= {"fp32": 0.9999, "bf16": 0.999}[precision]


@pytest.mark.parametrize(("runtime", "precision"), RUNTIMES[:3])
def test_sixty_four_threads_share_a_graph_too(
    runtime: Any, precision: Any, folder: Path, files: list[Path]
) -> None:
    """Classes and features at once, a broken picture in each batch."""
    engine = Engine(folder, runtime, precision, threads=1, batch_size=2)
    pictures = [files[n] for n in GOOD]
    classes = scores([next(engine.classify(file, top=6)) for file in pictures])
    vectors = [next(engine.embed(file)).vector for file in pictures]

    def ask(number: int) -> None:
        place = number % len(pictures)
        asked = [pictures[place], files[4], pictures[place]]
        answers = list(engine.classify(asked, top=6)) if number % 2 else list(engine.embed(asked))
        assert [answer.error is None for answer in answers] == [True, False, True]
        for answer in (answers[0], answers[2]):
            if isinstance(answer, Prediction):
                np.testing.assert_allclose(scores([answer])[0], classes[place], atol=1e-5)
            else:
                np.testing.assert_allclose(answer.vector, vectors[place], atol=1e-5)  # type: ignore[arg-type]

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(ask, range(256)))


def test_auto_measures_once_and_then_opens_the_graph_without_loading_the_model(
    folder: Path, files: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import beit.checkpoints
    import beit.torch_model

    assert Engine(folder).why == "so small a model is not measured, and torch begins at once"
    assert not list(cache.glob("choice-*"))
    monkeypatch.setattr(beit.torch_model, "SMALL_FLOPS", 0)
    honest, threads = beit.torch_model.TorchModel.__call__, list[int]()

    def slow(model: TorchModel, output: Output, images: np.ndarray) -> np.ndarray:
        time.sleep(0.1)
        threads.append(torch.get_num_threads())
        return honest(model, output, images)

    monkeypatch.setattr(beit.torch_model.TorchModel, "__call__", slow)
    first = Engine(folder, precision="fp32")
    assert first.runtime in ("openvino", "onnx")
    assert first.why.startswith(f"fastest of those that agree with torch in fp32: {first.runtime} ")
    (choice,) = cache.glob("choice-*")
    assert json.loads(choice.read_text())["ms"].keys() == {"torch", "openvino", "onnx"}

    assert known_choice(folder).startswith("not measured here yet")  # in `auto`, that is
    kept = Engine(folder)
    assert known_choice(folder) == f"{kept.runtime} {kept.precision}: {kept.why}"

    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(beit.checkpoints, "load_model", never)
    again = Engine(folder, precision="fp32")
    assert (again.runtime, again.why) == (first.runtime, first.why)
    assert list(again.classify(files)) == list(first.classify(files))
    assert again.labels == list(NAMES.values())

    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    monkeypatch.setattr(beit.torch_model, "SMALL_FLOPS", 0)
    monkeypatch.setattr(beit.torch_model.TorchModel, "__call__", slow)
    before = torch.get_num_threads()
    threads.clear()
    Engine(folder, precision="fp32", threads=before + 1)
    torch.set_num_threads(before)
    assert set(threads) == {before + 1}  # torch is timed as it would be used


def test_auto_leaves_out_what_does_not_agree(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import beit.torch_model

    monkeypatch.setattr(beit.torch_model, "SMALL_FLOPS", 0)
    monkeypatch.setattr(beit.engine, "LEAST_COSINE", {"fp32": 1.1})
    engine = Engine(folder, precision="fp32", threads=1)
    assert engine.runtime == "torch"
    assert "openvino left out: does not agree with torch (cosine 1.0" in engine.why


def test_auto_times_each_runtime_by_a_graph_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import beit.torch_model

    def all_but_onnx(file: Path, *rest: Any) -> Graph:
        if file.suffix == ".onnx":
            raise GraphError("not today")
        return open_graph(file, *rest)

    monkeypatch.setattr(beit.torch_model, "SMALL_FLOPS", 0)
    monkeypatch.setattr(beit.engine, "open_graph", all_but_onnx)
    monkeypatch.setattr(beit.engine, "kept_choice", lambda *_: None)
    monkeypatch.setattr(beit.engine, "keep_choice", lambda *_: None)
    why = Engine(folder, precision="fp32").why
    assert "; onnx left out: not today" in why
    assert "openvino" in why.split(";")[0]


def test_another_best_class_does_not_agree_but_a_tie_does() -> None:
    exact_logits = np.array([[1.0, 0.999, -1.0], [3.0, 1.0, 0.0]], np.float32)
    tie = np.array([[0.999, 1.0, -1.0], [3.0, 1.0, 0.0]], np.float32)
    assert agree(tie, exact_logits, "bf16", Output())[0]
    assert not agree(tie[::-1].copy(), exact_logits[::-1] * [1, 1.1, 1], "fp32", Output())[0]
    assert not agree(-exact_logits, exact_logits, "bf16", Output())[0]


@pytest.mark.parametrize("left", ["no weights", "half a file", "no file"])
def test_a_kept_graph_that_does_not_open_is_made_anew(
    folder: Path,
    files: list[Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left: str,
) -> None:
    """As a crash leaves it, or for a moment another process that makes it too."""
    first = Engine(folder, "openvino", "fp32")
    answers = list(first.classify(files))
    kept = (
        tmp_path
        / "beit"
        / "graphs"
        / max(cache.glob(f"{first._model_key()}*.xml"), key=os.path.getmtime).name
    )
    shutil.copytree(cache, kept.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = sorted(file.name for file in kept.parent.glob("*.xml"))
    if left == "no weights":
        kept.with_suffix(".bin").unlink()
    elif left == "half a file":
        kept.write_text(kept.read_text()[:1000])
    else:
        monkeypatch.setattr("beit.engine.open_graph", gone_once(open_graph))
    assert list(Engine(folder, "openvino", "fp32").classify(files)) == answers
    assert sorted(file.name for file in kept.parent.glob("*.xml")) == before


def gone_once(honest: Callable[..., Graph]) -> Callable[..., Graph]:
    calls = iter([True])

    def opened(file: Path, *rest: Any) -> Graph:
        if next(calls, False):
            raise GraphError(f"{file} is no graph")
        return honest(file, *rest)

    return opened


def test_one_at_a_time_makes_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    order: list[str] = []

    def other() -> None:
        with making():
            order.append("second")

    with making():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_without_a_place_for_graphs_torch_answers(
    folder: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import beit.torch_model

    monkeypatch.setattr(beit.torch_model, "SMALL_FLOPS", 0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    engine = Engine(folder)
    assert engine.runtime == "torch"
    assert "cache folder" in engine.why
    assert next(engine.classify(files)).error is None


@pytest.mark.usefixtures("trusted")
def test_a_graph_file_is_a_model_for_what_it_holds_alone(
    model: BeitForImageClassification, files: list[Path], tmp_path: Path
) -> None:
    export(model, tmp_path / "f.pt2", "torch", Output("features", "cls", 1))
    engine = Engine(tmp_path / "f.pt2")
    assert (engine.runtime, engine.precision) == ("torch", "fp32")
    (ours,), (theirs,) = (e.embed(files[0], "cls", 1) for e in (engine, exact(model)))
    np.testing.assert_allclose(ours.vector, theirs.vector, atol=1e-5)
    assert engine.model.config == model.config  # its shapes, which are no weights
    with pytest.raises(GraphError, match=r"holds features \(cls, layer 1\), not .*--pooling mean"):
        next(engine.embed(files[0]))
    with pytest.raises(CheckpointError, match="has no classifier"):
        engine.classify(files[0])
    with pytest.raises(ValueError, match="is for torch, not onnx"):
        Engine(tmp_path / "f.pt2", "onnx")
    with pytest.raises(ValueError, match="holds fp32; write it anew"):
        Engine(tmp_path / "f.pt2", precision="int8")


@pytest.mark.parametrize("runtime", ["torch", "openvino", "onnx"])
def test_another_size_is_that_of_the_model_resized(
    runtime: Any, folder: Path, files: list[Path]
) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime))
    pictures = [files[n] for n in GOOD]
    engine = Engine(folder, runtime, "fp32", img_size=48)
    assert engine.image_spec.size == (48, 48)
    resized = exact(load_model(folder, img_size=48)).classify(pictures, top=6)
    found = scores(list(engine.classify(pictures, top=6)))
    np.testing.assert_allclose(found, scores(list(resized)), atol=1e-5)
    usual = scores(list(Engine(folder, runtime, "fp32").classify(pictures, top=6)))  # a graph of its own
    assert np.abs(found - usual).max() > 1e-3


@pytest.mark.usefixtures("trusted")
def test_a_graph_file_of_any_size_takes_another(
    model: BeitForImageClassification, folder: Path, files: list[Path], tmp_path: Path
) -> None:
    export(model, tmp_path / "any.pt2", "torch", max_size=64)
    export(model, tmp_path / "one.pt2", "torch")
    pictures = [files[n] for n in GOOD]
    ours = Engine(tmp_path / "any.pt2", img_size=48).classify(pictures, top=6)
    theirs = Engine(folder, "torch", "fp32", img_size=48).classify(pictures, top=6)
    np.testing.assert_allclose(scores(list(ours)), scores(list(theirs)), atol=1e-5)
    with pytest.raises(GraphError, match="from 16 to 64 a side, not 72 x 72"):
        Engine(tmp_path / "any.pt2", img_size=72)
    with pytest.raises(GraphError, match="takes pictures of 32 x 32, not 48 x 48"):
        Engine(tmp_path / "one.pt2", img_size=48)
    with pytest.raises(ValueError, match="yet to load; load_model takes it too"):
        Engine(model, img_size=48)


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"img_size": 44}, "44"),
        ({"precision": "int8"}, "beit export MODEL --to openvino --precision int8"),
        ({"runtime": "onnx", "precision": "bf16"}, "no bf16"),
        ({"runtime": "tensorrt"}, "'tensorrt' is not one of auto, torch, openvino, onnx"),
        ({"precision": "fp8"}, "'fp8' is not one of"),
        ({"threads": 0}, "threads 0"),
        ({"runtime": "openvino", "device": "cuda"}, "works on the processor"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], cause: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=cause):
        Engine(folder, **wrong)


@pytest.mark.parametrize(("runtime", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_runtime_is_named_and_auto_does_without(
    runtime: Any, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ValueError, match=rf'needs {module}: pip install "beit\[{runtime}\]"'):
        Engine(folder, runtime)
    engine = Engine(folder)
    assert engine.runtime == "torch"
    assert 'pip install "beit[openvino]" may be faster' in engine.why


def test_auto_takes_torch_for_a_model_whose_pictures_are_prepared_at_another_size(
    folder: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import beit.torch_model

    monkeypatch.setattr(beit.torch_model, "SMALL_FLOPS", 0)
    monkeypatch.setattr(beit.engine, "kept_choice", lambda *_: None)
    monkeypatch.setattr(beit.engine, "keep_choice", lambda *_: None)
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config.pop("beit")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    processor = tmp_path / "m" / "preprocessor_config.json"
    content = json.loads(processor.read_text())
    processor.write_text(json.dumps({**content, "size": 48, "do_center_crop": False}))
    engine = Engine(tmp_path / "m", precision="fp32")
    assert engine.runtime == "torch"
    assert "prepared at 48 x 48 and the model is of 32 x 32" in engine.why
    assert next(engine.classify(files[0])).error is None


def test_whoever_asks_for_all_layers_holds_few_graphs(
    folder: Path, files: list[Path], model: BeitForImageClassification
) -> None:
    pytest.importorskip("onnxruntime")
    from beit.engine import MOST_GRAPHS

    engine = Engine(folder, "onnx", "fp32")
    for layer in (1, 2, None, -1, -2):
        (ours,), (theirs,) = (e.embed(files[0], "cls", layer) for e in (engine, exact(model)))
        np.testing.assert_allclose(ours.vector, theirs.vector, atol=1e-4)
        assert len(engine._graphs) <= MOST_GRAPHS
        assert Output() in engine._graphs, "the classifier stays"
    assert {output.layer for output in engine._graphs} == {None, 1, 2}, "-1 is 2"


def test_an_answer_that_is_not_finite_is_an_error(files: list[Path]) -> None:
    broken = BeitForImageClassification(CONFIG).eval()
    with torch.no_grad():
        broken.head.bias[2] = math.nan  # type: ignore[index,union-attr]
    (answer,) = exact(broken).classify(files[0])
    assert answer == Prediction(str(files[0]), None, None, (), "the model's answer is not finite")


def test_a_model_given_in_memory_is_used_as_it_is_now(files: list[Path]) -> None:
    changing = BeitForImageClassification(CONFIG).eval()
    for precision in ("fp32", "bf16"):
        engine = Engine(changing, "torch", precision)  # type: ignore[arg-type]
        before = next(engine.classify(files[0])).score
        with torch.no_grad():
            changing.head.weight.copy_(torch.randn(changing.head.weight.shape))  # type: ignore[arg-type,union-attr]
        assert next(engine.classify(files[0])).score != before
