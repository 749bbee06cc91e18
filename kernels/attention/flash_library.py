"""The FlashAttention packages behind one pair of functions, which write to the caller's tensors.

flash-attn-4 (`flash_attn.cute`) runs on Hopper and Blackwell, flash-attn 2 on the other GPUs. We
call the functions below their public ones, because the public ones take no buffers to write to
and do not leave the backward pass to the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int | None, float], None]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int | None, float],
    None,
]


@dataclass(frozen=True)
class Library:
    """Causal attention over heads of one kind.

    q, out, dout, dq: (B, S, heads, D), with contiguous rows and any strides.
    k, v, dk, dv: (B, S, kv_heads, D), with contiguous rows and any strides.
    lse: fp32 (B, heads, S), contiguous.
    window: None is full attention.
    """

    forward: Forward
    """(q, k, v, out, lse, window, scale) writes out and lse."""
    backward: Backward
    """(dout, q, k, v, out, lse, dq, dk, dv, window, scale) writes dq, dk and dv."""


def find(device: torch.device) -> Library:
    """The library for the GPU. Raises ImportError where it is not installed."""
    if _is_for_4(_capability(device)):
        return _flash_attn_4()
    return _flash_attn_2()


@torch.compiler.assume_constant_result
def served_head_dims(device: torch.device) -> tuple[int, ...]:
    """The head dimensions for which we use the GPU's library.

    flash-attn-4 accepts some for which its gradients are wrong. On Hopper, dq is silently wrong
    where head_dim is not a multiple of 32 (measured with 4.0.0b36 at 16 and 80,
    Dao-AILab/flash-attention#2896). On Blackwell, gradients were wrong at 256
    (NVIDIA/TransformerEngine#3216).
    """
    capability = _capability(device)
    if not _is_for_4(capability):
        return tuple(range(8, 257, 8))
    if capability == 9:
        return (32, 64, 96, 128, 256)
    return (32, 64, 96, 128)


@torch.compiler.assume_constant_result
def missing(device: torch.device) -> str | None:
    """Why there is no FlashAttention for this GPU, as `cause; fix`, or None."""
    capability = _capability(device)
    if capability < 8:
        return "flash needs a GPU of compute capability 8.0 (Ampere) or newer; take triton or sdpa"
    if _is_for_4(capability):
        name = "flash-attn-4"
        command = "pip install --pre flash-attn-4"
    else:
        name = "flash-attn"
        command = "pip install flash-attn"
    try:
        find(device)
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries is missing
        cause = " ".join(str(error).split())  # on one line
        return f"flash needs the package {name} on this GPU ({cause}); install it with {command}"
    return None


@lru_cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _is_for_4(capability: int) -> bool:
    return capability in (9, 10, 11)


@lru_cache
def _flash_attn_4() -> Library:
    interface: ModuleType = import_module("flash_attn.cute.interface")

    def bounds(window: int | None) -> dict[str, int | None]:
        if window is None:
            return {"window_size_left": None, "window_size_right": None}
        # Our windows count the query itself, theirs do not.
        return {"window_size_left": window - 1, "window_size_right": 0}

    def forward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int | None, scale: float
    ) -> None:
        interface._flash_attn_fwd(
            q, k, v, softmax_scale=scale, causal=True, out=out, lse=lse, **bounds(window)
        )

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        window: int | None,
        scale: float,
    ) -> None:
        interface._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            softmax_scale=scale,
            causal=True,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **bounds(window),
        )

    return Library(forward, backward)


@lru_cache
def _flash_attn_2() -> Library:
    interface: ModuleType = import_module("flash_attn.flash_attn_interface")

    def options(window: int | None, scale: float) -> dict[str, object]:
        # -1 is no bound. Our windows count the query itself, theirs do not.
        left = -1 if window is None else window - 1
        right = -1 if window is None else 0
        return {
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": True,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": 0.0,
            "alibi_slopes": None,
        }

    def forward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int | None, scale: float
    ) -> None:
        result = interface._flash_attn_forward(
            q, k, v, return_softmax=False, **options(window, scale)
        )
        out.copy_(result[0])
        lse.copy_(result[1])

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        window: int | None,
        scale: float,
    ) -> None:
        interface._flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **options(window, scale),
        )

    return Library(forward, backward)
