"""The entry point: checks the arguments, takes a backend, calls it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from megaconsa.kernels import reference, sdpa

logger = logging.getLogger(__name__)

BACKENDS = {"reference": reference.attention, "sdpa": sdpa.attention}
"""What is available here; `triton` and `flash` are names of the contract that this version does not serve yet."""


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | Sequence[int] | Tensor,
    gate: Tensor | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention in which every KV head has its own window, or a gate between full and windowed attention.

    q: (B, S, heads, D); k and v: (B, S, kv_heads, D), heads a multiple of kv_heads.
    window: keys visible to a query, itself included: one number, or one per KV head. S or more is full attention.
    gate: fp32 (kv_heads,) or (B, kv_heads) in [0, 1], or None. With it the output of a head is
        z * full + (1 - z) * windowed (hard concrete gates of ConSA, arXiv 2606.18056).
    documents: int32 (B, S), non-decreasing ids of the documents packed into a sequence, or None; they do not see each other.
    scale: of the scores; 1 / sqrt(D) if None.
    backend: auto, reference or sdpa.

    Returns (B, S, heads, D) in q's precision, differentiable in q, k, v and gate. Raises ValueError for shapes that do not fit.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    if k.shape != (batch, length, kv_heads, dim) or v.shape != k.shape or heads % kv_heads:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    windows = _windows(window, kv_heads)
    if gate is not None:
        if gate.shape not in ((kv_heads,), (batch, kv_heads)):
            raise ValueError(f"gate has shape {tuple(gate.shape)}, but must be ({kv_heads},) or ({batch}, {kv_heads})")
        gate = gate.expand(batch, kv_heads)
    if documents is not None and documents.shape != (batch, length):
        raise ValueError(f"documents has shape {tuple(documents.shape)}, but must be ({batch}, {length})")
    function = BACKENDS[_announced(backend)]
    return function(q, k, v, windows, gate, documents, dim**-0.5 if scale is None else scale)


def choose_backend(backend: str) -> str:
    """The backend that will run; ValueError for one that is not here."""
    if backend == "auto":
        return "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend} is not available; choose one of auto, {', '.join(BACKENDS)}")
    return backend


@lru_cache
def _announced(backend: str) -> str:
    """choose_backend, saying once what `auto` took."""
    if backend == "auto":
        logger.info("attention.backend=auto takes sdpa: torch's scaled_dot_product_attention, two calls for gated heads")
    return choose_backend(backend)


def _windows(window: int | Sequence[int] | Tensor, kv_heads: int) -> tuple[int, ...]:
    if isinstance(window, Tensor):
        window = window.tolist()
    windows = (window,) * kv_heads if isinstance(window, int) else tuple(window)
    if len(windows) != kv_heads or min(windows) < 1:
        raise ValueError(f"window is {windows}, but must be at least 1 for each of {kv_heads} KV heads")
    return windows
