"""Context parallelism: the tokens of a sequence are divided over ranks.

A sequence is cut into 2 n chunks, and rank r of n holds the chunks r and 2 n - 1 - r. So causal
attention costs every rank the same (Llama 3, arXiv 2407.21783, section 3.3.2). Everything else in a
block works on each token alone. Attention needs keys of other ranks:

- A head with full attention, or with an open gate, needs all earlier keys. The ranks gather them.
- A windowed head needs the W - 1 keys before each chunk. Only neighbours exchange them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megaconsa.kernels import hybrid_attention
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.head_runs import Run, runs

Keys = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys and values that the first chunk's queries see, then those of the second chunk. They end with
the chunk's own."""


@dataclass(frozen=True)
class ContextParallel:
    """This rank's place among the ranks that divide a sequence."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """torch.distributed's group of these ranks."""

    @property
    def chunks(self) -> tuple[int, int]:
        """The places of this rank's chunks among the 2 * size chunks of a sequence."""
        return self.rank, 2 * self.size - 1 - self.rank

    def own_part(self, x: Tensor) -> Tensor:
        """This rank's tokens: (B, S, ...) to (B, S / size, ...)."""
        if self.size == 1:
            return x
        by_chunk = x.unflatten(1, (2 * self.size, -1))
        first, second = self.chunks
        return torch.cat((by_chunk[:, first], by_chunk[:, second]), dim=1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: HeadPattern,
        documents: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Hybrid attention of this rank's queries to the whole sequence.

        q: (B, S / size, heads, D), this rank's tokens.
        k, v: (B, S / size, kv_heads, D), this rank's tokens.
        documents: (B, S) int32 ids of the whole sequence's documents, or None.

        Returns (B, S / size, heads, D).
        """
        chunk = q.shape[1] // 2
        reaches = _reaches(pattern, chunk)
        # Neighbouring heads of one kind: those that look back one chunk at most, and the others.
        kinds = [0 if reach <= chunk else chunk for reach in reaches]
        every = list(runs(kinds, chunk, q.shape[2] // k.shape[2]))
        far = [run for run in every if run.window is None]
        near = [run for run in every if run.window is not None]
        outputs: dict[bool, Tensor] = {}
        if near:
            halo = max(reach for reach in reaches if reach <= chunk)
            near_keys: Keys = _WithHalo.apply(_of_runs(k, v, near), self, halo)
        if far:
            keys = _of_runs(k, v, far)
            # The ranks gather while near heads are computed. The halo comes first: NCCL would let
            # it wait for the gather.
            wait = self.start_gather(keys.detach())
        if near:
            # Gates of near heads are closed.
            windowed = HeadPattern(_windows(pattern, near))
            near_q = _queries(q, near)
            outputs[True] = self._attend(near_q, near_keys, windowed, documents, backend)
        if far:
            far_keys: Keys = _Gathered.apply(keys, self, wait)
            far_pattern = _far_pattern(pattern, far)
            far_q = _queries(q, far)
            outputs[False] = self._attend(far_q, far_keys, far_pattern, documents, backend)
        return _in_order(outputs, every)

    def _attend(
        self,
        q: Tensor,
        keys: Keys,
        pattern: HeadPattern,
        documents: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Hybrid attention of heads of one kind."""
        chunk = q.shape[1] // 2
        parts = []
        for number, place in enumerate(self.chunks):
            key, value = keys[2 * number : 2 * number + 2]
            end = (place + 1) * chunk
            seen = None
            if documents is not None:
                seen = documents[:, end - key.shape[1] : end]
            out = hybrid_attention(
                q[:, number * chunk : (number + 1) * chunk],
                key,
                value,
                window=pattern.windows,
                gate=pattern.gate,
                closed=pattern.closed,
                documents=seen,
                backend=backend,
            )
            parts.append(out)
        return torch.cat(parts, dim=1)

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts to gather (B, S / size, ...). Returns a function that waits for (B, S, ...)."""
        x = x.contiguous()
        gathered = x.new_empty(self.size * len(x), *x.shape[1:])
        work: Any = dist.all_gather_into_tensor(gathered, x, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            by_rank = gathered.unflatten(0, (self.size, -1)).unflatten(2, (2, -1))
            first, second = by_rank.unbind(2)
            by_chunk = torch.cat((first, second.flip(0)))  # (2 size, B, S / (2 size), ...)
            return by_chunk.movedim(0, 1).flatten(1, 2)

        return wait

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """(B, S, ...) to (B, S / size, ...): this rank's tokens of the sum over the ranks."""
        by_chunk = x.unflatten(1, (2 * self.size, -1))
        first, second = by_chunk.chunk(2, dim=1)
        by_rank = torch.stack((first, second.flip(1)), dim=2).movedim(1, 0).flatten(2, 3)
        by_rank = by_rank.contiguous()  # (size, B, S / size, ...)
        own = torch.empty_like(by_rank[0])
        dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1), group=self.group)
        return own

    def swap(self, to_previous: Tensor | None, to_next: Tensor) -> tuple[Tensor | None, Tensor]:
        """Exchanges tensors of one shape with both neighbours: what they sent to this rank.

        The chunks of the last rank are neighbours of each other, so it is its own next rank. The
        first rank has no previous one.
        """
        operations = []

        def exchange(peer: int, sent: Tensor) -> Tensor:
            received = torch.empty_like(sent, memory_format=torch.contiguous_format)
            other = dist.get_global_rank(self.group, peer)
            operations.append(dist.P2POp(dist.isend, sent.contiguous(), other, self.group))
            operations.append(dist.P2POp(dist.irecv, received, other, self.group))
            return received

        from_previous = None
        from_next = to_next
        if to_previous is not None and self.rank > 0:
            from_previous = exchange(self.rank - 1, to_previous)
        if self.rank < self.size - 1:
            from_next = exchange(self.rank + 1, to_next)
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return from_previous, from_next


def _reaches(pattern: HeadPattern, chunk: int) -> list[int]:
    """How many earlier keys a query of each KV head needs. Open gates need more than a chunk."""
    reaches = []
    for head, window in enumerate(pattern.windows):
        is_open = pattern.gate is not None and not (pattern.closed and pattern.closed[head])
        reaches.append(chunk + 1 if is_open else window - 1)
    return reaches


def _of_runs(k: Tensor, v: Tensor, chosen: list[Run]) -> Tensor:
    """Keys and values of some heads in one tensor, (B, tokens, 2 heads, D), keys first."""
    parts = [x[:, :, run.kv] for x in (k, v) for run in chosen]
    return torch.cat(parts, dim=2)


def _queries(q: Tensor, chosen: list[Run]) -> Tensor:
    """The query heads of some KV heads."""
    parts = [q[:, :, run.q] for run in chosen]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _windows(pattern: HeadPattern, chosen: list[Run]) -> tuple[int, ...]:
    return tuple(window for run in chosen for window in pattern.windows[run.kv])


def _far_pattern(pattern: HeadPattern, chosen: list[Run]) -> HeadPattern:
    """The pattern of some heads. Slices of the gate cost no copy to the GPU, as an index would."""
    windows = _windows(pattern, chosen)
    if pattern.gate is None:
        return HeadPattern(windows)
    gate = torch.cat([pattern.gate[..., run.kv] for run in chosen], dim=-1)
    closed = None
    if pattern.closed is not None:
        closed = tuple(value for run in chosen for value in pattern.closed[run.kv])
    return HeadPattern(windows, gate, closed)


def _in_order(outputs: dict[bool, Tensor], every: list[Run]) -> Tensor:
    """The outputs of near (True) and far heads in the order of the heads."""
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    taken = {True: 0, False: 0}
    parts = []
    for run in every:
        is_near = run.window is not None
        count = run.q.stop - run.q.start
        parts.append(outputs[is_near].narrow(2, taken[is_near], count))
        taken[is_near] += count
    return torch.cat(parts, dim=2)


class _Gathered(torch.autograd.Function):
    """The keys of the whole sequence up to the end of each of this rank's chunks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, cp: ContextParallel, wait: Callable[[], Tensor]) -> Keys:
        ctx.cp = cp
        whole = wait()
        heads = own.shape[2] // 2
        chunk = own.shape[1] // 2
        first, second = ((place + 1) * chunk for place in cp.chunks)
        return (
            whole[:, :first, :heads],
            whole[:, :first, heads:],
            whole[:, :second, :heads],
            whole[:, :second, heads:],
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        d_k_first, d_v_first, d_k_second, d_v_second = gradients
        cp = ctx.cp
        batch, end, heads, dim = d_k_second.shape
        length = end // (cp.chunks[1] + 1) * 2 * cp.size
        d_whole = d_k_second.new_zeros(batch, length, 2 * heads, dim)
        d_whole[:, :end, :heads] = d_k_second
        d_whole[:, :end, heads:] = d_v_second
        begin = d_k_first.shape[1]
        d_whole[:, :begin, :heads] += d_k_first
        d_whole[:, :begin, heads:] += d_v_first
        return cp.reduce_scatter(d_whole), None, None


class _WithHalo(torch.autograd.Function):
    """The keys of each of this rank's chunks, after the `halo` keys before the chunk."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, cp: ContextParallel, halo: int) -> Keys:
        ctx.cp = cp
        ctx.halo = halo
        heads = own.shape[2] // 2
        first, second = own.chunk(2, dim=1)
        chunk = first.shape[1]
        if halo:
            # The chunk after the first one is the next rank's first. The chunk after the second one
            # is the previous rank's second.
            last_keys = slice(chunk - halo, None)
            before_first, before_second = cp.swap(second[:, last_keys], first[:, last_keys])
            if before_first is not None:
                first = torch.cat((before_first, first), dim=1)
            second = torch.cat((before_second, second), dim=1)
        return (
            first[:, :, :heads],
            first[:, :, heads:],
            second[:, :, :heads],
            second[:, :, heads:],
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cp = ctx.cp
        halo = ctx.halo
        d_first = torch.cat(gradients[:2], dim=2)
        d_second = torch.cat(gradients[2:], dim=2)
        chunk = d_second.shape[1] - halo
        own = torch.cat((d_first[:, -chunk:], d_second[:, -chunk:]), dim=1)
        if halo:
            to_previous = d_first[:, :halo] if d_first.shape[1] > chunk else None
            d_end_of_second, d_end_of_first = cp.swap(to_previous, d_second[:, :halo])
            own[:, chunk - halo : chunk] += d_end_of_first
            if d_end_of_second is not None:
                own[:, 2 * chunk - halo :] += d_end_of_second
        return own, None, None
