"""A second device, made in Python, whose tensors the processor's cannot meet: for where no GPU is.

Its tensors hold one of the processor, whose operators compute for them, so numbers are the processor's;
but an operator that gets tensors of both refuses, as CUDA does. What it cannot show: a GPU's own kernels,
its streams, bf16.

    python tests/other_device.py < commands.json

runs `beit` commands, each a list of words, with `--device gpu` being that device; prints what each returns
and how often it waited for the device. It stands on what torch has for backends written in Python, which
is private.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
CPU = torch.device("cpu")
# Those that take tensors of both, here and on a GPU: copies, and indices beside what they index.
CROSSING = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor,
    aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
}  # fmt: skip


# What needs an answer from the device: the program waits until all before it is done.
ASKING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default, aten.bincount.default, aten._unique2.default,
}  # fmt: skip
waits: list[str] = []


class OnGpu(torch.Tensor):
    """A tensor of the device; `held` has its numbers."""

    held: torch.Tensor
    is_cuda = True  # type: ignore[assignment]  # where it is asked what a GPU can do
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device("gpu", 0),
        )  # fmt: skip
        return made

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, **kwargs).to(self.device)

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, other: OnGpu) -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held = other.held

    def __repr__(self) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Plugged(TorchDispatchMode):
    """Within it tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator on the processor, its answers on the device that a GPU's would be on."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, OnGpu)]
    strangers = [t for t in tensors if not isinstance(t, OnGpu) and t.dim()]
    if ours and strangers and func not in CROSSING:
        raise RuntimeError(f"{func}: {tuple(strangers[0].shape)} on cpu beside tensors on gpu")
    if ours and asks(func, args, kwargs):
        waits.append(str(func))
    to_gpu = isinstance(args[0], OnGpu) if func is aten.copy_.default else bool(ours)
    if kwargs.get("device") is not None:
        to_gpu = torch.device(kwargs["device"]).type == "gpu"
        kwargs = {**kwargs, "device": CPU}
    out = func(*tree_map(held, args), **tree_map(held, kwargs))
    given = {id(held(t)): t for t in tensors}

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in given:  # changed in place
            assert given[id(value)].shape == value.shape, f"{func} changes a shape in place"
            return given[id(value)]
        return OnGpu(value) if to_gpu else value

    return tree_map(placed, out)


def asks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a GPU would have to be waited for."""
    if func is aten._to_copy.default:
        place = kwargs.get("device") or "gpu"
        return torch.device(place).type == "cpu" and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        return not isinstance(args[0], OnGpu)
    if func in CROSSING:  # how many are True?
        return any(isinstance(t, OnGpu) and t.dtype == torch.bool for t in tree_leaves(args[1]))
    return func in ASKING


def held(value: Any) -> Any:
    """What stands for a value on the processor."""
    return value.held if isinstance(value, OnGpu) else value


class Module(_DummyBackendModule):
    """`torch.gpu`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: int = 0) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: int = 0) -> None:
        """The processor's is the device's own."""


def plug_in() -> None:
    """Make the device known, and what makes tensors below Python make them above."""
    _setup_privateuseone_for_python_backend("gpu", backend_module=Module())
    make_tensor, generator = torch.tensor, torch.Generator

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = make_tensor(data, **kwargs)
        return made if device is None else made.to(device)

    class Generator(generator):  # type: ignore[valid-type, misc]
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, "cpu")

    torch.tensor, torch.Generator = tensor, Generator  # type: ignore[assignment, misc]
    torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]


def answer(commands: str) -> None:
    """Run commands, a JSON list of lists of words; prints what each returns and how often it waited."""
    import beit.probe
    from beit.cli import app

    beit.probe.MOST_STEPS = 40  # as in the tests of commands
    plug_in()
    with Plugged():
        for words in json.loads(commands):
            with contextlib.redirect_stdout(sys.stderr):
                result = app(words)
            print(json.dumps([result, len(waits)], default=str), flush=True)
            waits.clear()


if __name__ == "__main__":
    answer(sys.stdin.read())
