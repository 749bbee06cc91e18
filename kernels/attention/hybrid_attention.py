"""The entry point of hybrid attention: checks the arguments, chooses a backend, calls it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaconsa.kernels.attention.backends import choose_backend
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.problem import Problem


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | Sequence[int] | Tensor,
    gate: Tensor | None = None,
    closed: Sequence[bool] | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention with a window per KV head, or with a gate between full and windowed.

    q: (B, S, heads, D). heads is a multiple of kv_heads. With fewer tokens than k, its queries are
        the last ones of the sequence.
    k, v: (B, S, kv_heads, D).
    window: keys visible to a query, itself included: one number, or one per KV head. S or more
        is full attention.
    gate: (kv_heads,) or (B, kv_heads) in [0, 1], fp32 (or fp64 if q is fp64), or None. With a
        gate z, the output of a head is z * full + (1 - z) * windowed (hard concrete gates of
        ConSA, arXiv 2606.18056). The gradient of a gate at exactly 0 or 1 is 0, the derivative
        of the clamp that put it there.
    closed: whether z is 0 in every sequence, for each KV head, if the caller knows it without
        reading the gate from the GPU. `flash` then leaves out their full attention.
    documents: int32 (B, S), non-decreasing ids of the documents packed into a sequence, or None.
        Documents do not see each other.
    scale: factor of the scores, 1 / sqrt(D) if None.
    backend: reference (explicit masks), sdpa (torch's), triton (one pass, gates included),
        flash (FlashAttention where installed), or auto. auto takes the fastest backend that
        serves the call, and logs its choice once.

    Returns a tensor of the shape and precision of q, differentiable in q, k, v and gate.
    Raises ValueError for shapes, precisions and devices that do not fit, and for a backend that
    cannot serve the call.
    """
    batch, queries, heads, dim = q.shape
    _, length, kv_heads, _ = k.shape
    shapes_fit = k.shape == (batch, length, kv_heads, dim) and v.shape == k.shape
    if not shapes_fit or heads % kv_heads or queries > length:
        raise ValueError(
            f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v must have one floating-point precision, not {q.dtype}, {k.dtype} and "
            f"{v.dtype}"
        )
    windows = _windows(window, kv_heads)
    if gate is not None:
        if gate.shape not in ((kv_heads,), (batch, kv_heads)):
            raise ValueError(
                f"gate has shape {tuple(gate.shape)}, but must be ({kv_heads},) or "
                f"({batch}, {kv_heads})"
            )
        if gate.dtype != torch.float32 and not gate.dtype == q.dtype == torch.float64:
            raise ValueError(f"gate is {gate.dtype}, but must be torch.float32")
        gate = gate.expand(batch, kv_heads)
    if closed is not None and (gate is None or len(closed) != kv_heads):
        raise ValueError(
            f"closed is {tuple(closed)}, but must be a value for each of {kv_heads} gated KV heads"
        )
    if documents is not None:
        if documents.shape != (batch, length):
            raise ValueError(
                f"documents has shape {tuple(documents.shape)}, but must be ({batch}, {length})"
            )
        if documents.dtype != torch.int32:
            raise ValueError(f"documents is {documents.dtype}, but must be torch.int32")
    for name, tensor in (("k", k), ("v", v), ("gate", gate), ("documents", documents)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, but q is on {q.device}")
    scale = dim**-0.5 if scale is None else scale
    problem = Problem(
        device=q.device,
        dtype=q.dtype,
        batch=batch,
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        windows=windows,
        gated=gate is not None,
        packed=documents is not None,
        scale=scale,
        closed=sum(closed or ()),
        earlier_keys=length - queries,
    )
    pattern = HeadPattern(windows, gate, None if closed is None else tuple(closed))
    return choose_backend(backend, problem).attention(q, k, v, pattern, documents, scale)


def _windows(window: int | Sequence[int] | Tensor, kv_heads: int) -> tuple[int, ...]:
    if isinstance(window, Tensor):
        window = window.tolist()
    windows = (window,) * kv_heads if isinstance(window, int) else tuple(window)
    if len(windows) != kv_heads or min(windows) < 1:
        raise ValueError(
            f"window is {windows}, but must be at least 1 for each of {kv_heads} KV heads"
        )
    return windows
