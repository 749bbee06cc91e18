"""The FlashAttention packages behind one pair of functions, which write to the caller's tensors.

flash-attn-4 (`flash_attn.cute`) runs on Hopper and Blackwell, flash-attn 2 on the other GPUs. We
call the functions below their public ones, because the public ones take no buffers to write to
and do not leave the backward pass to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Documents that follow each other without gaps."""

    bounds: Tensor
    """First token of each document, then the number of all tokens, int32 (documents + 1,)."""
    longest: int
    """Tokens of the longest document."""
    length: int
    """Tokens of a sequence. No document has more."""


class Forward(Protocol):
    """Writes out and lse."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        window: int | None,
        scale: float,
        packed: Packed | None = None,
    ) -> None: ...


class Backward(Protocol):
    """Writes dq, dk and dv."""

    def __call__(
        self,
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
        packed: Packed | None = None,
    ) -> None: ...


@dataclass(frozen=True)
class Library:
    """Causal attention over heads of one kind.

    q, out, dout, dq: (B, queries, heads, D), with contiguous rows and any strides. The queries are
        the last tokens of a sequence.
    k, v, dk, dv: (B, S, kv_heads, D), with contiguous rows and any strides.
    lse: fp32 (B, heads, queries), contiguous.
    window: None is full attention.
    packed: None makes each sequence one document. Otherwise B and S are one dimension of tokens,
        and lse is (heads, tokens).
    """

    forward: Forward
    backward: Backward


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


@torch.compiler.assume_constant_result
def gates_were_measured(device: torch.device) -> bool:
    """Whether gated heads were faster on such a GPU with its library than with our kernel."""
    return _capability(device) == 9


@lru_cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _is_for_4(capability: int) -> bool:
    return capability in (9, 10, 11)


@lru_cache
def _flash_attn_4() -> Library:
    interface: ModuleType = import_module("flash_attn.cute.interface")

    def options(
        window: int | None, scale: float, packed: Packed | None
    ) -> dict[str, int | float | bool | Tensor | None]:
        # Our windows count the query itself, theirs do not.
        chosen: dict[str, int | float | bool | Tensor | None] = {
            "softmax_scale": scale,
            "causal": True,
            "window_size_left": None if window is None else window - 1,
            "window_size_right": None if window is None else 0,
        }
        if packed is not None:
            chosen["cu_seqlens_q"] = chosen["cu_seqlens_k"] = packed.bounds
            # It chooses kernels by this bound. One that varies could compile others in a run.
            chosen["max_seqlen_q"] = chosen["max_seqlen_k"] = packed.length
        return chosen

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        window: int | None,
        scale: float,
        packed: Packed | None = None,
    ) -> None:
        interface._flash_attn_fwd(q, k, v, out=out, lse=lse, **options(window, scale, packed))

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
        packed: Packed | None = None,
    ) -> None:
        interface._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **options(window, scale, packed),
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

    def bounds(packed: Packed) -> tuple[Tensor, Tensor, int, int]:
        return packed.bounds, packed.bounds, packed.longest, packed.longest

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        window: int | None,
        scale: float,
        packed: Packed | None = None,
    ) -> None:
        chosen = options(window, scale)
        if packed is None:
            result = interface._flash_attn_forward(q, k, v, return_softmax=False, **chosen)
        else:
            result = interface._flash_attn_varlen_forward(
                q, k, v, *bounds(packed), return_softmax=False, **chosen
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
        packed: Packed | None = None,
    ) -> None:
        tensors = (dout, q, k, v, out, lse, dq, dk, dv)
        chosen = options(window, scale)
        chosen["deterministic"] = torch.are_deterministic_algorithms_enabled()
        if packed is None:
            interface._flash_attn_backward(*tensors, **chosen)
        else:
            interface._flash_attn_varlen_backward(*tensors, *bounds(packed), **chosen)

    return Library(forward, backward)
