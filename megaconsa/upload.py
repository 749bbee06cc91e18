"""Copies to a device for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The tensor itself if it is there already.

    The host may change its own tensor at once, unless that is in pinned memory itself.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # From memory that is not pinned, the host would wait for all that the device has yet to do.
    # torch keeps the pinned copy until it has been read.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
