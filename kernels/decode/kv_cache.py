"""The KV cache: full-attention heads hold every token, sliding-window heads hold their window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeadGroup(NamedTuple):
    """The KV heads of a layer that hold the same number of tokens."""

    slots: int
    """Tokens that a head holds: its window, or the cache's capacity if that is less."""
    heads: tuple[int, ...]
    keys: Tensor
    """(B, len(heads), slots, D). Token j is in slot j modulo `slots`."""
    values: Tensor
    """The same for values."""


class KVCache:
    """The KV cache of one attention layer, read by `decode_attention`.

    A head with window W is a ring of min(W, capacity) slots. Token j goes to slot j modulo that
    number, and overwrites the token that just left the window. So after `append` a windowed head
    holds exactly the keys that the newest token sees: W - 1 past ones and its own. Apply RoPE to
    keys before you append them. Softmax does not depend on the order of keys, so nothing moves.

    The size of keys and values in bytes is
    `nbytes` = 2 * batch * head_dim * bytes per element * sum over KV heads of min(W, capacity).

    The number of tokens is kept twice. Kernels and `append` compute with `position` on the device,
    so that both can be captured in a CUDA graph and replayed. `length`, on the host, lets `append`
    refuse what does not fit without waiting for the device. Capturing and replaying leave `length`
    wrong until `refresh_length` is called.

    Attributes:
        batch, capacity, windows, head_dim, dtype, device: as given.
        groups: the `HeadGroup`s, fewest slots first.
        keys, values: the storage of all groups, (rows, D). A row holds one slot of one head.
        slots: slots of each head, int64 (kv_heads,).
        rows: the row of each head's slot 0, int64 (B, kv_heads).
        position: number of tokens, int64 (1,).
        start: as given, zeros if None, int32 (B,).
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        windows: tuple[int, ...],
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        start: Tensor | None = None,
    ) -> None:
        """Create an empty cache.

        batch: number of sequences.
        capacity: number of tokens to hold, prompt and answer together.
        windows: one per KV head, in tokens, the query's own included. capacity or more is full
            attention.
        start: int32 (B,), the first token of each sequence that is not padding on the left, or
            None without padding. Tokens before it are never visible.

        Raises ValueError for sizes below 1, and for a start of another shape or type.
        """
        if min(batch, capacity, head_dim, *windows, len(windows)) < 1:
            raise ValueError(
                f"batch {batch}, capacity {capacity}, head_dim {head_dim} and windows {windows} "
                "must all be at least 1, with a window for each KV head"
            )
        if start is not None and (
            start.shape != (batch,) or start.dtype != torch.int32 or int(start.min()) < 0
        ):
            raise ValueError(
                f"start must be int32 ({batch},) and at least 0, not {start.dtype} "
                f"{tuple(start.shape)}: {start}"
            )
        self.batch = batch
        self.capacity = capacity
        self.windows = windows
        self.head_dim = head_dim
        slots = [min(window, capacity) for window in windows]
        # All heads share one storage, so that append and decode_attention serve heads of every
        # window in one launch.
        rows_in_all = batch * sum(slots)
        self.keys = torch.empty(rows_in_all, head_dim, dtype=dtype, device=device)
        self.values = torch.empty(rows_in_all, head_dim, dtype=dtype, device=device)
        self.dtype = dtype
        self.device = self.keys.device
        if start is None:
            self.start = torch.zeros(batch, dtype=torch.int32, device=device)
        else:
            self.start = start.to(self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.length = 0
        rows = torch.empty(batch, len(windows), dtype=torch.int64)
        self.groups = []
        offset = 0
        for kind in sorted(set(slots)):
            heads = tuple(head for head, count in enumerate(slots) if count == kind)
            shape = (batch, len(heads), kind)
            size = batch * len(heads) * kind
            rows[:, list(heads)] = torch.arange(offset, offset + size, kind).view(batch, len(heads))
            keys = self.keys[offset : offset + size].view(*shape, head_dim)
            values = self.values[offset : offset + size].view(*shape, head_dim)
            self.groups.append(HeadGroup(kind, heads, keys, values))
            offset += size
        self.rows = rows.to(device)
        self.slots = torch.tensor(slots, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, filled or not."""
        return self.keys.nbytes + self.values.nbytes

    def refresh_length(self) -> int:
        """Read `length` back from the device, after a CUDA graph was captured or replayed.

        Waits for the device.
        """
        self.length = int(self.position)
        return self.length

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store the next tokens. Inference only.

        T is 1 while decoding, and more for a prompt. Windowed heads keep a prompt's last window.

        k, v: (B, T, kv_heads, D) in the cache's precision, with RoPE applied to k.

        Raises ValueError for shapes or a precision that do not fit, for tokens beyond the capacity,
        and for tensors that require gradients.
        """
        tokens = k.shape[1]
        if k.shape != (self.batch, tokens, len(self.windows), self.head_dim) or v.shape != k.shape:
            fitting = f"({self.batch}, T, {len(self.windows)}, {self.head_dim})"
            raise ValueError(
                f"shapes do not fit: k {tuple(k.shape)}, v {tuple(v.shape)}, but the cache takes "
                f"{fitting}"
            )
        if k.dtype != self.dtype or v.dtype != self.dtype:
            raise ValueError(f"k is {k.dtype} and v {v.dtype}, but the cache holds {self.dtype}")
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"{tokens} more tokens do not fit: the cache holds {self.length} of {self.capacity}"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "a KV cache passes no gradients on: append under torch.no_grad() or "
                "torch.inference_mode()"
            )
        if tokens == 1:
            # The same result as below, with fewer kernels.
            rows = self.rows + self.position % self.slots
        else:
            token = torch.arange(tokens, device=self.device)
            slot = (self.position + token)[:, None] % self.slots  # (T, kv_heads)
            rows = self.rows[:, None] + slot  # (B, T, kv_heads)
            # Tokens that a later token of this call overwrites are left out, because writes to one
            # row have no order.
            kept = token[:, None] >= tokens - self.slots
            rows = rows[:, kept]
            k = k[:, kept]
            v = v[:, kept]
        self.keys.index_copy_(0, rows.flatten(), k.reshape(-1, self.head_dim))
        self.values.index_copy_(0, rows.flatten(), v.reshape(-1, self.head_dim))
        self.position += tokens
        self.length += tokens
