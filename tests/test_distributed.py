"""One run over 1, 2 and 4 gloo processes, DDP and FSDP2: the same samples, losses, weights, checkpoints.

Run as a program, this file is what each process does.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT
from forked import ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import beit.run
from beit import distributed
from beit.atomic import CannotWrite
from beit.commands.pretrain import MaskedLogits
from beit.data import batch_at, sample_rng
from beit.masking import sample_mask
from beit.model import BeitConfig, BeitForMaskedImageModeling
from beit.optim import EMA, adamw, param_groups, update
from beit.run import Run, Stopped
from beit.settings import RunError
from beit.snapshots import load_snapshot, snapshots, verify_snapshot, write_files

CONFIG = BeitConfig(
    img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2
).for_pretraining(11)
SAMPLES, BATCH, STEPS = 22, 8, 6  # 2 steps an epoch, 6 samples of each left out


@dataclass(frozen=True)
class Settings:
    seed: int = 3


@dataclass
class Training:
    """Masked pre-training on noise: a sample and its tokens are functions of its index."""

    out: Path
    shard: bool = False
    compile: bool = False
    device_batch_size: int = 0
    stop_after: int = -1  # a step in which the last rank alone hears SIGTERM
    poison_after: int = -1  # a step in which the last rank alone has gradients that are not numbers
    full_after: int = -1  # a step from which on the last rank alone has no room on its disk
    losses: list[float] = field(default_factory=list)
    samples: list[list[tuple[int, int]]] = field(default_factory=list)

    def go(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = BeitForMaskedImageModeling(CONFIG).train()
        for block in model.blocks if self.compile else ():
            block.compile(backend="aot_eager")  # the graphs of the default backend, not its kernels
        network = distributed.wrap(MaskedLogits(model), self.shard)
        self.units = [name for name, m in network.named_modules() if isinstance(m, FSDPModule)]
        optimizer = adamw(param_groups(model, 0.05), lr=0.01)
        self.ema = EMA(model, 0.9)
        run = Run(self.out, Settings())
        parts = distributed.accumulation(BATCH, self.device_batch_size)
        last_rank = distributed.rank() == distributed.size() - 1
        every = {"save_every": 4, "look_every": 5}
        for step, chosen in run.steps(
            model, optimizer, STEPS, self.batches, seed=3, ema=self.ema, **every
        ):
            if step == self.stop_after and last_rank:
                signal.raise_signal(signal.SIGTERM)
            if step == self.full_after and last_rank:
                beit.run.write_files = no_room  # type: ignore[assignment]
            images, masks, tokens = map(torch.stack, zip(*map(sample, chosen), strict=True))
            count = distributed.mean(masks.sum())
            loss = torch.zeros(())
            for number, part in enumerate(torch.arange(len(chosen)).tensor_split(parts), 1):
                with distributed.gradients_sent(network, last=number == parts):
                    (logits,) = network(images[part], masks[part])
                    targets = tokens[part][masks[part]]
                    part_loss = F.cross_entropy(logits, targets, reduction="sum") / count
                    part_loss.backward()
                loss += part_loss.detach()
            if step == self.poison_after and last_rank:
                loss *= math.nan
            loss = distributed.mean(loss)
            update(optimizer, loss, clip_grad_norm=1.0)
            self.losses.append(loss.item())
            self.samples.append(chosen)
            run.log(step + 1, loss=loss.item())
        return distributed.unsharded(model, lambda: BeitForMaskedImageModeling(CONFIG)).state_dict()

    def batches(self, steps: range) -> Any:
        rank, world = distributed.rank(), distributed.size()
        return (batch_at(step, SAMPLES, BATCH, 3, rank, world) for step in steps)


def no_room(*_: object) -> dict[str, str]:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sample(epoch_and_index: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    epoch, index = epoch_and_index
    rng = sample_rng(3, epoch, index)
    image = torch.from_numpy(rng.standard_normal((3, 16, 16), dtype=np.float32))
    mask = torch.from_numpy(sample_mask(CONFIG.grid, int(rng.integers(3, 9)), rng, min_block=2))
    return image, mask, torch.from_numpy(rng.integers(0, 11, CONFIG.grid))


# --- What each process does ------------------------------------------------------------------------


def work(folder: Path, *names: str) -> None:
    """Each named training, its losses, samples and weights written for the test to read."""
    trainings = {
        "ddp": {},
        "parts": {"device_batch_size": 3},
        "poisoned": {"poison_after": 2},
        "sharded": {"shard": True},
        "sharded-parts": {"shard": True, "device_batch_size": 3},
        "sharded-compiled": {"shard": True, "compile": True},
        "stopped": {"stop_after": 4},
        "sharded-stopped": {"shard": True, "stop_after": 4},
        "sharded-full": {"shard": True, "full_after": 5},
        "from-one": {"shard": True},
    }
    with distributed.joined("cpu") as device:
        assert device.type == "cpu"
        rank, told = distributed.rank(), {}
        for name in names:
            training = Training(folder / name, **trainings[name])
            try:
                weights = training.go()
                if distributed.is_main():
                    save_file(weights, folder / f"{name}.safetensors")
            except Stopped as stopped:
                told[f"{name}-code"] = stopped.exit_code
            except CannotWrite as error:
                told[f"{name}-error"] = str(error)
                beit.run.write_files = write_files
            told[name] = {"losses": training.losses, "samples": training.samples}
            told[name] |= {"units": training.units}
        try:
            Run(folder / "file", Settings())
        except CannotWrite as error:
            told["error"] = str(error)
        numbers = torch.tensor([1.0 + rank, 10.0 * rank])
        told["sums"] = [
            f(numbers).tolist() for f in (distributed.total, distributed.mean, distributed.highest)
        ]
        distributed.say("said once")
        (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def work_of(folder: str, *names: str) -> None:
    """`work`, of a process that was forked."""
    work(Path(folder), *names)


def begin_with(folder: str, *pictures: str) -> None:
    """Begin a run with as many pictures as are told to this rank."""
    with distributed.joined("cpu"):
        run = Run(Path(folder), Settings())
        try:
            run.begin({"pictures": int(pictures[distributed.rank()]), "data_hash": "a"}, {})
        except RunError as error:
            print(error)


@dataclass
class Together:
    """Processes that have ended: what each told, what all said."""

    folder: Path
    told: list[dict[str, Any]]
    said: str

    def losses(self, name: str) -> list[float]:
        assert all(told[name]["losses"] == self.told[0][name]["losses"] for told in self.told)
        return self.told[0][name]["losses"]

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


def torchrun(folder: Path, processes: int, *names: str) -> Together:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), __file__, str(folder), *names]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return told_by(folder, processes, done.stderr)


def by_hand(folder: Path, processes: int, *names: str) -> Together:
    """As srun does."""
    running = ranks(processes, work_of, folder, *names)
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * processes, said
    return told_by(folder, processes, "".join(said))


def told_by(folder: Path, processes: int, said: str) -> Together:
    told = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    return Together(folder, told, said)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, dict[str, Tensor]]:
    training = Training(tmp_path_factory.mktemp("alone") / "run")
    return training, training.go()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("two")
    (folder / "file").write_text("in the way")
    with pytest.raises(Stopped):
        Training(folder / "from-one", stop_after=4).go()
    return torchrun(
        folder, 2, "ddp", "parts", "poisoned", "sharded", "sharded-parts", "sharded-compiled",
        "stopped", "sharded-stopped", "from-one", "sharded-full",
    )  # fmt: skip


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("four")
    (folder / "file").write_text("in the way")
    return by_hand(folder, 4, "ddp", "stopped", "sharded-stopped")


# --- The same run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", ["two", "four"])
def test_processes_share_the_samples_of_one(
    alone: Any, processes: str, request: pytest.FixtureRequest
) -> None:
    together: Together = request.getfixturevalue(processes)
    for step, chosen in enumerate(alone[0].samples):
        shares = [told["ddp"]["samples"][step] for told in together.told]
        assert sorted(tuple(one) for share in shares for one in share) == sorted(chosen)
        assert {len(share) for share in shares} == {BATCH // len(together.told)}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal but for the order of float32 sums, which AdamW's first steps enlarge."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("processes", "name"),
    [
        ("two", "ddp"), ("two", "parts"), ("two", "sharded"), ("two", "sharded-parts"),
        ("two", "sharded-compiled"), ("four", "ddp"),
    ],
)  # fmt: skip
def test_losses_and_weights_are_those_of_one_process(
    alone: Any, processes: str, name: str, request: pytest.FixtureRequest
) -> None:
    """Masks differ in size, so a mean of the processes' means would be another loss."""
    together: Together = request.getfixturevalue(processes)
    np.testing.assert_allclose(together.losses(name), alone[0].losses, rtol=2e-6)
    close(together.weights(name), alone[1])


def test_parts_of_a_batch_in_one_process_are_the_whole(alone: Any, tmp_path: Path) -> None:
    training = Training(tmp_path / "run", device_batch_size=3)
    close(training.go(), alone[1])
    np.testing.assert_allclose(training.losses, alone[0].losses, rtol=2e-6)


@pytest.mark.parametrize("name", ["stopped", "sharded-stopped"])
@pytest.mark.parametrize("processes", ["two", "four"])
def test_a_signal_to_one_process_stops_all_at_one_step_and_one_goes_on(
    alone: Any,
    processes: str,
    name: str,
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What 2 or 4 processes saved, sharded or not, resumes on 1."""
    together: Together = request.getfixturevalue(processes)
    assert {told[f"{name}-code"] for told in together.told} == {143}
    assert {len(told[name]["losses"]) for told in together.told} == {5}
    second = Training(together.folder / name)
    weights = second.go()
    assert "going on from step 5 of 6" in capfd.readouterr().err
    assert second.samples == alone[0].samples[5:]
    np.testing.assert_allclose(second.losses, alone[0].losses[5:], rtol=2e-6)
    close(weights, alone[1])
    close(second.ema.tensors, alone[0].ema.tensors)
    assert contents(together.folder / name) == contents(alone[0].out)


def contents(run: Path) -> dict[str, dict[str, Any]]:
    """What the files of the newest checkpoint but the last hold: shapes and types by name."""
    files, _ = load_snapshot(snapshots(run / "checkpoints")[-2])
    return {file: {name: (t.shape, t.dtype) for name, t in of.items()} for file, of in files.items()}


def test_each_process_writes_its_part_of_a_sharded_checkpoint(two: Together) -> None:
    """No process ever holds, or writes, the whole."""
    folder = snapshots(two.folder / "sharded" / "checkpoints")[-1]
    verify_snapshot(folder)
    for name in ("model", "optimizer", "ema"):
        first, second = (folder / f"{name}-{part:05d}-of-00002.safetensors" for part in (1, 2))
        sizes = [sum(t.numel() for t in load_file(part).values()) for part in (first, second)]
        assert 0.4 < sizes[1] / sum(sizes) <= 0.5, "the main process has what does not divide"
    assert len(list(folder.iterdir())) == 6 + 2


def test_a_sharded_run_saves_before_it_looks(two: Together) -> None:
    """A stop signal in the look finds nobody who could write the whole."""
    for name, steps in (("ddp", [4, 6]), ("sharded", [5, 6])):
        kept = [beit.run.step_of(folder) for folder in snapshots(two.folder / name / "checkpoints")]
        assert kept == steps, "of 4, before the look 5, and the last the newest two"


def test_a_full_disk_of_one_process_ends_all_and_keeps_the_checkpoint_before(two: Together) -> None:
    for told in two.told:
        assert "No space left on device. Make room there" in told["sharded-full-error"]
        assert "to go on from step 5" in told["sharded-full-error"]
    checkpoints = two.folder / "sharded-full" / "checkpoints"
    assert [beit.run.step_of(folder) for folder in sorted(checkpoints.iterdir())] == [4, 5]
    verify_snapshot(checkpoints / "step-00000004")


def test_a_lost_part_makes_the_checkpoint_unreadable(two: Together, tmp_path: Path) -> None:
    whole = snapshots(two.folder / "sharded" / "checkpoints")[-1]
    folder = shutil.copytree(whole, tmp_path / whole.name)
    (folder / "ema-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="ema-00002"):
        verify_snapshot(folder)


def test_a_model_is_sharded_a_block_at_a_time(two: Together) -> None:
    """As one unit it would be gathered whole, which is what sharding is to spare."""
    for told in two.told:
        assert told["ddp"]["units"] == []
        assert told["sharded"]["units"] == ["", "model.blocks.0", "model.blocks.1"]


def test_what_one_process_saved_goes_on_sharded_over_two(alone: Any, two: Together) -> None:
    np.testing.assert_allclose(two.losses("from-one"), alone[0].losses[5:], rtol=2e-6)
    close(two.weights("from-one"), alone[1])


def test_what_is_not_finite_in_one_process_moves_none(alone: Any, two: Together) -> None:
    losses = two.losses("poisoned")
    assert math.isnan(losses[2])
    np.testing.assert_allclose(losses[:2], alone[0].losses[:2], rtol=2e-6)
    assert np.isfinite(losses[3:]).all()
    assert losses[3] != pytest.approx(alone[0].losses[3], rel=1e-4)
    captured = {p.name for p in (two.folder / "poisoned" / "nonfinite" / "step-00000002").iterdir()}
    assert captured == {
        "batch-0.json", "batch-0.safetensors", "batch-1.json", "batch-1.safetensors",
        "model.safetensors",
    }  # fmt: skip


def test_only_the_main_process_speaks_and_writes(two: Together, four: Together) -> None:
    for together in (two, four):
        assert together.said.count("said once") == 1
        lines = (together.folder / "ddp" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_an_error_of_the_main_process_is_every_processes_error(two: Together, four: Together) -> None:
    for together in (two, four):
        for told in together.told:
            assert "cannot write the run folder" in told["error"]


BEGUN_ANEW = """
import os, signal, sys
from pathlib import Path
from beit import distributed

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with distributed.joined("cpu"):
    together = distributed.on_each(lambda: attempt)
    Path(sys.argv[1], f"{attempt}-{distributed.rank()}").write_text(f"{together}")
    distributed.on_each(lambda: None)
    if attempt < 4 and distributed.rank() == attempt % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.on_each(lambda: None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_processes_that_torchrun_begins_anew_meet_each_other_and_not_the_dead(tmp_path: Path) -> None:
    """They are given the store of those before them, with the addresses of these."""
    script = tmp_path / "begun_anew.py"
    script.write_text(BEGUN_ANEW)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "4", str(script), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    met = {file.name: file.read_text() for file in tmp_path.glob("[0-9]-[0-9]")}
    assert met == {f"{n}-{rank}": f"[{n}, {n}]" for n in range(5) for rank in range(2)}


def test_sums_are_over_all_processes(two: Together, four: Together) -> None:
    for told in two.told:
        assert told["sums"] == [[3.0, 10.0], [1.5, 5.0], [2.0, 10.0]]
    for told in four.told:
        assert told["sums"] == [[10.0, 60.0], [2.5, 15.0], [4.0, 30.0]]


def test_processes_that_see_other_pictures_are_refused(tmp_path: Path) -> None:
    """They would go on for days, and wait for each other at the end."""
    running = ranks(2, begin_with, tmp_path / "run", "64", "60")
    for process, (told, _) in zip(running, [p.communicate() for p in running], strict=True):
        assert process.returncode == 0
        assert "do not work from the same: pictures 6" in told
        assert "data_hash" not in told
    assert not (tmp_path / "run" / "resolved.toml").exists()
    alike = ranks(2, begin_with, tmp_path / "run", "64", "64")
    assert [process.communicate() for process in alike] == [("", ""), ("", "")]


# --- One process -----------------------------------------------------------------------------------


def test_alone_nothing_is_wrapped_or_summed() -> None:
    model = BeitForMaskedImageModeling(CONFIG)
    assert distributed.wrap(model) is model
    assert distributed.wrap(model, shard=True) is model
    assert distributed.unsharded(model, lambda: BeitForMaskedImageModeling(CONFIG)) is model
    number = torch.tensor(2.5)
    for reduced in (distributed.total, distributed.mean, distributed.highest):
        assert reduced(number) == 2.5
    assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
    with distributed.joined("cpu") as device:
        assert device == torch.device("cpu")
    with pytest.raises(RunError, match="mine"):
        distributed.on_main(lambda: (_ for _ in ()).throw(RunError("mine")))


@pytest.mark.parametrize(
    ("batch_size", "at_once", "processes", "parts"),
    [(2048, 0, 1, 1), (2048, 128, 16, 1), (2048, 128, 8, 2), (2048, 128, 1, 16), (2048, 100, 2, 11),
     (7, 3, 1, 3), (8, 64, 4, 1)],
)  # fmt: skip
def test_a_batch_is_taken_in_as_many_parts_as_it_needs(
    batch_size: int, at_once: int, processes: int, parts: int
) -> None:
    assert distributed.accumulation(batch_size, at_once, processes) == parts
    share = batch_size // processes
    largest = -(-share // parts)
    assert largest <= (at_once or share)
    assert parts == 1 or -(-share // (parts - 1)) > at_once, "fewer would do"


@pytest.mark.parametrize(
    ("batch_size", "processes", "said"),
    [
        (2048, 6, "does not divide among 6 processes; use --batch-size 2046 or 2052, or 4 processes"),
        (5, 4, "use --batch-size 4 or 8, or 1 process"),
        (3, 8, "use --batch-size 8, or 3 processes"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(
    batch_size: int, processes: int, said: str
) -> None:
    with pytest.raises(ValueError, match=f"{said}$"):
        distributed.accumulation(batch_size, 0, processes)


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    work(Path(sys.argv[1]), *sys.argv[2:])
    # torch's threads of a group that has ended now and then abort a process that ends in the usual way.
    sys.stderr.flush()
    os._exit(0)
