"""What a run trains and its checkpoints hold: a model, optimiser, average and tally; and when to read them.

Weights change in the optimiser's step. `OptimizerWatch` stands on both sides of it, so that another thread
may save them, and counts the updates that `optim.update` left out for not being finite.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from beit import distributed
from beit.optim import EMA
from beit.settings import RunError
from beit.tally import Tally

T = TypeVar("T")


@dataclasses.dataclass
class Training:
    """What a checkpoint holds: a model, its optimiser, its average, a tally, and how far they are."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    ema: EMA | None = None
    tally: Tally | None = None
    step: int = 0  # finished
    skipped: int = 0  # updates that were left out, being not finite
    in_a_row: int = 0  # of them, up to now
    rolled_back: int = 0  # times
    jumped: int = 0  # steps whose batches were passed over

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All there is to save, by file."""
        files = {"model.safetensors": dict(self.model.state_dict())}
        if self.optimizer is not None:
            files["optimizer.safetensors"] = optimizer_tensors(self.model, self.optimizer)
        if self.ema is not None:
            files["ema.safetensors"] = self.ema.tensors
        if self.tally is not None:
            files["tally.safetensors"] = dict(self.tally.state_dict())
        return files

    def counters(self) -> dict[str, int]:
        """What state.json holds."""
        names = ("step", "skipped", "in_a_row", "rolled_back", "jumped")
        return {name: getattr(self, name) for name in names}

    def load(self, files: Mapping[str, Mapping[str, Tensor]], counters: Mapping[str, int]) -> None:
        """Become what `tensors` and `counters` told."""
        mine = {"model.safetensors": self.model.state_dict()}
        if self.ema is not None:
            mine["ema.safetensors"] = self.ema.tensors
        if self.tally is not None:
            self.tally.clear()
            if "tally.safetensors" in files:  # older checkpoints have none
                mine["tally.safetensors"] = self.tally.state_dict()
        for file, tensors in mine.items():
            if tensors.keys() != files[file].keys():
                raise RunError(
                    f"the {file} of the checkpoint holds other tensors than are trained here: another "
                    "version of beit wrote it. Go on with that one, or give --overwrite to begin again"
                )
            for name, tensor in tensors.items():  # one by one, so never the whole of a sharded model
                tensor.copy_(distributed.spread(files[file][name], tensor))
        if self.optimizer is not None:
            self.optimizer.state.clear()  # a checkpoint of step 0 has none
            load_optimizer_tensors(self.model, self.optimizer, files["optimizer.safetensors"])
        for key in self.counters():
            setattr(self, key, counters[key])

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the model."""
        return any(map(distributed.is_sharded, self.model.parameters()))

    def is_finite_here(self) -> bool:
        """Whether every number that this process holds is finite."""
        tensors = [distributed.local(t) for file in self.tensors().values() for t in file.values()]
        parts = [t for t in tensors if t.is_floating_point() and t.numel()]
        norms = torch._foreach_norm(parts)  # ten times as fast as asking each number
        return bool(torch.stack([norm.float().cpu() for norm in norms]).isfinite().all())

    def is_finite(self) -> bool:
        """Whether every number of all processes is finite."""
        return not distributed.highest(torch.tensor(float(not self.is_finite_here()))).item()


class OptimizerWatch:
    """Watches the optimiser of a loop: when weights may be read, and which updates were left out."""

    def __init__(self, training: Training, device: torch.device) -> None:
        self.training, self.device = training, device
        self.lock = threading.Lock()  # held while weights change or are saved
        self.late = (
            device.type == "cuda"
        )  # what came of a step is asked a step later: nobody waits for it
        self.leaving = False
        self.captured = False
        # What the optimiser does not move, as it was after the last finished step: a forward pass may
        # change buffers, and codebooks are parameters without a gradient.
        self.buffers: dict[str, Tensor] = {}
        self.tallied: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        self.skipped = torch.zeros((), device=device)
        self.waiting: deque[tuple[Any, Tensor, torch.cuda.Event | None]] = deque()
        parameters = dict(training.model.named_parameters())
        self.frozen = {name for name, p in parameters.items() if not p.requires_grad}
        self.buffer_names = training.model.state_dict().keys() - (parameters.keys() - self.frozen)

    def __enter__(self) -> OptimizerWatch:
        assert self.training.optimizer is not None
        self._keep_buffers()
        self.hooks = [
            self.training.optimizer.register_step_pre_hook(self._before),
            self.training.optimizer.register_step_post_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, *_: object) -> None:
        self.lock.acquire()

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.skipped = getattr(optimizer, "found_inf", torch.zeros((), device=self.device))
        if self.training.ema is not None:
            self.training.ema.update(self.training.model, self.training.step)
        self._keep_buffers()
        self.training.step += 1
        self.lock.release()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All there is to save as it was after the last update, whatever has been begun since."""
        files = self.training.tensors()
        files["model.safetensors"] |= self.buffers
        if self.tallied:
            files["tally.safetensors"] = self.tallied
        return files

    def forget(self) -> None:
        """Of the steps before the run went back nothing is to be known any more."""
        self.waiting.clear()

    def _keep_buffers(self) -> None:
        if self.training.tally is not None:
            self.tallied = {k: t.clone() for k, t in self.training.tally.state_dict().items()}
        if self.buffer_names:
            state = self.training.model.state_dict()
            for name in self.buffer_names:
                if name in self.frozen:  # a frozen encoder is copied once, a codebook whenever it moves
                    if self.versions.get(name) == state[name]._version:
                        continue
                    self.versions[name] = state[name]._version
                self.buffers[name] = state[name].clone()

    def agree(
        self, stop: bool, save: bool, what: T, wait: bool, most: int
    ) -> tuple[bool, bool, T | None]:
        """Whether any process wants to stop, or to save; and the first step that was left out, once.

        On a GPU the answer is that of the step before, which is there already, unless `wait`. What comes
        after `most` steps in a row that were left out is not looked at: the run goes back.
        """
        flags = torch.stack([torch.full((), float(f), device=self.device) for f in (stop, save, 0)])
        flags[2] = self.skipped
        flags = distributed.highest(flags).to("cpu", non_blocking=True)
        event = None
        if self.late:
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((what, flags, event))
        stopping, saving, bad = False, False, None
        while len(self.waiting) > (self.late and not (wait or stopping or saving)):
            if self.training.in_a_row >= most:
                break
            what, flags, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            asked, due, skipped = flags.tolist()
            stopping, saving = stopping or bool(asked), saving or bool(due)
            self.training.skipped += int(skipped)
            self.training.in_a_row = self.training.in_a_row + 1 if skipped else 0
            if skipped and not self.captured:
                self.captured, bad = True, what
        return stopping, saving, bad


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: `exp_avg.blocks.0...`."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{key}.{names[id(parameter)]}": value.detach()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimiser the state that `optimizer_tensors` took from one of the same model."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        key, name = full_name.split(".", 1)
        parameter = parameters[name]
        if key == "step":  # a fused AdamW counts beside the parameter, any other on the CPU
            value = value.to(parameter.device if optimizer.defaults.get("fused") else "cpu", copy=True)
        else:  # in the parameter's own strides, which a fused step takes for granted
            whole = distributed.spread(value, parameter)
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(whole)
        optimizer.state[parameter][key] = value
