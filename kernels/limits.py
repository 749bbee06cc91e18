"""Limits of the Triton kernels, and constants that they share."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run under Triton's interpreter, which serves any device.

True if TRITON_INTERPRET=1 was set when Triton was imported.
"""
LOG2_E = 1.4426950408889634
"""Scores are multiplied by log2(e), so that exp2 gives what exp would."""


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU. The interpreter counts as one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
