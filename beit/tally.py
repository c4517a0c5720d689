"""What is counted from one line of metrics.jsonl to the next, over all processes: tokens, and an error.

A batch alone says little of how evenly V tokens are used: it may have fewer than V.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit import distributed
from beit.metrics import CodebookUse, codebook_use


class Tally(nn.Module):
    """Counts of V tokens, and errors. Buffers, that a checkpoint holds: after a resume a line is of all its
    steps too. All processes call everything."""

    counts: Tensor  # int64 (V,)
    error: Tensor  # () summed over `steps`
    steps: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(vocab_size, dtype=torch.int64))
        self.register_buffer("error", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def add(self, counts: Tensor, error: Tensor | None = None) -> None:
        """Take in this process's (V,) counts of a step and its () error; not where that is not finite."""
        total = distributed.total(counts)
        if error is None:
            self.counts += total
            return
        error = distributed.mean(error.detach())
        finite = error.isfinite()
        self.counts += total * finite
        self.error += torch.where(finite, error, 0)
        self.steps += finite

    def use(self) -> CodebookUse:
        """How the tokens were used since the last `clear`."""
        return codebook_use(self.counts.cpu().numpy())

    def mean_error(self) -> float:
        """Of the steps since the last `clear`."""
        return (self.error / self.steps.clamp(min=1)).item()

    def clear(self) -> None:
        """Begin a new line."""
        for buffer in self.buffers():
            buffer.zero_()
