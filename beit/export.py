"""A model as a graph file that another runtime runs, written only if it agrees with the model.

The graph takes prepared pictures: resizing differs between runtimes, and `image.preprocess` is the one
that the weights know. The file says how they were prepared. The batch is free; the size is the one asked
for, and bias tables and positions are resized to it, or within the graph where any size is asked for.

int8 is post-training quantisation with pictures: weights by output channel, activations by tensor. The
layers that cost most, each measured alone, stay as they were until the answers agree.

Shapes: B batch, L patches, C classes, V vocabulary, D width.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit.any_size import any_size
from beit.atomic import CannotWrite, flush, naming, write_atomically
from beit.features import embed
from beit.graphs import (
    SUFFIX_OF,
    About,
    GraphError,
    Output,
    cosines,
    import_openvino,
    milliseconds,
    multiplies_bf16,
    open_graph,
    require,
    signal_stack_kept,
)
from beit.model import Beit, BeitForImageClassification, BeitForMaskedImageModeling, check_whole
from beit.snapshots import bytes_of

Target = Literal["onnx", "openvino", "torch"]

TOLERANCE = 1e-4  # of the largest output, or of 1 where that is more
OPSET = 20  # the first with Gelu
HALVED_BYTES = 1 << 16  # of a constant that stays float32 in an int8 graph: ranges and norms are smaller
RANK_ON = 4  # pictures on which each layer's error is measured
TRIES: tuple[int, ...] = (0, 2, 6, 14, 30)  # layers kept out of int8, until it agrees


class ExportRefused(GraphError):
    """A graph that does not agree with its model is not written."""


def check_output(model: Beit, output: Output) -> None:
    """Refuse what this model does not have."""
    output.check(model.config.depth)
    name = type(model).__name__
    if output.kind == "classification" and not (
        isinstance(model, BeitForImageClassification) and model.config.num_classes
    ):
        raise GraphError(f"{name} has no classifier; fine-tune it first, or use --kind features")
    if output.kind == "masked" and not isinstance(model, BeitForMaskedImageModeling):
        raise GraphError(f"{name} guesses no tokens; --kind masked is for a pre-trained model")


class OutputOf(nn.Module):
    """A model's chosen output as a module of its own.

    classification: (B, C). features: (B, D), or (B, 1 + L, D) for tokens. masked: (B, L, V), all
    patches, of pictures and a (B, L) bool mask, True = hidden.
    """

    def __init__(self, model: Beit, output: Output) -> None:
        super().__init__()
        check_output(model, output)
        self.model, self.output = model, output

    def forward(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        if self.output.kind == "classification":
            return self.model(images)
        if self.output.kind == "features":
            return embed(self.model, images, self.output.pooling, self.output.layer)
        assert isinstance(self.model, BeitForMaskedImageModeling)
        return self.model.logits(Beit.forward(self.model, images, bool_masked_pos))


def export(
    model: Beit,
    file: Path,
    to: Target,
    output: Output | None = None,
    *,
    precision: Literal["fp32", "int8"] = "fp32",
    pictures: Sequence[np.ndarray] = (),
    min_agreement: float = 0.99,
    anyway: bool = False,
    model_sha256: str = "",
    half_size: bool = False,
    max_size: int | None = None,
) -> dict[str, Any]:
    """Write a graph file, if it agrees with the model, and for int8 a report beside it.

    output: what it computes; the classes where None.
    pictures: prepared (3, H, W) float32 ones. int8 needs them: one half sets the ranges, the other half
        is what agreement is measured on.
    min_agreement: share of these whose best class must be the model's, for int8; where a picture may have
        several labels, all of them; where the output has no classes, the lowest cosine.
    anyway: write int8 below it as well.
    half_size: OpenVINO only: keep constants as float16, for a graph that computes in bf16.
    max_size: pixels of the longest side: pictures may have any size of whole patches, two or more a side,
        up to it, and a mask is (B, h, w). It costs time at every picture.
    Returns the report. Raises ExportRefused, ValueError; OSError where the place cannot be written.
    """
    output = output or Output()
    if to not in get_args(Target):
        raise ValueError(f"to {to!r} is not one of {', '.join(get_args(Target))}")
    if file.suffix != SUFFIX_OF[to]:
        raise ValueError(f"{file} must end in {SUFFIX_OF[to]} for {to}")
    require(to)
    if to == "onnx":
        _require_module("onnxscript", "onnx")
    if precision == "int8":
        _check_int8(to, output, pictures, max_size)
        _check_report(file.with_suffix(".json"))
    check_whole(model)
    prepared, own = (
        " x ".join(map(str, size)) for size in (model.image_spec.size, model.config.image_height_width)
    )
    if prepared != own:
        raise GraphError(
            f"its pictures are prepared at {prepared} and the model is of {own}; load it with one img_size "
            "for both (--img-size)"
        )
    model = _as_float32(model)
    most = _check_max_size(model, max_size)
    whole = OutputOf(model, output).eval()
    about = describe(model, output, precision, model_sha256, max_size)
    inputs = _examples(model, output, pictures, most)
    traced = OutputOf(any_size(model, most), output).eval() if most else whole
    beside = tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.")
    with naming(file), beside as folder:
        made = Path(folder) / file.name
        # What is traced without gradients is decomposed without them. A fused kernel's order of memory,
        # which the ONNX writer takes over, is one that it cannot write where sizes are symbols.
        plain = sdpa_kernel(SDPBackend.MATH) if most else nullcontext()
        with _quietly(), torch.no_grad(), plain:
            program = _trace(traced, inputs[0], model.config.patch_size, most)
            write = {"onnx": _write_onnx, "openvino": _write_openvino, "torch": _write_torch}[to]
            write(program, made, about, half_size)
        error, largest = _difference(made, whole, inputs)
        report: dict[str, Any] = {"file": file.name, "to": to, "max_error": error}
        tolerance = 2e-3 if half_size else TOLERANCE
        if not error <= tolerance * max(1.0, largest):
            raise ExportRefused(
                f"{file} was not written: its output differs from the model's by "
                f"{error:.2g}, where {tolerance:g} is allowed"
            )
        if precision == "int8":
            made, found = _quantise(model, whole, made, about, pictures, min_agreement)
            report |= found
            if report["agreement"] < min_agreement and not anyway:
                raise ExportRefused(
                    f"{file} was not written: in int8 it agrees with the model on "
                    f"{report['agreement']:.1%} of {report['measured_on']} pictures, below "
                    f"{min_agreement:.0%}; give more pictures of the kind it will see, or --anyway"
                )
        report |= {"kind": output.kind, "precision": precision, "model_sha256": about.model_sha256}
        _move(made, file)
    report["bytes"] = sum(part.stat().st_size for part in parts_of(file))
    if precision == "int8":
        content = json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n"
        write_atomically(file.with_suffix(".json"), content)
    return report


def describe(
    model: Beit, output: Output, precision: str, model_sha256: str = "", max_size: int | None = None
) -> About:
    """What a graph of this model says of itself."""
    classes = model.config.num_classes if output.kind == "classification" else 0
    return About(
        kind=output.kind,
        pooling=output.pooling,
        layer=output.layer,
        precision=precision,
        labels=tuple(model.id2label.get(i, str(i)) for i in range(classes)),
        image_spec=model.image_spec,
        config=asdict(model.config),
        model_sha256=model_sha256 or hash_of(model),
        made_by=f"beit {version('beit')}",
        max_size=max_size,
    )


def hash_of(model: Beit) -> str:
    """SHA-256 of a model in memory: its tensors, sizes, classes and preparation."""
    facts = (asdict(model.config), sorted(model.id2label.items()), asdict(model.image_spec))
    digest = hashlib.sha256(repr((type(model).__name__, facts)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


# --- Writing ---------------------------------------------------------------------------------------------


def _as_float32(model: Beit) -> Beit:
    held = {(p.dtype, p.device.type) for p in model.parameters()}
    if held == {(torch.float32, "cpu")} and not model.training:
        return model
    return copy.deepcopy(model).to("cpu", torch.float32).eval()


def _check_max_size(model: Beit, max_size: int | None) -> int:
    """Patches of the longest side that a graph takes; 0 where the size is the model's."""
    if max_size is None:
        return 0
    usual, patch = max(model.config.image_height_width), model.config.patch_size
    least = max(usual, 2 * patch)
    if max_size < least or max_size % patch:
        below = max(max_size // patch * patch, least)
        nearest = f"{below} or {below + patch}" if max_size > least else f"{least}"
        raise ValueError(
            f"max_size {max_size} is not a multiple of {patch} from {least} on, the model's own size; use "
            f"{nearest}"
        )
    return max_size // patch


def _examples(
    model: Beit, output: Output, pictures: Sequence[np.ndarray], most: int
) -> list[tuple[np.ndarray, ...]]:
    """Inputs to compare with, three pictures each: pictures where there are some, else noise.

    One of the usual size; where there may be others, the highest and the widest of two patches across:
    every side's resize is in them, and a bias for all pairs of the largest size is not.
    """
    rng = np.random.default_rng(0)
    config = model.config
    grids = [config.grid, (most, 2), (2, most)] if most else [config.grid]
    inputs: list[tuple[np.ndarray, ...]] = []
    for h, w in grids:
        shape = (3, config.in_chans, h * config.patch_size, w * config.patch_size)
        images = rng.standard_normal(shape, dtype=np.float32)
        if len(pictures) >= 3 and (h, w) == config.grid:
            images = np.stack(pictures[:3])
        mask = rng.random((3, h, w) if most else (3, h * w)) < 0.4
        inputs.append((images, mask) if output.kind == "masked" else (images,))
    return inputs


def _trace(
    whole: nn.Module, inputs: tuple[np.ndarray, ...], patch_size: int, most: int
) -> torch.export.ExportedProgram:
    """most: patches of the longest side, where sizes are free; else 0."""
    batch = torch.export.Dim("batch")
    shapes: list[dict[int, Any]] = [{0: batch} for _ in inputs]
    if most:  # torch takes a size of one for a constant
        h, w = torch.export.Dim("h", min=2, max=most), torch.export.Dim("w", min=2, max=most)
        shapes[0] |= {2: patch_size * h, 3: patch_size * w}
        for mask in shapes[1:]:
            mask |= {1: h, 2: w}
    return torch.export.export(
        whole, tuple(map(torch.from_numpy, inputs)), dynamic_shapes=tuple(shapes), strict=False
    )


def _write_torch(program: Any, file: Path, about: About, half_size: bool) -> None:
    stream = io.BytesIO()  # given a file on a full disk, torch aborts the process
    torch.export.save(program, stream, extra_files={"beit.json": about.to_json()})
    file.write_bytes(stream.getbuffer())


def _write_onnx(program: Any, file: Path, about: About, half_size: bool) -> None:
    written = torch.onnx.export(
        program, dynamo=True, verbose=False, opset_version=OPSET, output_names=["output"]
    )
    assert written is not None
    graph = written.model
    for part in (graph.graph, *graph.graph, *(v for node in graph.graph for v in node.outputs)):
        part.metadata_props.clear()  # stack traces, with the paths of whoever wrote it
    graph.metadata_props.clear()
    graph.metadata_props["beit"] = about.to_json()
    big = sum(tensor.nbytes for tensor in program.state_dict.values() if hasattr(tensor, "nbytes"))
    if big > 1.9e9:
        raise ValueError("the model is over 2 GB, more than one .onnx file holds; use --to openvino")
    written.save(file)


def _write_openvino(program: Any, file: Path, about: About, half_size: bool) -> None:
    graph = import_openvino().convert_model(program)
    _attention_in_parts(graph, about.config["embed_dim"] // about.config["num_heads"])
    graph.set_rt_info(about.to_json(), "beit")
    _save_openvino(graph, file, half_size)


def _save_openvino(graph: Any, file: Path, half_size: bool) -> None:
    try:
        import_openvino().save_model(graph, file, compress_to_fp16=half_size)
    except RuntimeError as error:
        if "iostream" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "OpenVINO does not say why, a full disk most often") from error


def _attention_in_parts(graph: Any, head_dim: int) -> None:
    """Write attention as products, bias and softmax: 3 % faster than as OpenVINO takes it apart itself."""
    from openvino import opset13 as opset

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention":
            continue
        queries, keys, values, *bias = (node.input_value(i) for i in range(node.get_input_size()))
        scale = np.float32(head_dim**-0.5)
        scores = opset.multiply(opset.matmul(queries, keys, False, True), opset.constant(scale))
        weights = opset.softmax(opset.add(scores, bias[0]) if bias else scores, -1)
        node.output(0).replace(opset.matmul(weights, values, False, False).output(0))


def _run(whole: nn.Module, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    with torch.inference_mode():
        output: np.ndarray = whole(*map(torch.from_numpy, inputs)).numpy()
    return output


def _difference(
    file: Path, whole: nn.Module, inputs: Sequence[tuple[np.ndarray, ...]]
) -> tuple[float, float]:
    """How far the written file is from the model, for batches of three and for one alone; and from what."""
    graph = open_graph(file, trusted=True)
    worst = largest = 0.0
    for three in inputs:
        expected = _run(whole, three)
        for count in (3, 1):
            found, wanted = graph(*(part[:count] for part in three)), expected[:count]
            if found.shape != wanted.shape:
                raise ExportRefused(
                    f"the graph answers {found.shape} where the model answers {wanted.shape}"
                )
            worst = float(np.maximum(worst, np.abs(found - wanted).max()))
        largest = float(np.maximum(largest, np.abs(expected).max()))
    return worst, largest


def parts_of(file: Path) -> list[Path]:
    """The files of a graph, in the order in which they are written; OpenVINO's has two."""
    return [file.with_suffix(".bin"), file] if file.suffix == ".xml" else [file]


def _move(made: Path, file: Path) -> None:
    """Bring a whole graph to its place; the .xml, without which nobody opens the .bin, goes first and comes
    last, so that there is never one beside another's .bin."""
    if made.suffix == ".xml":
        file.unlink(missing_ok=True)
    for part, place in zip(parts_of(made), parts_of(file), strict=True):
        flush(part)
        os.replace(part, place)


def _require_module(module: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise ValueError(f'this export needs {module}: pip install "beit[{extra}]"')


@contextmanager
def _quietly() -> Iterator[None]:
    """What exporters print, log and warn is about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- int8 ------------------------------------------------------------------------------------------------


def _check_report(file: Path) -> None:
    """Refuse to write the report over a file of something else."""
    if file.exists():
        try:
            ours = "max_error" in json.loads(file.read_bytes())
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise CannotWrite(
                f"{file}, where the report goes, is something else; name another graph file"
            )


def _check_int8(
    to: Target, output: Output, pictures: Sequence[np.ndarray], max_size: int | None
) -> None:
    if to == "torch":
        raise ValueError("int8 is written for openvino and onnx")
    if max_size is not None:
        raise ValueError("int8 is calibrated at one size; leave out max_size, or write fp32")
    if output.kind == "masked":
        raise ValueError("int8 is for classification and features")
    if len(pictures) < 8:
        raise ValueError(
            f"int8 is calibrated on pictures of the kind it will see: 8 or more, 256 are good; "
            f"{len(pictures)} were given (--pictures PLACE)"
        )
    if to == "openvino":
        _require_module("nncf", "openvino")


def _quantise(
    model: Beit,
    whole: nn.Module,
    exact: Path,
    about: About,
    pictures: Sequence[np.ndarray],
    min_agreement: float,
) -> tuple[Path, dict[str, Any]]:
    """The first int8 graph that agrees, with more and more layers kept out of it, and its report.

    If none does, the one that agrees best.
    """
    half = len(pictures) // 2
    calibration, held_out = pictures[:half], np.stack(pictures[half:])
    expected = np.concatenate([_run(whole, (part,)) for part in _batches(held_out)])
    names = _linears(exact)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = [name for name in layers if name != "head" or about.kind == "classification"]
    layers = layers[: len(names)]  # features of an early layer: the later ones are not in the graph
    ranked: list[tuple[str, float]] = []
    best: tuple[Path, dict[str, Any]] | None = None
    for number, keep in enumerate(TRIES):
        if keep > len(layers):
            break
        if keep and not ranked:
            ranked = layer_errors(model, whole, layers, calibration)
        kept = [name for name, _ in ranked[:keep]]
        made = exact.with_name(f"{exact.stem}-{number}{exact.suffix}")
        quantise = _quantise_openvino if exact.suffix == ".xml" else _quantise_onnx
        with _quietly():
            quantise(
                exact,
                made,
                replace(about, precision="int8"),
                calibration,
                [names[layers.index(name)] for name in kept],
            )
        found = _compare(made, exact, held_out, expected, about)
        found |= {
            "calibrated_on": half,
            "kept_in_higher_precision": dict(ranked[:keep]),
            "quantised_layers": len(layers) - keep,
        }
        if best is None or found["agreement"] > best[1]["agreement"]:
            best = made, found
        if found["agreement"] >= min_agreement and found["min_cosine"] >= 0.99:
            best = made, found
            break
    assert best is not None
    return best


def _batches(images: np.ndarray, size: int = 8) -> list[np.ndarray]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _compare(
    made: Path, exact: Path, images: np.ndarray, expected: np.ndarray, about: About
) -> dict[str, Any]:
    """int8 beside the model's outputs, and beside the same graph in higher precision for its speed."""
    graph, higher = open_graph(made, _rest(made)), open_graph(exact, _rest(exact))
    ours = np.concatenate([graph(part) for part in _batches(images)])
    cosine = float(cosines(ours, expected).min())
    if about.kind != "classification":
        agreement, what = cosine, "lowest cosine"
    elif about.config["several_labels"]:
        agreement, what = float(((ours > 0) == (expected > 0)).all(axis=1).mean()), "same labels"
    else:
        same = ours.argmax(axis=1) == expected.argmax(axis=1)
        agreement, what = float(same.mean()), "same best class"
    ms = milliseconds({"int8": graph, _rest(exact): higher}, images[:1])
    return {
        "agreement": agreement,
        "agreement_is": what,
        "min_cosine": cosine,
        "mean_abs_error": float(np.abs(ours - expected).mean()),
        "max_abs_error": float(np.abs(ours - expected).max()),
        "output_std": float(expected.std()),
        "measured_on": len(images),
        "ms_batch_1": {name: float(np.median(times)) for name, times in ms.items()},
    }


def _rest(file: Path) -> str:
    """What an engine would compute the rest of a graph in."""
    return "bf16" if file.suffix == ".xml" and multiplies_bf16() else "fp32"


def layer_errors(
    model: Beit, whole: nn.Module, layers: Sequence[str], pictures: Sequence[np.ndarray]
) -> list[tuple[str, float]]:
    """What each linear layer costs if it alone is int8: (name, root mean square error), worst first.

    As the runtimes do it: weights symmetric by output channel, activations from their lowest to their
    highest by tensor.
    """
    images = torch.from_numpy(np.stack(pictures[:RANK_ON]))
    with torch.inference_mode():
        expected = whole(images)
        errors = {}
        for name in layers:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            weight = layer.weight.data
            hook = _input_of(model, name).register_forward_pre_hook(_fake_quantise_input)
            layer.weight.data = _fake_quantise_weight(weight)
            try:
                errors[name] = float((whole(images) - expected).pow(2).mean().sqrt())
            finally:
                layer.weight.data = weight
                hook.remove()
    return sorted(errors.items(), key=lambda pair: -pair[1])


def _input_of(model: nn.Module, name: str) -> nn.Module:
    """The module that is called with a layer's input: qkv's weight is used by its attention."""
    return model.get_submodule(name.removesuffix(".qkv"))


def _fake_quantise_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = max(high - low, 1e-8) / 255
    zero = round(-low / scale)
    return (torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255), *args[1:])


def _fake_quantise_weight(weight: Tensor) -> Tensor:
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
    return (weight / scale).round().clamp(-127, 127) * scale


def _linears(file: Path) -> list[str]:
    """The names of a graph's products with weights, in the order of the model's linear layers."""
    if file.suffix == ".xml":
        graph = import_openvino().Core().read_model(file)
        return [node.get_friendly_name() for node in graph.get_ordered_ops() if _has_weight(node)]
    import onnx

    content = onnx.load(file, load_external_data=False)
    weights = {tensor.name for tensor in content.graph.initializer if len(tensor.dims) == 2}
    return [
        node.name
        for node in content.graph.node
        if node.op_type in ("MatMul", "Gemm") and weights & set(node.input)
    ]


def _has_weight(node: Any) -> bool:
    if node.get_type_name() != "MatMul":
        return False
    source = node.input_value(1).get_node()
    while source.get_type_name() in ("Convert", "Transpose", "Multiply"):
        source = source.input_value(0).get_node()
    return bool(source.get_type_name() == "Constant")


def _quantise_openvino(
    exact: Path, made: Path, about: About, pictures: Sequence[np.ndarray], kept: list[str]
) -> None:
    openvino = import_openvino()  # before NNCF, which reports too
    import nncf

    graph = openvino.Core().read_model(exact)
    products = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
    # With AMX attention in int8 is slower than in bf16, by what is spent on going from one to the other.
    attention = [node.get_friendly_name() for node in products if not _has_weight(node)]
    with signal_stack_kept():
        smaller = nncf.quantize(
            graph,
            nncf.Dataset([picture[None] for picture in pictures]),
            model_type=nncf.ModelType.TRANSFORMER,  # symmetric weights, activations from lowest to highest
            subset_size=len(pictures),
            # The pixels' own layer is under 1 % of the work, and what it loses is lost for all others.
            ignored_scope=nncf.IgnoredScope(names=[*kept, *attention], types=["Convolution"]),
        )
    smaller.set_rt_info(about.to_json(), "beit")
    _halve_constants(smaller)
    _save_openvino(smaller, made, half_size=False)


def _halve_constants(graph: Any) -> None:
    """Hold large float32 constants as float16: biases, N x N a head and block, outweigh what is int8.

    `compress_to_fp16` leaves quantised graphs as they are.
    """
    from openvino import Type
    from openvino import opset13 as opset

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != Type.f32:
            continue
        if node.get_byte_size() < HALVED_BYTES or not np.abs(node.data).max() < np.finfo(np.float16).max:
            continue
        whole = opset.convert(opset.constant(node.data.astype(np.float16)), "f32")
        for user in node.output(0).get_target_inputs():
            user.replace_source_output(whole.output(0))


def _quantise_onnx(
    exact: Path, made: Path, about: About, pictures: Sequence[np.ndarray], kept: list[str]
) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Pictures(CalibrationDataReader):  # type: ignore[misc]  # it has no types
        waiting = iter(pictures)

        def get_next(self) -> dict[str, np.ndarray] | None:
            picture = next(self.waiting, None)
            return None if picture is None else {"images": picture[None]}

    wanted = set(_linears(exact)) - set(kept)
    quantize_static(
        exact,
        made,
        Pictures(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=sorted(wanted),
    )
    content = onnx.load(made)
    del content.metadata_props[:]
    onnx.helper.set_model_props(content, {"beit": about.to_json()})
    onnx.save(content, made)
