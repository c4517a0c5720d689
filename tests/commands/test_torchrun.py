"""The training commands over two processes, begun by torchrun or as srun does: they make what one makes,
and one goes on from them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, command_line
from forked import beit, ranks

from beit.data import batch_at, open_source
from beit.run import read_metrics

from .conftest import PRETRAIN, TOKENIZER, Done, run, same_weights

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun of POSIX")


def line(out: Path, *words: str | Path, **options: object) -> list[str]:
    """`torchrun --nproc-per-node 2 -m beit ...`, in words."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*command, "-m", "beit", *command_line(*words, out=out, **options)]


def two_processes(out: Path, *words: str | Path, code: int = 0, **options: object) -> str:
    """`beit ...` as srun begins it: a process for each rank, told by its environment. What both said."""
    together = ranks(2, beit, *command_line(*words, out=out, **options))
    said = [rank.communicate() for rank in together]
    assert [rank.returncode for rank in together] == [code, code], said
    assert [out for out, _ in said] == ["", ""]
    return "".join(err for _, err in said)


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of float32 sums, which AdamW's first steps enlarge."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=3e-4, rtol=1e-3, msg=name)


@pytest.fixture
def short(tokenizer: Done) -> dict[str, Any]:
    return {**PRETRAIN, "tokenizer": tokenizer.folder, "log_every": 2, "lr": 1e-3, "steps": 6}


@pytest.mark.parametrize(
    "how",
    [{}, {"shard": True, "device_batch_size": 4}],
    ids=["ddp", "fsdp-in-parts"],
)
def test_two_processes_pretrain_as_one_does(
    shapes: Path, tmp_path: Path, short: dict[str, Any], how: dict[str, Any]
) -> None:
    said = two_processes(tmp_path / "two", "pretrain", shapes / "train", **short, **how)
    assert said.count("2 x cpu in fp32") == 1, "only the main process speaks"
    two = Done(tmp_path / "two", {}, said)
    one = run(tmp_path / "one", "pretrain", shapes / "train", **short)
    for ours, theirs in zip(two.metrics, one.metrics, strict=True):
        for name in ("loss", "token_accuracy", "masked_ratio", "target_perplexity", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    close(two.weights, one.weights)
    files = [{p.name for p in done.folder.iterdir()} for done in (two, one)]
    assert files[0] == files[1]


def test_one_process_goes_on_from_two(
    shapes: Path, tmp_path: Path, tokenizer: Done, short: dict[str, Any]
) -> None:
    """The newest checkpoint of the two is torn, so it goes on from the one before."""
    options = {**short, "save_every": 4}
    two_processes(tmp_path / "run", "pretrain", shapes / "train", **options)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    step_6 = tmp_path / "run" / "checkpoints" / "step-00000006"
    (step_6 / "model.safetensors").write_bytes(b"torn")
    went_on = run(tmp_path / "run", "pretrain", shapes / "train", **options)
    assert "going on from step 4 of 6" in went_on.said
    one = run(tmp_path / "one", "pretrain", shapes / "train", **options)
    close(went_on.weights, one.weights)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("how", [{}, {"shard": True}], ids=["ddp", "fsdp"])
def test_two_processes_one_killed_then_both_stopped_end_bit_for_bit_as_if_not(
    shapes: Path, tmp_path: Path, short: dict[str, Any], how: dict[str, Any]
) -> None:
    """SIGKILL takes one of torchrun's two away; SIGTERM goes to torchrun, which hands it on."""
    options = {**short, **how, "steps": 40, "save_every": 12, "log_every": 1}
    out, step = tmp_path / "broken", 0
    for blow, least in ((signal.SIGKILL, 14), (signal.SIGTERM, 26)):
        command = line(out, "pretrain", shapes / "train", **options)
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while len(read_metrics(out / "metrics.jsonl")) < least:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if blow == signal.SIGTERM else int(ranks[-1]), blow)
        said = process.communicate()[1]
        assert process.returncode not in (None, 0)
        assert not (out / "config.json").exists()
        assert not step or f"going on from step {step} of 40" in said
        step = max(int(folder.name[5:]) for folder in (out / "checkpoints").glob("step-*"))
        assert least - 12 < step < 40
    assert f"stopped and saved at step {step} of 40" in said
    assert f"going on from step {step} of 40" in two_processes(
        out, "pretrain", shapes / "train", **options
    )
    two_processes(tmp_path / "whole", "pretrain", shapes / "train", **options)
    broken, whole = (Done(folder, {}, "") for folder in (out, tmp_path / "whole"))
    same_weights(broken, whole)
    assert [m["loss"] for m in broken.metrics] == [m["loss"] for m in whole.metrics]


def test_where_another_process_ends_the_main_one_saves(
    shapes: Path, tmp_path: Path, short: dict[str, Any]
) -> None:
    """The second alone meets a picture that is none, in the third step."""
    data, out = shutil.copytree(shapes / "train", tmp_path / "data"), tmp_path / "run"
    source = open_source(data)
    (_, met), *_ = batch_at(2, len(source), short["batch_size"], 0, rank=1, world=2)
    Path(source.name(met)).write_bytes(b"none")
    options = {**short, "max_bad_images": 0, "workers": 0, "seed": 0}
    both = ranks(2, beit, *command_line("pretrain", data, out=out, **options))
    said = [rank.communicate()[1] for rank in both]
    assert both[1].returncode == 4
    assert both[0].returncode not in (0, None)
    assert "run: step 2 is saved" in said[0]
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-00000002"]
    went_on = run(out, "pretrain", data, **{**options, "max_bad_images": 0.1})
    assert "going on from step 2 of 6" in went_on.said


@pytest.mark.parametrize("kind", ["dvae", "vqkd"])
def test_two_processes_train_a_tokenizer_together(shapes: Path, tmp_path: Path, kind: str) -> None:
    """The batch is one batch, and so is the codebook: the same counts, and all codes of both alike."""
    options = {**TOKENIZER, "kind": kind, "steps": 4, "log_every": 1, "lr": 1e-3, "crop_scale": (1, 1)}
    if kind == "vqkd":
        del options["hidden_dim"]
        options |= {"model": "beit_mini_patch8_32", "decoder_depth": 1}
    two_processes(tmp_path / "two", "train-tokenizer", shapes / "train", **options)
    two = Done(tmp_path / "two", {}, "")
    one = run(tmp_path / "one", "train-tokenizer", shapes / "train", **options)
    assert [line["step"] for line in two.metrics] == [1, 2, 3, 4]
    if kind == "vqkd":  # the patches stand in the order of the ranks, so it begins with others
        assert two.metrics[-1]["live_codes"] > 0.1
        assert two.metrics[-1]["cosine"] == pytest.approx(one.metrics[-1]["cosine"], rel=0.1)
        return
    for ours, theirs in zip(two.metrics, one.metrics, strict=True):
        assert ours["psnr_db"] == pytest.approx(theirs["psnr_db"], rel=1e-3)
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.02)


def test_what_two_processes_log_of_a_tokenizer_is_the_same_after_a_resume(
    shapes: Path, tmp_path: Path
) -> None:
    """A line is of all steps since the one before, those before the checkpoint too."""
    options = {**TOKENIZER, "steps": 4, "log_every": 4, "save_every": 2, "lr": 1e-3}
    two_processes(tmp_path / "run", "train-tokenizer", shapes / "train", **options)
    unbroken = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    (tmp_path / "run" / "config.json").unlink()
    two_processes(tmp_path / "run", "train-tokenizer", shapes / "train", **options)
    again = (tmp_path / "run" / "metrics.jsonl").read_text()
    told = [json.loads(text) for text in (unbroken, again)]
    for key in ("step", "psnr_db", "live_codes", "perplexity"):
        assert told[0][key] == told[1][key]


@pytest.mark.parametrize(
    ("batch_size", "told"),
    [
        (13, "batch_size 13 does not divide among 2 processes; use --batch-size 12 or 14"),
        (40, "too few for a batch of 40 over 2 processes: 36 pictures; use --batch-size 36 or less"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(
    shapes: Path, tmp_path: Path, short: dict[str, Any], batch_size: int, told: str
) -> None:
    options = {**short, "batch_size": batch_size}
    said = two_processes(tmp_path / "run", "pretrain", shapes / "train", code=2, **options)
    assert told in said
    assert not (tmp_path / "run").exists()
