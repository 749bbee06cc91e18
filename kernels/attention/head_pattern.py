"""What the KV heads of a layer see."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HeadPattern(NamedTuple):
    """Windows and gates of a layer's KV heads. All backends take it as one argument."""

    windows: tuple[int, ...]
    """Visible keys of each KV head, the query's own included."""
    gate: Tensor | None = None
    """While learning: z per KV head, fp32 (B, kv_heads), or (kv_heads,) for all sequences."""
    closed: tuple[bool, ...] | None = None
    """Whether z is 0 in every sequence, for each KV head. None if the host does not know."""

    def of_heads(self, heads: tuple[int, ...]) -> HeadPattern:
        """The pattern of some KV heads. They must be consecutive if there is a gate."""
        windows = tuple(self.windows[head] for head in heads)
        if self.gate is None:
            return HeadPattern(windows)
        assert heads == tuple(range(heads[0], heads[-1] + 1))
        # A slice costs nothing. An index would be copied to the GPU.
        part = slice(heads[0], heads[-1] + 1)
        closed = None if self.closed is None else self.closed[part]
        return HeadPattern(windows, self.gate[..., part], closed)
