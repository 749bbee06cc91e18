"""Attention of one new token per sequence to a KV cache: the entry point and the reference."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch
from torch import Tensor

from megaconsa.kernels.decode.kv_cache import KVCache

logger = logging.getLogger(__name__)


def decode_attention(
    q: Tensor, cache: KVCache, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """What `hybrid_attention` gives for the newest token of each sequence. Inference only.

    The key and value of that token must already be in the cache.

    q: (B, 1, heads, D) in the cache's precision. heads is a multiple of the cache's KV heads.
    scale: factor of the scores, 1 / sqrt(D) if None.
    backend: auto, reference or triton. auto takes triton on a CUDA GPU where it serves the
        head_dim and precision.

    Returns (B, 1, heads, D) in the precision of q. A sequence that is only padding up to its newest
    token gets zeros.
    Raises ValueError for a shape, precision or device that does not fit the cache, for an empty
    cache, for a backend that cannot serve the call, and for a q that requires gradients.
    """
    batch, tokens, heads, dim = q.shape
    if (batch, tokens, dim) != (cache.batch, 1, cache.head_dim) or heads % len(cache.windows):
        fitting = f"({cache.batch}, 1, a multiple of {len(cache.windows)}, {cache.head_dim})"
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, but the cache takes {fitting}")
    if q.dtype != cache.dtype or q.device != cache.device:
        raise ValueError(
            f"q is {q.dtype} on {q.device}, but the cache holds {cache.dtype} on {cache.device}"
        )
    if cache.length == 0:
        raise ValueError(
            "the cache is empty: append the new token's key and value before its attention"
        )
    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError(
            "decode_attention has no gradient: call it under torch.no_grad() or "
            "torch.inference_mode()"
        )
    scale = dim**-0.5 if scale is None else scale
    if _choose(backend, q.device.type, q.dtype, dim) == "reference":
        return _reference(q, cache, scale)
    from megaconsa.kernels.decode import triton

    return triton.attention(q, cache, scale)


@lru_cache
def _choose(backend: str, device: str, dtype: torch.dtype, dim: int) -> str:
    """The backend that runs. The log says once per kind of problem what `auto` took."""
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend {backend} cannot decode; choose one of auto, reference, triton")
    if backend == "reference":
        return backend
    reason = _triton_refusal(device, dtype, dim)
    if backend == "triton":
        if reason is not None:
            raise ValueError(
                f"backend triton cannot decode this: {reason}; choose auto or reference"
            )
        return backend
    if reason is None and device != "cuda":
        reason = "Triton's interpreter is for tests"
    if reason is None:
        logger.info(
            "decoding with backend=auto takes triton: full and windowed heads in one launch"
        )
        return "triton"
    logger.info("decoding with backend=auto takes reference: %s", reason)
    return "reference"


def _triton_refusal(device: str, dtype: torch.dtype, dim: int) -> str | None:
    """Why the Triton kernels cannot serve the call, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from megaconsa.kernels.decode import triton

    return triton.refusal(device, dtype, dim)


def _reference(q: Tensor, cache: KVCache, scale: float) -> Tensor:
    """Attention with masks over all slots. fp64 is computed in fp64, all else in fp32."""
    batch, _, heads, dim = q.shape
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.reshape(batch, len(cache.windows), -1, dim).to(compute)  # (B, kv_heads, group, D)
    out = torch.empty_like(grouped)
    for group in cache.groups:
        # Age: tokens stored since the one in the slot, 0 for the newest token. The age of a slot
        # that was never written is at least the number of tokens, so it is not visible.
        age = (cache.position - 1 - torch.arange(group.slots, device=q.device)) % group.slots
        visible = (age < cache.position - cache.start[:, None])[:, None, None]  # (B, 1, 1, slots)
        scores = grouped[:, group.heads] @ group.keys.to(compute).transpose(-1, -2) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        # Without a visible key the softmax gives NaN.
        weights = weights.masked_fill(~visible, 0)
        # An unused slot may hold NaN, and 0 * NaN is NaN.
        values = group.values.to(compute).masked_fill(~visible.transpose(-1, -2), 0)
        out[:, group.heads] = weights @ values
    return out.view(batch, 1, heads, dim).to(q.dtype)
