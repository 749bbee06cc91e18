"""Decides whether a model computes with our kernels or with torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Precisions that the kernels compute in."""


def kernels_serve_device(device: torch.device) -> bool:
    """Whether blocks and norms run by our kernels on a device."""
    return device.type == "cuda"


def kernels_serve(x: Tensor) -> bool:
    """Whether our kernels compute with x."""
    return kernels_serve_device(x.device) and x.dtype in DTYPES
