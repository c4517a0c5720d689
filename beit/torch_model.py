"""A model that torch computes for the engine: folded or halved on a processor, compiled on a GPU.

Shapes: B batch, D width, C classes, N = 1 + L tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from beit.export import OutputOf
from beit.flops import forward_flops
from beit.folded import fold
from beit.graphs import Output
from beit.model import Beit, BeitConfig
from beit.precision import autocast

SMALL_FLOPS = 1e9  # of a picture: below, plain torch answers at once, and nothing is prepared


def is_small(config: BeitConfig) -> bool:
    """Whether plain torch is taken without preparing it, or measuring other runtimes."""
    return forward_flops(config) < SMALL_FLOPS


class TorchModel:
    """A model computed by torch on any device. One call at a time."""

    def __init__(
        self,
        model: Beit,
        device: torch.device,
        precision: str,
        own: bool,
        compile: bool = False,
    ) -> None:
        """own: whether the model is the engine's, to be changed; another's may change while it is used.

        compile: compile each block, instead of folding it on a processor.
        """
        self.device, self.precision = device, precision
        model.to(device, torch.float32).eval()  # many files hold float16
        self._model = model
        folded = own and device.type == "cpu" and not compile
        folded = folded and not is_small(model.config)
        self._one_by_one = folded and fold(model, precision)
        if own and precision == "bf16":
            halve(model)
        for block in model.blocks if compile else ():
            block.compile()

    def __call__(self, output: Output, images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(images).to(self.device)
        assert self.precision in ("fp32", "bf16")
        with torch.inference_mode(), autocast(self.precision, self.device):  # type: ignore[arg-type]
            compute = OutputOf(self._model, output)
            parts = [
                compute(part) for part in batch.split(1 if self._one_by_one else max(1, len(batch)))
            ]
            answer: np.ndarray = torch.cat(parts).float().cpu().numpy()
        return answer


def halve(model: Beit) -> None:
    """Hold the weights of a model's products, and its biases, in bf16; it is run under autocast.

    autocast alone casts all weights anew for each batch. The states between blocks stay float32, for the
    reason that `folded` gives.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
        table = getattr(module, "relative_position_bias_table", None)
        if table is not None:
            table.data = table.data.to(torch.bfloat16)
    model.patch_embed.register_forward_hook(lambda module, args, patches: patches.float())
