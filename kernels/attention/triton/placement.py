"""Where the kernels run, and in which order they take their tiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

from megaconsa.kernels.attention.triton.schedule import order_kernel


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device current, because Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def schedule_heads(
    windows: tuple[int, ...], gate: Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The windows, and the (row, head) pairs with costly ones first: see `tile_of_program`."""
    window_tensor, order = _scheduled_by_window(windows, batch, device)
    if gate is not None:
        pairs = batch * len(windows)
        order = torch.empty_like(order)
        block = triton.next_power_of_2(pairs)
        order_kernel[(1,)](
            gate.contiguous(), window_tensor, order, pairs, len(windows), length, BLOCK=block
        )
    return window_tensor, order


@lru_cache(maxsize=1024)
def _scheduled_by_window(
    windows: tuple[int, ...], batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The windows, and the pairs by falling window.

    Both are cached, because copying them to a GPU waits for it. For the same reason, call the
    operator once before you capture a CUDA graph with new windows or a new batch size.
    """
    heads = sorted(range(len(windows)), key=lambda head: -windows[head])
    order = [row * len(windows) + head for head in heads for row in range(batch)]
    return (
        torch.tensor(windows, dtype=torch.int32, device=device),
        torch.tensor(order, dtype=torch.int32, device=device),
    )


@lru_cache
def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache of a CUDA device. Other devices count as having 32 MiB."""
    if device.type != "cuda":
        return 1 << 25
    return torch.cuda.get_device_properties(device).L2_cache_size
