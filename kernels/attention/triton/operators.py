"""The Triton backend: hybrid attention with its autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.problem import Problem
from megaconsa.kernels.attention.triton.backward_operator import backward, compute_backward
from megaconsa.kernels.attention.triton.forward_operator import compute_forward, forward
from megaconsa.kernels.last_result import remember_last
from megaconsa.kernels.limits import DTYPES, HEAD_DIMS, INTERPRETED


def refusal(problem: Problem) -> str | None:
    """Why these kernels cannot serve the problem, or None."""
    if torch.version.hip:
        return "triton's kernels here are for NVIDIA GPUs; take sdpa"
    if problem.device.type != "cuda" and not INTERPRETED:
        return "triton needs a CUDA GPU; take sdpa on this device"
    if problem.dtype not in DTYPES:
        return f"triton computes in fp32, fp16 and bf16, not {problem.dtype}; take reference"
    if problem.head_dim not in HEAD_DIMS:
        supported = ", ".join(map(str, HEAD_DIMS))
        return f"triton supports head_dim {supported}, not {problem.head_dim}; take sdpa"
    if not problem.scale > 0:
        return f"triton needs a positive scale, not {problem.scale}; take sdpa"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: HeadPattern,
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    """Hybrid attention. Shapes are those of `hybrid_attention`, except for this one:

    heads: windows and gates of all KV heads. A gate is (B, kv_heads).
    """
    windows, gate, _ = heads
    starts: Tensor | None = None
    ends: Tensor | None = None
    if documents is not None:
        starts, ends = document_bounds(documents)
    if gate is not None:
        gate = gate.float()
    windows = tuple(min(window, k.shape[1]) for window in windows)
    run = forward if torch.compiler.is_compiling() else _Eager.apply
    out: Tensor = run(q, k, v, windows, gate, starts, ends, scale)[0]
    return out


@remember_last
def document_bounds(documents: Tensor) -> tuple[Tensor, Tensor]:
    """First position and end (exclusive) of each token's document, int32 (B, S) each.

    documents: (B, S), non-decreasing ids. All layers of a micro-batch share the result.
    """
    documents = documents.contiguous()
    starts = torch.searchsorted(documents, documents, out_int32=True)
    ends = torch.searchsorted(documents, documents, out_int32=True, right=True)
    return starts, ends


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.windows, gate, _, ends, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, gate, ends, *output)
    ctx.mark_non_differentiable(*output[1:])


def _traced(ctx, d_out, *_):  # type: ignore[no-untyped-def]
    return _gradients(ctx, d_out, backward)


forward.register_autograd(_traced, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator without torch's dispatch, which takes the host longer than the launches."""

    forward = staticmethod(compute_forward)
    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx, d_out, *_):  # type: ignore[no-untyped-def]
        return _gradients(ctx, d_out, compute_backward)


def _gradients(ctx, d_out, run):  # type: ignore[no-untyped-def]
    """run: `backward`, or what it computes."""
    q, k, v, gate, ends, *statistics = ctx.saved_tensors
    d_q, d_k, d_v, d_gate = run(d_out, q, k, v, ctx.windows, gate, ends, ctx.scale, *statistics)
    return d_q, d_k, d_v, None, None if gate is None else d_gate, None, None, None
