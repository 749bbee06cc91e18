"""Keys and values of past tokens: every token for full-attention KV heads, the window's tokens for sliding-window heads."""

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
    """(B, len(heads), slots, D); token j is in slot j modulo `slots`. `values` alike."""
    values: Tensor


class KVCache:
    """The KV cache of one attention layer; `decode_attention` reads it.

    A head with window W is a ring of min(W, capacity) slots: token j goes to slot j modulo their number, over the token that just
    left the window. So after `append` a windowed head holds exactly the keys that the newest token sees, W - 1 past ones and its
    own. RoPE belongs into the keys before they are appended, and softmax does not care about their order, so nothing ever moves.

    Keys and values take `nbytes` = 2 * batch * head_dim * bytes per element * sum over KV heads of min(W, capacity).

    The number of tokens is kept twice. `position`, on the device, is what kernels and `append` compute with, so that both can be
    captured in a CUDA graph and replayed. `length`, on the host, lets `append` refuse what does not fit without waiting for the
    device; capturing and replaying leave it wrong until `refresh_length` is called.

    Attributes: batch, capacity, windows, head_dim, dtype, device as given; groups: the `HeadGroup`s, fewest slots first;
    keys, values (rows, D): their storage, head_dim values to a row; slots int64 (kv_heads,): slots of each head; rows int64
    (B, kv_heads): the row of each head's slot 0; position int64 (1,); start int32 (B,).
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
        """An empty cache.

        batch: sequences. capacity: tokens to be held, prompt and answer together.
        windows: of each KV head, in tokens and counting the query's own; capacity or more is full attention.
        start: int32 (B,): the first token of each sequence that is not padding on the left; None if there is none. Tokens before
            it are never visible.

        Raises ValueError for sizes below 1 and for a start of another shape or kind.
        """
        if min(batch, capacity, head_dim, *windows, len(windows)) < 1:
            raise ValueError(
                f"batch {batch}, capacity {capacity}, head_dim {head_dim} and windows {windows} must all be at least 1, "
                "with a window for each KV head"
            )
        if start is not None and (
            start.shape != (batch,) or start.dtype != torch.int32 or int(start.min()) < 0
        ):
            raise ValueError(
                f"start must be int32 ({batch},) and at least 0, not {start.dtype} {tuple(start.shape)}: {start}"
            )
        self.batch, self.capacity, self.windows, self.head_dim = batch, capacity, windows, head_dim
        slots = [min(window, capacity) for window in windows]
        # One storage for all heads: append and decode_attention then serve heads of every window in one launch.
        self.keys, self.values = (
            torch.empty(batch * sum(slots), head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self.dtype, self.device = dtype, self.keys.device
        self.start = (
            torch.zeros(batch, dtype=torch.int32, device=device)
            if start is None
            else start.to(self.device)
        )
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
            keys, values = (
                x[offset : offset + size].view(*shape, head_dim) for x in (self.keys, self.values)
            )
            self.groups.append(HeadGroup(kind, heads, keys, values))
            offset += size
        self.rows, self.slots = rows.to(device), torch.tensor(slots, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, filled or not."""
        return self.keys.nbytes + self.values.nbytes

    def refresh_length(self) -> int:
        """Reads `length` back from the device, after a CUDA graph was captured or replayed; waits for the device."""
        self.length = int(self.position)
        return self.length

    def append(self, k: Tensor, v: Tensor) -> None:
        """Stores the next tokens: T = 1 while decoding, T > 1 for a prompt, of which windowed heads keep the last window.

        k, v: (B, T, kv_heads, D) in the cache's precision, RoPE applied to k. Inference only. Raises ValueError for shapes or a
        precision that do not fit, for tokens beyond the capacity, and for tensors that want gradients.
        """
        tokens = k.shape[1]
        if k.shape != (self.batch, tokens, len(self.windows), self.head_dim) or v.shape != k.shape:
            fitting = f"({self.batch}, T, {len(self.windows)}, {self.head_dim})"
            raise ValueError(
                f"shapes do not fit: k {tuple(k.shape)}, v {tuple(v.shape)}, but the cache takes {fitting}"
            )
        if k.dtype != self.dtype or v.dtype != self.dtype:
            raise ValueError(f"k is {k.dtype} and v {v.dtype}, but the cache holds {self.dtype}")
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"{tokens} more tokens do not fit: the cache holds {self.length} of {self.capacity}"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "a KV cache passes no gradients on: append under torch.no_grad() or torch.inference_mode()"
            )
        if tokens == 1:  # the same in fewer kernels
            rows = self.rows + self.position % self.slots
        else:
            token = torch.arange(tokens, device=self.device)
            rows = (
                self.rows[:, None] + (self.position + token)[:, None] % self.slots
            )  # (B, T, kv_heads)
            # Tokens that the same call overwrites stay out: writes to one row have no order.
            kept = token[:, None] >= tokens - self.slots
            rows, k, v = rows[:, kept], k[:, kept], v[:, kept]
        self.keys.index_copy_(0, rows.flatten(), k.reshape(-1, self.head_dim))
        self.values.index_copy_(0, rows.flatten(), v.reshape(-1, self.head_dim))
        self.position += tokens
        self.length += tokens
