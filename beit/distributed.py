"""Many processes, one model: torchrun's environment, DDP, FSDP2, sums over processes.

Everything here does nothing in a single process, so a loop is written once. A process is a rank of
`size()`; rank 0 is the main one: it prints and writes. The run folder must be on a disk all nodes share.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from beit.precision import pick_device

T = TypeVar("T")
# All processes, for what may take the main one long: a look at a model, a large index.
_patient: Any = None
M = TypeVar("M", bound=nn.Module)


@contextmanager
def joined(device: str = "auto") -> Iterator[torch.device]:
    """Join the processes that torchrun, or a script that sets the same, started; gives this one's device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Gloo on a CPU, NCCL on GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield pick_device(device)
        return
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    # Gloo beside NCCL: words and errors travel between hosts without a GPU.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    patience = timedelta(minutes=30)
    store, rank, size = _own_store(patience)
    dist.init_process_group(backend, timeout=patience, world_size=size, rank=rank, store=store)
    global _patient
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    yield chosen
    dist.destroy_process_group()  # not after an error: the others may be waiting for this process


def _own_store(patience: timedelta) -> tuple[Any, int, int]:
    """The store by which the processes find each other, in a room of their own; this one's rank, and size.

    torchrun gives those that it begins anew (--max-restarts, a node that came or went) the store of those
    before them, where they found addresses of the dead: refused, or waited for without end. So the main
    process names a room, to each process that says who it is; TORCHELASTIC_RESTART_COUNT would not do, as
    each node counts for itself.
    """
    store, rank, size = next(rendezvous("env://", timeout=patience))
    me, until = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def all_came() -> bool:
        for other in range(1, size):
            store.set(f"told-{other}", read(f"asks-{other}") + me)
        return all(read(f"came-{other}") == me for other in range(1, size))

    def was_told() -> bool:
        return read(f"told-{rank}").startswith(me)

    store.set(f"asks-{rank}", me)
    while not (was_told() if rank else all_came()):
        if time.monotonic() > until:
            raise TimeoutError(f"process {rank} of {size} waited {patience} for the others to begin")
        time.sleep(0.02)
    room = read(f"told-{rank}").removeprefix(me) if rank else me
    store.set(f"came-{rank}", room)
    return dist.PrefixStore(room, store), rank, size  # type: ignore[attr-defined]


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def begun_anew() -> bool:
    """Whether torchrun (--max-restarts) or Slurm (requeue) gives the command again. All must call this."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(on_each(lambda: any(os.environ.get(name, "0") != "0" for name in counts)))


def say(text: str) -> None:
    """Print a line on stderr, once for all processes."""
    if is_main():
        print(text, file=sys.stderr)


def on_main(work: Callable[[], T]) -> T:
    """Do something in the main process alone; every process gets its result, or raises its error."""
    if size() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, group=_patient)
    if box[1] is not None:
        raise box[1]
    return box[0]


def on_each(work: Callable[[], T]) -> list[T]:
    """Do something in every process; all get the results of all, or raise the first's error."""
    if size() == 1:
        return [work()]
    result, error = None, None
    try:
        result = work()
    except Exception as mine:
        error = mine
    boxes: list[Any] = [None] * size()
    dist.all_gather_object(boxes, (result, error), group=_patient)
    for _, raised in boxes:
        if raised is not None:
            raise raised
    return [told for told, _ in boxes]


# --- Sums ----------------------------------------------------------------------------------------


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes.

    A loss summed over a process's share, divided by `mean(count)`, gives after DDP's averaging the
    gradient of the mean over the whole batch, however the counts differ.
    """
    return total(tensor) / size()


def highest(tensor: Tensor) -> Tensor:
    """The maximum over all processes."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    tensor = tensor.detach()
    if size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, operation)
    return tensor


def accumulation(batch_size: int, device_batch_size: int, processes: int | None = None) -> int:
    """How many parts a process takes its share of the batch in, so that `batch_size` stays what it is.

    batch_size: of a step, over all processes. device_batch_size: the most at once; 0 for no limit.
    """
    processes = processes or size()
    if batch_size % processes:
        below = batch_size // processes * processes
        nearest = f"{below} or {below + processes}" if below else f"{processes}"
        fitting = max(n for n in range(1, processes) if batch_size % n == 0)
        raise ValueError(
            f"batch_size {batch_size} does not divide among {processes} processes; "
            f"use --batch-size {nearest}, or {fitting} process{'es' * (fitting > 1)}"
        )
    share = batch_size // processes
    return -(-share // (device_batch_size or share))


# --- A finished model over processes ---------------------------------------------------------------


def wrap(model: nn.Module, shard: bool = False) -> nn.Module:
    """A model whose forward and backward pass work over all processes. Make its optimiser after this.

    DDP: call what is returned; `model` keeps its names. shard: FSDP2; `model` itself, its parameters
    now spread, a block at a time; all at once where blocks have bias tables, as the encoder reads those
    before it runs a block. Buffers that a forward pass changes are for their owner to `total`.
    """
    if size() == 1:
        return model
    device = next(model.parameters()).device
    if not shard:
        # Without device_ids, with which masks would be moved to the GPU: see `model.masked_of`.
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size(),))
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in chain.from_iterable(stacks):  # the encoder's, and v2's extra ones
        if not any(name.endswith("bias_table") for name, _ in block.named_parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gradients_sent(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """The context of one part's forward and backward: only the last part's gradients are exchanged."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if any(map(is_sharded, model.parameters())):
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
    return nullcontext()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process has to write of a sharded model: its rows, and in the main one all unsharded."""
    return {name: local(t) for name, t in tensors.items() if is_sharded(t) or is_main()}


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of a sharded model, on the main process's CPU; {} in the others.

    What is not sharded comes back as it is. All processes must call this.
    """
    if not any(map(is_sharded, tensors.values())):
        return tensors
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        if is_main():
            whole[name] = full.cpu()
    return whole


def unsharded(model: M, build: Callable[[], M]) -> M:
    """A model on one device with the weights of a sharded one; `model` itself if it is not sharded.

    build: makes one of the same config, which takes the weights in the main process; torch's generator
    is left as it was. All must call this.
    """
    if not any(map(is_sharded, model.parameters())):
        return model
    weights = gathered(model.state_dict())
    with torch.random.fork_rng(devices=[]):
        plain = build()
    if is_main():
        plain.load_state_dict(weights)
    return plain


def spread(whole: Tensor, target: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out as `target`; the tensor itself if that is whole."""
    if not is_sharded(target):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(
        whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )
