"""How far a loop is, and how fast: for people on stderr, and as numbers for its metrics.

No torch here, so that commands which may end before they need it can tell how far they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Progress:
    """Progress on stderr: a live bar on a terminal, elsewhere one plain line every 30 s."""

    def __init__(self, label: str, total: int, quiet: bool = False) -> None:
        self.label, self.total, self.quiet = label, total, quiet
        self.started = self.last_line = time.monotonic()
        self.first: int | None = None
        self.bar: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self.task = self.bar.add_task(label, total=total, text="")
            self.bar.start()

    def update(self, done: int, text: str = "") -> None:
        """`done` of the total are finished; `text` is the latest numbers."""
        if self.first is None:  # what came before, such as compiling, says nothing of the pace
            self.first, self.started = done, time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=text)
        elif not self.quiet and time.monotonic() - self.last_line > 30:
            self.last_line = time.monotonic()
            pace = (self.last_line - self.started) / max(done - self.first, 1)
            left = f"{pace * (self.total - done):.0f} s left, " if done > self.first else ""
            print(f"{self.label} {done}/{self.total}, {left}{text}", file=sys.stderr)

    def tell(self, text: str) -> None:
        """What takes the time now."""
        if self.bar is not None:
            self.bar.update(self.task, text=text)
        elif not self.quiet:
            print(f"{self.label}: {text}", file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pace:
    """What passed between two logged lines."""

    def __init__(
        self,
        batch_size: int = 0,
        flops_per_image: float = 0.0,
        peak_flops: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        self.batch_size, self.device = batch_size, device
        self.share = flops_per_image / peak_flops if peak_flops else 0.0
        self.began, self.waited, self.taken = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time that the loop waits for a batch."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began
        self.taken += 1

    def read(self) -> dict[str, float]:
        """The numbers since the last time; none where no batch size was told."""
        if self.device is None or not self.batch_size:
            return {}
        seconds = time.perf_counter() - self.began
        rate = self.taken * self.batch_size / seconds
        values = {"images_per_second": rate, "data_wait_percent": 100 * self.waited / seconds}
        if self.share:
            values["mfu_percent"] = 100 * rate * self.share
        values["memory_mib"] = peak_memory_mib(self.device)
        self.began, self.waited, self.taken = time.perf_counter(), 0.0, 0
        return values


def peak_memory_mib(device: torch.device | None = None) -> float:
    """The most memory used so far: of the GPU, or of this process."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage's number is the parent's where that had more
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
