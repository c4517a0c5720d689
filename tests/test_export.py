"""Graphs of other runtimes: equal to the model, telling what they are, refused when they are not."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT

import beit.export
import beit.graphs
from beit.engine import Engine
from beit.export import ExportRefused, OutputOf, export, layer_errors
from beit.features import embed
from beit.graphs import SUFFIX_OF, GraphError, Output, about_of, import_openvino, open_graph
from beit.image import ImageSpec
from beit.model import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

pytestmark = pytest.mark.usefixtures("trusted")

CONFIG = BeitConfig(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=6)
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
TARGETS = ["torch", "onnx", "openvino"]


def fill(model: torch.nn.Module, seed: int) -> None:
    """Weights, biases and tables that all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def model() -> BeitForImageClassification:
    model = BeitForImageClassification(CONFIG)
    fill(model, seed=0)
    model.id2label = dict(enumerate(NAMES))
    model.image_spec = ImageSpec((32, 32), resize="squash", filter="bilinear", mean=(0.1, 0.2, 0.3))
    return model.eval()


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((80, 3, 4, 4), dtype=np.float32)
    return coarse.repeat(8, axis=2).repeat(8, axis=3)


@pytest.fixture(scope="module")
def graphs(
    model: BeitForImageClassification, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The classifier as a graph of each runtime. To be read only."""
    found = {}
    for to in TARGETS:
        found[to] = tmp_path_factory.mktemp(to) / f"graph{SUFFIX_OF[to]}"
        export(model, found[to], to)  # type: ignore[arg-type]
    return found


@torch.no_grad()
def logits(model: BeitForImageClassification, images: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(images)).numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("to", TARGETS)
def test_a_graph_answers_as_the_model_for_any_batch_and_tells_what_it_is(
    to: str, model: BeitForImageClassification, pictures: np.ndarray, graphs: dict[str, Path]
) -> None:
    graph = open_graph(graphs[to])
    for batch in (1, 2, 7):
        ours = graph(pictures[:batch])
        np.testing.assert_allclose(ours, logits(model, pictures[:batch]), atol=1e-4)
    about = graph.about
    assert about.image_spec == model.image_spec
    assert about.labels == tuple(NAMES)
    assert (about.kind, about.precision) == ("classification", "fp32")
    assert BeitConfig(**about.config) == CONFIG
    assert about.model_sha256 == beit.export.hash_of(model)
    left = {path.name for path in graphs[to].parent.iterdir()}
    assert left == ({"graph.bin", "graph.xml"} if to == "openvino" else {graphs[to].name})


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_graph_names_no_file_of_the_machine_that_wrote_it(to: str, graphs: dict[str, Path]) -> None:
    here = str(Path(beit.export.__file__).parent).encode()
    assert here not in graphs[to].read_bytes()


@pytest.mark.parametrize("to", TARGETS)
def test_a_plain_vit_without_biases_is_exported(to: Any, pictures: np.ndarray, tmp_path: Path) -> None:
    config = replace(CONFIG, rel_pos_bias="none", use_abs_pos_emb=True)
    vit = BeitForImageClassification(config).eval()
    fill(vit, seed=1)
    file = tmp_path / f"vit{SUFFIX_OF[to]}"
    export(vit, file, to)
    np.testing.assert_allclose(open_graph(file)(pictures[:3]), logits(vit, pictures[:3]), atol=1e-4)


@pytest.mark.parametrize("output", [Output("features", "cls", 1), Output("features")])
def test_features_of_a_layer_are_the_models(
    output: Output, model: BeitForImageClassification, pictures: np.ndarray, tmp_path: Path
) -> None:
    export(model, tmp_path / "f.xml", "openvino", output)
    with torch.no_grad():
        expected = embed(model, torch.from_numpy(pictures[:5]), output.pooling, output.layer).numpy()
    graph = open_graph(tmp_path / "f.xml")
    np.testing.assert_allclose(graph(pictures[:5]), expected, rtol=1e-4, atol=1e-4)
    assert graph.about.output == output


def test_a_masked_model_guesses_the_tokens_of_all_patches(pictures: np.ndarray, tmp_path: Path) -> None:
    masked = BeitForMaskedImageModeling(CONFIG.for_pretraining(11)).eval()
    export(masked, tmp_path / "m.onnx", "onnx", Output("masked"))
    mask = np.random.default_rng(1).random((4, 16)) < 0.5
    ours = open_graph(tmp_path / "m.onnx")(pictures[:4], mask)
    with torch.no_grad():
        expected = masked(torch.from_numpy(pictures[:4]), torch.from_numpy(mask)).numpy()
    assert ours.shape == (4, 16, 11)
    np.testing.assert_allclose(ours[mask], expected, atol=1e-4)


@pytest.mark.parametrize("positions", ["per_block", "shared", "none"])
@pytest.mark.parametrize("to", TARGETS)
def test_a_graph_of_any_size_resizes_bias_and_positions_as_the_model(
    to: Any, positions: Any, tmp_path: Path
) -> None:
    config = replace(
        CONFIG, img_size=(32, 24), rel_pos_bias=positions, use_abs_pos_emb=positions == "none"
    )
    model = BeitForImageClassification(config).eval()
    fill(model, seed=2)
    file = tmp_path / f"any{SUFFIX_OF[to]}"
    export(model, file, to, max_size=72)
    graph = open_graph(file)
    assert graph.about.max_size == 72
    rng = np.random.default_rng(3)
    for batch, height, width in [
        (1, 32, 24),
        (4, 32, 24),
        (2, 24, 32),
        (1, 72, 16),
        (3, 16, 72),
        (2, 72, 72),
    ]:
        images = rng.standard_normal((batch, 3, height, width), dtype=np.float32)
        np.testing.assert_allclose(graph(images), logits(model, images), atol=1e-4)
    for height, width in [(80, 32), (32, 28), (8, 32), (0, 32)]:
        with pytest.raises(GraphError, match=f"from 16 to 72 a side, not {height} x {width}"):
            graph(np.zeros((1, 3, height, width), np.float32))


@pytest.mark.parametrize("to", TARGETS)
def test_a_masked_model_of_any_size_takes_masks_of_the_grid(to: Any, tmp_path: Path) -> None:
    masked = BeitForMaskedImageModeling(CONFIG.for_pretraining(11)).eval()
    with torch.no_grad():
        assert masked.rel_pos_bias is not None
        masked.rel_pos_bias.relative_position_bias_table.normal_(
            generator=torch.Generator().manual_seed(4)
        )
    file = tmp_path / f"m{SUFFIX_OF[to]}"
    export(masked, file, to, Output("masked"), max_size=48)
    rng = np.random.default_rng(5)
    images = rng.standard_normal((2, 3, 24, 48), dtype=np.float32)
    mask = rng.random((2, 3, 6)) < 0.5
    with torch.no_grad():
        expected = masked(torch.from_numpy(images), torch.from_numpy(mask)).numpy()
    ours = open_graph(file)(images, mask)
    assert ours.shape == (2, 18, 11)
    np.testing.assert_allclose(ours[mask.reshape(2, 18)], expected, atol=1e-4)


@pytest.mark.parametrize("to", TARGETS)
def test_a_graph_of_one_size_says_which(to: str, graphs: dict[str, Path]) -> None:
    with pytest.raises(GraphError, match="takes pictures of 32 x 32, not 32 x 40"):
        open_graph(graphs[to])(np.zeros((1, 3, 32, 40), np.float32))


def test_half_precision_weights_and_other_inputs_do_not_change_the_model(
    pictures: np.ndarray, tmp_path: Path
) -> None:
    half = BeitForImageClassification(CONFIG).to(torch.bfloat16).train()
    export(half, tmp_path / "h.pt2", "torch")
    assert half.training
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("to", ["torch", "openvino"])
def test_a_graph_that_differs_is_not_written(
    to: Any, model: BeitForImageClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"graph{SUFFIX_OF[to]}"
    file.write_text("from before")
    honest = beit.export._trace

    def wrong(whole: OutputOf, inputs: tuple[np.ndarray, ...], *sizes: int) -> Any:
        other = BeitForImageClassification(CONFIG).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.blocks[1].attn.relative_position_bias_table[3] += 0.5  # type: ignore[union-attr,index,operator]
        return honest(OutputOf(other, whole.output), inputs, *sizes)

    monkeypatch.setattr(beit.export, "_trace", wrong)
    with pytest.raises(ExportRefused, match="differs from the model's by"):
        export(model, file, to)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["from before"]


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_agrees_is_smaller_and_reports_what_it_costs(
    to: Any, model: BeitForImageClassification, pictures: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / f"small{SUFFIX_OF[to]}"
    report = export(model, file, to, precision="int8", pictures=pictures, min_agreement=0.9)
    graph = open_graph(file)
    assert graph.about.precision == "int8"
    ours, exact = graph(pictures[40:]), logits(model, pictures[40:])
    agreement = (ours.argmax(axis=1) == exact.argmax(axis=1)).mean()
    assert report["agreement"] == agreement >= 0.9
    assert report["max_abs_error"] == pytest.approx(np.abs(ours - exact).max(), rel=0.05)
    assert report["max_abs_error"] > 1e-4
    assert (report["calibrated_on"], report["measured_on"]) == (40, 40)
    assert set(report["ms_batch_1"]) >= {"int8"}
    assert json.loads(file.with_suffix(".json").read_text()) == report


def test_an_int8_graph_attends_in_higher_precision(
    model: BeitForImageClassification, pictures: np.ndarray, tmp_path: Path
) -> None:
    """Linear layers are quantised, and neither product of a block's attention."""
    report = export(
        model, tmp_path / "s.xml", "openvino", precision="int8", pictures=pictures[:16], anyway=True
    )
    ops = import_openvino().Core().read_model(tmp_path / "s.xml").get_ordered_ops()
    products = [node for node in ops if node.get_type_name() == "MatMul"]
    quantised = [
        node
        for node in products
        if any(node.input_value(i).get_node().get_type_name() == "FakeQuantize" for i in (0, 1))
    ]
    assert len(products) == 2 * (4 + 2) + 1
    assert len(quantised) == report["quantised_layers"] >= 7
    assert all(beit.export._has_weight(node) for node in quantised)


def test_an_int8_graph_holds_no_large_constant_in_float32(
    pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 384 pixels the biases outweigh the weights in int8."""
    torch.manual_seed(0)
    model = BeitForImageClassification(CONFIG).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.relative_position_bias_table.normal_()  # type: ignore[union-attr,operator]
    monkeypatch.setattr(beit.export, "HALVED_BYTES", 3 * 17 * 17 * 4)
    export(model, tmp_path / "s.xml", "openvino", precision="int8", pictures=pictures[:16], anyway=True)
    graph = import_openvino().Core().read_model(tmp_path / "s.xml")
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    biases = [node for node in constants if list(node.shape)[-2:] == [17, 17]]
    assert [node.get_element_type().get_type_name() for node in biases] == ["f16", "f16"]
    with torch.no_grad():
        exact = [bias.numpy() for bias in model.relative_position_biases(CONFIG.grid)]
    held = sorted(node.data.tolist() for node in biases)  # nodes have no order of ours
    assert held == sorted(bias.astype(np.float16).tolist() for bias in exact)


def test_int8_below_the_agreement_asked_for_is_refused_unless_told_otherwise(
    model: BeitForImageClassification,
    pictures: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(beit.export, "TRIES", (0,))
    file = tmp_path / "small.onnx"
    loud = pictures.copy()
    loud[:40] *= 1e-3  # ranges of pictures unlike those that it is measured on
    with pytest.raises(ExportRefused, match=r"in int8 it agrees .* below 99%.*--anyway"):
        export(model, file, "onnx", precision="int8", pictures=loud)
    assert list(tmp_path.iterdir()) == []
    report = export(model, file, "onnx", precision="int8", pictures=loud, anyway=True)
    assert report["agreement"] < 0.99
    assert file.exists()


def test_the_layers_that_cost_most_are_kept_out_of_int8(
    model: BeitForImageClassification, pictures: np.ndarray, tmp_path: Path
) -> None:
    spoilt = BeitForImageClassification(CONFIG).eval()
    spoilt.load_state_dict(model.state_dict())
    with torch.no_grad():  # one channel sets the range, the others vanish in it
        spoilt.blocks[1].norm2.weight[0] = 3e3  # type: ignore[union-attr,index,operator]
        spoilt.blocks[1].mlp.fc1.weight[:, 0] *= 1e-3  # type: ignore[union-attr,index,operator]
    whole = OutputOf(spoilt, Output())
    names = [name for name, part in spoilt.named_modules() if isinstance(part, torch.nn.Linear)]
    ranked = layer_errors(spoilt, whole, names, pictures)
    assert ranked[0][0] == "blocks.1.mlp.fc1"
    assert ranked[0][1] > 3 * ranked[1][1]
    assert torch.equal(spoilt.head.weight, model.head.weight)  # type: ignore[arg-type]
    report = export(spoilt, tmp_path / "s.onnx", "onnx", precision="int8", pictures=pictures)
    assert "blocks.1.mlp.fc1" in report["kept_in_higher_precision"]
    assert report["agreement"] >= 0.99


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"to": "openvino", "file": "a.onnx"}, "must end in .xml"),
        ({"to": "coreml", "file": "a.onnx"}, "'coreml' is not one of"),
        ({"precision": "int8"}, "8 or more.*0 were given"),
        ({"precision": "int8", "to": "torch", "file": "a.pt2"}, "int8 is written for"),
        (
            {"max_size": 36},
            "36 is not a multiple of 8 from 32 on, the model's own size; use 32 or 40",
        ),
        (
            {"max_size": 24},
            "24 is not a multiple of 8 from 32 on, the model's own size; use 32",
        ),
        ({"max_size": 64, "precision": "int8"}, "one size; leave out max_size"),
        ({"output": Output("masked")}, "guesses no tokens"),
        ({"output": Output("features", "mean", 3)}, "layers 0 to 2"),
        ({"output": Output("features", "both")}, "'both' is not one of"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_exported_is_named(
    given: dict[str, Any], cause: str, model: BeitForImageClassification, tmp_path: Path
) -> None:
    settings = {"to": "onnx", "file": "a.onnx", **given}
    with pytest.raises(ValueError, match=cause):
        export(model, tmp_path / settings.pop("file"), **settings)
    assert list(tmp_path.iterdir()) == []


# No file may grow beyond 3,000 bytes.
ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from beit.export import SUFFIX_OF, export
from beit.model import BeitConfig, BeitForImageClassification
shape = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
model = BeitForImageClassification(BeitConfig(**shape, num_classes=2)).eval()
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
for to in ("torch", "onnx", "openvino"):
    file = Path(sys.argv[1]) / f"graph{SUFFIX_OF[to]}"
    try:
        export(model, file, to)
    except OSError as error:
        print(to, error.strerror, error.filename == str(file))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path)],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = ["torch File too large True", "onnx File too large True"]
    told.append("openvino OpenVINO does not say why, a full disk most often True")
    assert done.stdout.splitlines() == told, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_extra_is_named_with_its_install_line(
    to: Any,
    module: str,
    model: BeitForImageClassification,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == module else honest(name, *rest)
    )
    with pytest.raises(ValueError, match=rf'{module}: pip install "beit\[{to}\]"'):
        export(model, tmp_path / f"a{SUFFIX_OF[to]}", to)


@pytest.mark.parametrize("several", [False, True])
def test_agreement_of_several_labels_is_of_all_of_them(several: bool, tmp_path: Path) -> None:
    """Classes 1 to 5 lie near 0 and change sides; the best one, 0, stays."""
    model = BeitForImageClassification(replace(CONFIG, several_labels=several)).eval()
    file = tmp_path / "a.onnx"
    export(model, file, "onnx")
    images = np.random.default_rng(0).standard_normal((6, 3, 32, 32), np.float32)
    wanted = logits(model, images)
    with torch.no_grad():
        model.head.bias[0] += 50  # type: ignore[index,union-attr]
        model.head.bias[1] -= float(wanted[:3, 1].mean())  # type: ignore[index,union-attr]
    export(model, file, "onnx")
    about = about_of(file)
    expected = logits(model, images)
    expected[0, 1:] *= -1
    found = beit.export._compare(file, file, images, expected, about)
    assert found["agreement"] == (pytest.approx(5 / 6) if several else 1.0)
    assert found["agreement_is"] == ("same labels" if several else "same best class")


def test_an_old_xml_is_never_beside_a_new_bin(
    model: BeitForImageClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    file = tmp_path / "a.xml"
    export(model, file, "openvino")
    seen, honest = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda one, other: (honest(one, other), seen.append(file.exists()))
    )
    export(model, file, "openvino")
    assert seen == [False, True]


class Program:
    """What a pickle may hold: here it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def test_a_pt2_is_not_run_unless_somebody_says_so(
    model: BeitForImageClassification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BEIT_TRUST_PT2")
    file, proof = tmp_path / "a.pt2", tmp_path / "proof"
    export(model, file, "torch")
    hostile = tmp_path / "hostile.pt2"
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(hostile, "w") as bad:
        for name in good.namelist():
            inputs = name.endswith("sample_inputs/model.pt")
            bad.writestr(name, pickle.dumps(Program(proof), 2) if inputs else good.read(name))
    for opening in (lambda: open_graph(hostile), lambda: Engine(hostile)):
        with pytest.raises(
            GraphError, match=r"hostile\.pt2: a \.pt2 is a program.* set BEIT_TRUST_PT2=1"
        ):
            opening()
    assert about_of(hostile).labels == open_graph(file, trusted=True).about.labels
    assert not proof.exists()
    monkeypatch.setenv("BEIT_TRUST_PT2", "1")
    with pytest.raises(GraphError, match="is no torch"):
        open_graph(hostile)
    assert proof.exists(), "torch runs it: else the refusal is not needed any more"


@pytest.mark.parametrize("suffix", [".xml", ".onnx", ".pt2"])
def test_a_file_that_is_no_graph_of_ours_is_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"wrong{suffix}"
    with pytest.raises(GraphError, match="does not exist"):
        open_graph(file)
    file.write_bytes(b"not a graph at all")
    with pytest.raises(GraphError, match=f"wrong{suffix} is no "):
        open_graph(file)


def test_a_foreign_graph_is_refused_because_it_does_not_say_how_to_prepare_pictures(
    graphs: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    content = onnx.load(graphs["onnx"])
    del content.metadata_props[:]
    onnx.save(content, tmp_path / "a.onnx")
    with pytest.raises(GraphError, match="does not say how its pictures are prepared"):
        open_graph(tmp_path / "a.onnx")


QUIET = """
import sys
import numpy as np
import torch
from PIL import Image
from pathlib import Path
from beit.export import export
from beit.model import BeitConfig, BeitForImageClassification

forked = []
sys.addaudithook(lambda name, args: forked.append(name) if name in ("os.fork", "socket.connect") else None)
torch.manual_seed(0)
shape = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
model = BeitForImageClassification(BeitConfig(**shape, num_classes=2)).eval()
export(model, Path(sys.argv[1]), "openvino")
import nncf
import nncf.telemetry
graph = __import__("openvino").Core().read_model(sys.argv[1])
data = nncf.Dataset([np.zeros((1, 3, 16, 16), np.float32)])
nncf.quantize(graph, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
loaded = [name for name in sys.modules if name.startswith("openvino_telemetry.")]
print(loaded, forked)
"""

SIGNALLED = """
import faulthandler, signal, sys
from pathlib import Path
from beit.graphs import open_graph

faulthandler.enable()  # brings a stack for signals, as OpenVINO does
first, second = (open_graph(Path(sys.argv[1]), "fp32", None) for _ in range(2))
del first
del second
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_after_openvino_graphs_have_come_and_gone_is_handled(graphs: dict[str, Path]) -> None:
    """Left to itself OpenVINO gives back the stack of a plugin that is gone: a segmentation fault."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(graphs["openvino"])],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_openvino_and_nncf_report_to_nobody(tmp_path: Path) -> None:
    """With openvino_telemetry installed they would, from forked processes."""
    pytest.importorskip("nncf")
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path / "g.xml")],
        env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] []"
    assert not list(tmp_path.glob("intel/*")), "no identity was written"
