"""What the Triton kernels take, and constants they share."""

from __future__ import annotations

import torch
import triton

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported), on any device."""
LOG2_E = 1.4426950408889634
"""Scores are scaled by it, so that exp2 serves as exp."""
