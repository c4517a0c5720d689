"""The run folder: settings, metrics, checkpoints that survive anything, and the frame of a loop.

    run.toml          the settings, with the command's name
    resolved.toml     what they came to here, and what pictures and weights it works from
    metrics.jsonl     one JSON object a logged step
    checkpoints/      step-00000100/: model, optimizer, ema, tally .safetensors, state.json, SHA256SUMS
    nonfinite/        the first batch whose loss or gradients were not finite, to look at
    config.json, model.safetensors, ...   the finished model, which -m/--model takes

A command given the same folder and the same settings again goes on where it stopped. Over many
processes the main one writes; all of them call everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from beit import distributed
from beit.atomic import CannotWrite, flush, write_atomically
from beit.folder_lock import hold
from beit.optim import EMA
from beit.plural import counted
from beit.progress import Pace, Progress
from beit.settings import (
    RunError,
    check_same,
    check_spared,
    describe_settings,
    is_in_use,
    to_toml,
)
from beit.snapshots import (
    Tensors,
    bytes_of,
    drop,
    load_snapshot,
    room_beside,
    seal,
    size_of,
    snapshots,
    verify_snapshot,
    write_files,
    write_snapshot,
    write_tensors,
)
from beit.stop import Stopped as Stopped
from beit.stop import stop_signals
from beit.tally import Tally
from beit.training import OptimizerWatch, Training

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
# What a checkpoint gives whose bytes are not those that were written; of other errors a disk may recover.
PROVEN_WRONG = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
SAVE_AFTER_S = 900.0  # a kill or a power cut costs no more, however long a step takes
LOOK_SAVES_AFTER_S = 60.0  # what goes before a look that may take long


class NotFinite(Exception):
    """Training that does not stay finite, though it was rolled back, or never was."""

    exit_code = 1


class Run:
    """One run in one folder.

    settings: the command's frozen dataclass. Raises RunError where the folder holds something else,
    or a run with other settings, and says which. overwrite: begin again where it holds a run, but not
    when torchrun or Slurm gives the command again, or each of their restarts would lose what it saved.
    """

    def __init__(self, out: Path, settings: Any, overwrite: bool = False) -> None:
        self.out, self._settings = Path(out), settings
        self.metrics_file = self.out / "metrics.jsonl"
        self.checkpoints = self.out / "checkpoints"
        self.latest = ""  # the last logged numbers, for people
        self._pace = Pace()
        self._training: Training | None = None
        self._board: Any = None
        self._progress: Progress | None = None
        self._again = "the same command without --overwrite" if overwrite else "the same command"
        again = overwrite and distributed.begun_anew()
        if again:
            distributed.say(f"{self.out}: begun anew by who started it, so without --overwrite")
        distributed.on_main(lambda: self._open(settings, overwrite and not again))

    def _open(self, settings: Any, overwrite: bool) -> None:
        file = self.out / "run.toml"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.out)
            begins = not is_in_use(self.out)
            if overwrite and file.exists():
                self._empty(self.out)  # the settings stay, so that half of it is still a run
                begins = True
            if not begins:
                for moved in check_same(self.out, settings):
                    print(f"{self.out.name}: {moved}", file=sys.stderr)
            else:
                write_atomically(file, to_toml(describe_settings(settings)).encode())
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise CannotWrite(
                f"cannot write the run folder {self.out}: {error.strerror or error}; choose another --out"
            ) from error

    def _empty(self, folder: Path) -> None:
        """Remove all but the settings, and a link that puts the checkpoints on another disk."""
        for path in folder.iterdir():
            if path == self.checkpoints and path.is_symlink() and path.is_dir():
                self._empty(path)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self.out / "run.toml":
                path.unlink()

    def begin(self, same: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        """Keep what the settings came to, or hold it against what a run that goes on began with.

        same: what must not change, such as a hash of the pictures, and what all processes must have alike.
        told: what may, and is then said. Raises RunError.
        """
        for rank, other in enumerate(distributed.on_each(lambda: dict(same))):
            if differing := [key for key in same if other[key] != same[key]]:
                both = ", ".join(f"{key} {same[key]} and {other[key]}" for key in differing)
                raise RunError(
                    f"processes {distributed.rank()} and {rank} do not work from the same: {both}. Give "
                    "all nodes the same files"
                )
        distributed.on_main(lambda: self._begin(same, told))

    def _begin(self, same: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        text = to_toml({**same, **told})
        file, now = self.out / "resolved.toml", tomllib.loads(text)
        if not file.exists():
            write_atomically(file, text.encode())
            return
        before = tomllib.loads(file.read_text(encoding="utf-8"))
        changed = {
            key: self._in_words(key, before[key], now[key])
            for key in now
            if key in before and before[key] != now[key]
        }
        wrong = [words for key, words in changed.items() if key in same]
        if wrong:
            raise RunError(
                f"{self.out} was begun with something else: {'; '.join(wrong)}. Put that back to go on "
                "with it, or give --overwrite to begin again, or another --out"
            )
        for words in changed.values():
            print(f"{self.out.name}: goes on though {words}", file=sys.stderr)

    def _in_words(self, key: str, before: Any, now: Any) -> str:
        """What changed; of a hash, which says nothing to people, what it stands for."""
        name, settings = key.removesuffix("_hash"), vars(self._settings)
        if name == key:
            return f"{key} was {before}, now {now}"
        if name == "data":
            places = [str(settings[name]) for name in ("data", "val") if settings.get(name)]
            return f"{' or '.join(places)} holds other pictures now"
        return f"{settings.get(name)} is another {name} now"

    @property
    def finished(self) -> bool:
        """Whether the finished model is there."""
        return (self.out / "config.json").exists()

    # --- metrics -------------------------------------------------------------------------------

    def log(self, step: int, **values: float | int | str | None) -> None:
        """Append one JSON line. Numbers are rounded to six digits; what is not finite becomes null.

        In a loop that told `steps` its batch size, images_per_second, data_wait_percent, mfu_percent,
        memory_mib and skipped (updates that were not finite, so far) are added.
        """
        pace = self._pace.read()
        if pace and self._training is not None:
            pace["skipped"] = self._training.skipped
        values = {**values, **pace}
        if not distributed.is_main():
            return
        line = {"step": step, **{k: _short(v) for k, v in values.items()}}
        self.latest = ", ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float))
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CannotWrite(f"cannot write {self.metrics_file}: {error}") from error
        for key, value in line.items() if self._board else ():
            if isinstance(value, (int, float)) and key != "step":
                self._board.add_scalar(key, value, step)

    @contextmanager
    def apart(self, doing: str = "") -> Iterator[None]:
        """Time in the loop that is not training's, such as a look at the model: it slows no pace.

        doing: what takes it, told where it may take long.
        """
        if doing and self._progress is not None:
            self._progress.tell(doing)
        elif doing:
            distributed.say(f"{self.out.name}: {doing}")
        began = time.perf_counter()
        yield
        self._pace.began += time.perf_counter() - began

    def look(self, step: int, work: Callable[[], object], is_first: bool) -> None:
        """Look at what is trained, in the main process; all must call this.

        What goes wrong in the first look ends the run; after that it is said, and the training goes on.
        """

        def guarded() -> None:
            try:
                work()
            except (OSError, Stopped):
                raise
            except Exception as error:
                if is_first:
                    raise
                distributed.say(f"the look at step {step} failed, and the training goes on: {error}")

        distributed.on_main(guarded)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All logged lines; one broken by a crash is left out."""
        return read_metrics(self.metrics_file)

    # --- checkpoints ---------------------------------------------------------------------------

    def save(self, training: Training, keep_last: int = 2, keep_every: int = 0) -> None:
        """Write a checkpoint; drop all but the newest few and those of every so many steps.

        Each process writes what it holds of a sharded model, the main one all else.
        """
        if training.is_sharded:
            self._write_parts(training, keep_last, keep_every)
        else:
            distributed.on_main(lambda: self._write(training, training.tensors(), keep_last, keep_every))

    def _write(
        self, training: Training, files: Mapping[str, Tensors], keep_last: int, keep_every: int
    ) -> None:
        folder = self.checkpoints / f"step-{training.step:08d}"
        with self._told_if_full(folder):
            self._flush_metrics()
            write_snapshot(folder, files, training.counters())
            self._drop_old(keep_last, keep_every)

    def _write_parts(self, training: Training, keep_last: int, keep_every: int) -> None:
        folder = self.checkpoints / f"step-{training.step:08d}"
        files = {name: distributed.held(t) for name, t in training.tensors().items()}
        rank, processes = distributed.rank(), distributed.size()

        def begin() -> Path:
            self._flush_metrics()
            return room_beside(folder, sum(sizes))

        def finish() -> None:
            seal(beside, folder, dict(ChainMap(*sums)), training.counters())
            self._drop_old(keep_last, keep_every)

        with self._told_if_full(folder):
            sizes = distributed.on_each(lambda: size_of(files))
            beside = distributed.on_main(begin)
            try:
                sums = distributed.on_each(lambda: write_files(beside, files, rank, processes))
                distributed.on_main(finish)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise

    def _flush_metrics(self) -> None:
        if self.metrics_file.exists():
            flush(self.metrics_file)

    def _drop_old(self, keep_last: int, keep_every: int) -> None:
        for old in snapshots(self.checkpoints)[:-keep_last]:
            if not (keep_every and step_of(old) % keep_every == 0):
                drop(old)

    @contextmanager
    def _told_if_full(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = [step_of(folder) for folder in snapshots(self.checkpoints)]
            raise CannotWrite(
                f"cannot write the checkpoint {folder}: {error.strerror or error}. "
                f"Make room there, then give {self._again} to go on from step {max(kept, default=0)}"
            ) from error

    def resume(self, training: Training) -> None:
        """Load the newest checkpoint whose sums are right; without one, all stays as it is.

        Metrics logged after it are dropped: they will be logged again. What cannot be read is renamed
        to unreadable-step-..., so that it never counts as one again. Raises RunError where all would be
        done again: none can be read, or the finished model is there without one.
        """
        try:
            newest = distributed.on_main(self._newest)
        except OSError as error:
            raise CannotWrite(
                f"cannot read the checkpoints of {self.out}: {error.strerror or error}. They may be whole: "
                f"when the disk answers again give {self._again} to go on"
            ) from error
        if newest is not None:
            training.load(*load_snapshot(newest))
        elif torn := distributed.on_main(lambda: len(list(self.checkpoints.glob("unreadable-step-*")))):
            raise RunError(
                f"none of the checkpoints in {self.checkpoints} can be read ({torn} set aside, as "
                "unreadable-step-...). Put a whole copy of one there to go on from it, give --overwrite to "
                "begin again, or another --out"
            )
        elif distributed.on_main(lambda: self.finished):
            raise RunError(
                f"{self.out} holds a finished run without a checkpoint, so that all of it would be done "
                "again. Use the model that is there, give --overwrite to begin again, or another --out"
            )
        distributed.on_main(lambda: self._forget_metrics_after(training.step))

    def _newest(self) -> Path | None:
        for folder in reversed(snapshots(self.checkpoints)):
            try:
                verify_snapshot(folder)
                return folder
            except PROVEN_WRONG as error:
                print(f"checkpoint {folder} cannot be read ({error}); trying older", file=sys.stderr)
                aside = folder.with_name(f"unreadable-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
        return None

    def _forget_metrics_after(self, step: int) -> None:
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_atomically(self.metrics_file, "".join(json.dumps(k) + "\n" for k in kept).encode())

    # --- the loop's frame ----------------------------------------------------------------------

    def steps(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total: int,
        batches: Callable[[range], Iterable[T]],
        save_every: int,
        seed: int,
        *,
        ema: EMA | None = None,
        tally: Tally | None = None,
        keep_last: int = 2,
        keep_every: int = 0,
        look_every: int = 0,
        max_skipped: int = 10,
        batch_size: int = 0,
        flops_per_image: float = 0.0,
        peak_flops: float = 0.0,
        tensorboard: bool = False,
    ) -> Iterator[tuple[int, T]]:
        """Yield (step, batch) from the last checkpoint on; between steps save, show progress, stop.

        model: as it is named in checkpoints: inside DDP's wrapper, or sharded itself.
        batches: gives the batches of a range of steps. Each step starts from torch's seed for that
        step, so a resumed run draws what an unbroken one draws.
        ema: averaged after each of the optimiser's steps, and saved.
        tally: saved; what a step adds is there before the optimiser's step.
        save_every: steps between checkpoints; a quarter of an hour after the last there is one as well.
        keep_last, keep_every: the newest checkpoints that stay, and those of every so many steps.
        look_every: steps between looks that may take long. Before one there is a checkpoint where the last
        is a minute old; of a sharded run always, as its parts cannot meet in one.
        max_skipped: updates in a row that `optim.update` may leave out; no checkpoint is written between
        them. Then, or where a checkpoint would not be finite, the run goes back to the last one; the second
        time it passes over the batches it met there, the third time it raises NotFinite.
        batch_size, flops_per_image, peak_flops: pictures a step and FLOPs a picture over all processes,
        FLOP/s of one: for the numbers that `log` adds. tensorboard: log there too.

        Raises Stopped, having saved, where a stop signal asked for it; a step of more than 5 s is left
        to another thread's saving, and the process ends. CannotWrite where the disk is full.
        """
        training = self._training = Training(model, optimizer, ema, tally)
        self.resume(training)
        if tensorboard and distributed.is_main():
            self._board = open_board(self.out / "tensorboard", training.step)
        name = self.out.name
        if training.step:
            distributed.say(f"{name}: going on from step {training.step} of {total}")
        watch = OptimizerWatch(training, next(model.parameters()).device)
        saves_at = [save_every, total]
        if look_every and training.is_sharded:
            saves_at.append(look_every)
        tried: list[int] = []  # the checkpoints that were gone back to
        owed = False  # a checkpoint, put off
        self._pace = Pace(batch_size, flops_per_image, peak_flops * distributed.size(), watch.device)
        self._progress = progress = Progress(name, total, quiet=not distributed.is_main())

        def rescue(code: int) -> int | None:
            with watch.lock:
                if watch.leaving:
                    return None
                what = f"stopped; step {training.step} of {total} could not be saved"
                if self._is_saved(training.step):
                    what = stopped_at(training.step, total, self._again)
                elif not distributed.is_main():
                    time.sleep(4)  # while the main process saves
                elif training.is_finite_here() and not training.is_sharded:
                    try:
                        self._write(training, watch.tensors(), keep_last, keep_every)
                        what = stopped_at(training.step, total, self._again)
                    except CannotWrite as error:
                        what, code = str(error), error.exit_code
                progress.close()
                distributed.say(f"beit: {what}")
            return code

        def from_here() -> Iterator[T]:
            return iter(batches(range(training.step + training.jumped, total + training.jumped)))

        ahead = from_here()
        saved = time.monotonic()
        try:
            with stop_signals(rescue) as stop, progress, watch:
                while training.step < total:
                    step = training.step
                    try:
                        with self._pace.waiting():
                            batch = next(ahead)
                        torch.manual_seed(step_seed(seed, step + training.jumped, distributed.rank()))
                        yield step, batch
                    except (Exception, GeneratorExit):
                        # Of the pictures, of who reads them, or of the loop: it is over, perhaps because
                        # another process is.
                        self._save_here(training, watch, keep_last, keep_every)
                        raise
                    training.step = step + 1
                    progress.update(training.step, self.latest)
                    saving = any(training.step % steps == 0 for steps in saves_at)
                    looks = bool(look_every) and training.step % look_every == 0
                    most_s = LOOK_SAVES_AFTER_S if looks else SAVE_AFTER_S
                    stopping, due, bad = watch.agree(
                        bool(stop),
                        time.monotonic() - saved > most_s,
                        (step, batch),
                        wait=saving or looks or owed,
                        most=max_skipped,
                    )
                    if bad is not None:
                        self._capture(training, bad[0], bad[1], seed)
                    saving = saving or stopping or due or owed
                    owed = False
                    if training.in_a_row >= max_skipped or (saving and not training.is_finite()):
                        with watch.lock:
                            self._roll_back(training, tried)
                            watch.forget()
                        close(ahead)
                        ahead = from_here()
                    elif saving and training.in_a_row and not stopping and training.step < total:
                        owed = True  # or the run would go back to where it was no better
                    elif saving:
                        with watch.lock:
                            watch.leaving = stopping
                            self.save(training, keep_last, keep_every)
                        saved = time.monotonic()
                    if stopping:
                        raise Stopped(
                            stop.exit_code or 143, stopped_at(training.step, total, self._again)
                        )
            if training.skipped >= total > 0:
                raise NotFinite(
                    f"{self.out}: none of {total} updates was finite, so nothing was learned. Begin again "
                    "in another --out with a lower --lr, a --clip-grad-norm, or --precision fp32"
                )
            if stop:  # it came while the last step was saved
                raise Stopped(stop.exit_code, stopped_at(training.step, total, self._again))
        finally:
            self._progress = None
            close(ahead)

    def _is_saved(self, step: int) -> bool:
        return any(step_of(folder) == step for folder in snapshots(self.checkpoints))

    def _save_here(
        self, training: Training, watch: OptimizerWatch, keep_last: int, keep_every: int
    ) -> None:
        """Save what is done, by the main process alone, if that can be; what ends the run is told later."""
        alone = distributed.is_main() and not training.is_sharded and training.step > 0
        if not alone or not watch.lock.acquire(blocking=False):  # it ended while the weights changed
            return
        with suppress(Exception):
            if not self._is_saved(training.step) and training.is_finite_here():
                self._write(training, watch.tensors(), keep_last, keep_every)
                distributed.say(f"{self.out.name}: step {training.step} is saved")
        watch.lock.release()

    def _roll_back(self, training: Training, tried: list[int]) -> None:
        """Load the last checkpoint, and note it in `tried`; from the second time on with other batches."""
        newest = distributed.on_main(self._newest)
        step, failed_at = -1 if newest is None else step_of(newest), training.step
        why = f"{training.in_a_row} updates in a row were not finite"
        if training.in_a_row < 2:
            why = "weights or moments are not finite"
        if step < 0 or tried.count(step) == 2:
            and_so = (
                "there is no checkpoint to go back to"
                if step < 0
                else f"so they were from step {step}, with these batches and with others"
            )
            raise NotFinite(
                f"{self.out}: {why} at step {failed_at}, and {and_so}. "
                f"The first such batch is in {self.out / 'nonfinite'}. Begin again in another --out with "
                "a lower --lr, a --clip-grad-norm, or --precision fp32"
            )
        times, jumped = training.rolled_back + 1, training.jumped
        passed_over = failed_at - step if step in tried else 0
        tried.append(step)
        self.resume(training)
        training.rolled_back, training.in_a_row = times, 0
        training.jumped = jumped + passed_over
        told = f", past the batches of {counted(passed_over, 'step')}" if passed_over else ""
        distributed.say(f"{self.out.name}: {why} at step {failed_at}; going back to step {step}{told}")

    def _capture(self, training: Training, step: int, batch: Any, seed: int) -> None:
        """Keep a batch and the weights that met it, once a process."""
        weights = distributed.gathered(dict(training.model.state_dict()))
        folder = self.out / "nonfinite" / f"step-{step:08d}"
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for name, value in leaves(batch):
            if isinstance(value, (np.ndarray, Tensor)):
                tensors[name] = torch.as_tensor(value)
            else:
                rest[name] = value
        rank = distributed.rank()
        drawn = step_seed(seed, step + training.jumped, rank)
        told = {"step": step, "torch_seed": drawn, "rank": rank, "batch": rest}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / f"batch-{rank}.safetensors", tensors)
            (folder / f"batch-{rank}.json").write_text(json.dumps(told, default=str))
            if distributed.is_main():
                write_tensors(folder / "model.safetensors", weights)
        except OSError as error:
            print(f"{folder} could not be written: {error}", file=sys.stderr)
        distributed.say(f"{self.out.name}: step {step} is not finite and moved nothing; see {folder}")


def open_board(folder: Path, step: int) -> Any:
    """A TensorBoard writer; what it holds of steps after `step` is forgotten."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError('TensorBoard is not installed; pip install "beit[tensorboard]"') from None
    return SummaryWriter(str(folder), purge_step=step + 1)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.split("-")[1])


def stopped_at(step: int, total: int, again: str) -> str:
    """What is said at the end of a run that was asked to stop."""
    return f"stopped and saved at step {step} of {total}; give {again} to go on"


def check_folder(out: Path, settings: Any, overwrite: bool) -> None:
    """Refuse a folder that `Run` would refuse, before any work. All processes call it.

    And one that holds what the command reads, if it would be emptied. Settings that may be chosen later,
    being None, are not compared. Raises RunError.
    """
    overwrite = overwrite and not distributed.begun_anew()

    def check() -> None:
        if overwrite and (out / "run.toml").exists():
            check_spared(out, settings)
        elif out.is_dir() and is_in_use(out):
            check_same(out, settings, complete=False)

    distributed.on_main(check)


def close(iterator: Iterator[Any]) -> None:
    """End a generator, and the workers in it."""
    if isinstance(iterator, Generator):
        iterator.close()


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The parts of a batch that are not collections, with names such as `masks` or `views.0`."""
    if hasattr(value, "_asdict"):  # a NamedTuple
        value = value._asdict()
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name or "batch", value
        return
    for key, part in items:
        yield from leaves(part, f"{name}.{key}" if name else str(key))


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Torch's seed of a step. Mixed, since torch on a CPU looks at the lower 32 bits alone."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one broken by a crash is left out."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _short(value: float | int | str | None) -> float | int | str | None:
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


def surroundings(device: torch.device, precision: str) -> dict[str, Any]:
    """What a run works with here and may go on without: number format, processes, versions."""
    versions = {"beit": version("beit"), "torch": torch.__version__}
    return {
        "precision": precision, "device": device.type, "processes": distributed.size(), **versions
    }  # fmt: skip


def weights_hash(module: nn.Module) -> str:
    """What a network's weights are known by: of their names, types and bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
