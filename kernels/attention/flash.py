"""Hybrid attention through FlashAttention.

Each run of neighbouring heads of one kind takes one call. The calls read and write slices of whole
tensors. So a finished allocation whose heads are sorted by kind costs two calls and nothing else:
no copy of q, k, v, and no zero-padded gradients. `flash_gated.py` computes gated heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megaconsa.kernels.attention import flash_library
from megaconsa.kernels.attention.flash_library import Packed
from megaconsa.kernels.attention.gating import mix
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.head_runs import Run, runs
from megaconsa.kernels.attention.problem import Problem
from megaconsa.kernels.last_result import remember_last

DTYPES = (torch.float16, torch.bfloat16)


def refusal(problem: Problem) -> str | None:
    """Why FlashAttention cannot serve the problem, or None."""
    if problem.device.type != "cuda":
        return "flash needs a CUDA GPU; take sdpa on this device"
    missing = flash_library.missing(problem.device)
    if missing is not None:
        return missing
    if problem.dtype not in DTYPES:
        return (
            f"flash computes in bf16 and fp16, not {problem.dtype}; set training.precision=bf16, "
            "or take triton or sdpa"
        )
    served = flash_library.served_head_dims(problem.device)
    if problem.head_dim not in served:
        return f"flash is not taken at head_dim {problem.head_dim} on this GPU; take triton or sdpa"
    if problem.packed and problem.earlier_keys:
        return "flash wants a query for every key of packed documents; take triton or sdpa"
    if problem.packed and torch.compiler.is_compiling():
        return "flash cannot be traced with packed documents; take triton or sdpa"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: HeadPattern,
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    """Hybrid attention. Shapes are those of `hybrid_attention`, except for these two:

    heads: windows and gates of all KV heads. A gate is (B, kv_heads).
    """
    windows, gate, closed = heads
    window = windows[0]
    length = k.shape[1]
    is_simple = documents is None and q.shape[1] == length and not torch.compiler.is_compiling()
    if gate is not None and is_simple and len(set(windows)) == 1 and window < length:
        # Imported here, because it needs triton. Machines without it can use the other backends.
        from megaconsa.kernels.attention import flash_gated

        return flash_gated.attention(q, k, v, gate, closed, window, scale)
    bounds, longest = (None, 0) if documents is None else document_bounds(documents)
    run = forward if torch.compiler.is_compiling() else _Eager.apply
    out: Tensor = run(q, k, v, windows, bounds, longest, scale)[0]
    if gate is None:
        return out
    full: Tensor = run(q, k, v, [length] * len(windows), bounds, longest, scale)[0]
    return mix(full, out, gate)


@remember_last
def document_bounds(documents: Tensor) -> tuple[Tensor, int]:
    """The bounds of all documents in the batch, and the tokens of the longest.

    documents: (B, S), non-decreasing ids in each sequence.
    """
    # Their number determines the shape, so the host must know it. All layers share the result, so
    # the host waits for the GPU once a micro-batch.
    ids = documents.cpu()
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first_tokens = begins.flatten().nonzero().flatten()
    bounds = torch.cat((first_tokens, torch.tensor([ids.numel()]))).int()
    return bounds.to(documents.device, non_blocking=True), int(bounds.diff().max())


def compute_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Sequence[int],
    bounds: Tensor | None,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """bounds, longest: those of packed documents, as in `flash_library.Packed`, or None.

    Returns out (B, S, heads, D), and lse: the log of the softmaxes' sums, fp32.

    lse is one vector that holds one (B, heads, queries) block per run, run after run. With
    documents a block is (heads, B S).
    """
    out, lse = _outputs(q)
    library = flash_library.find(q.device)
    packed = _packed(bounds, longest, q.shape[1])
    q_, k_, v_, out_ = (_in_tokens(x, packed) for x in (q, k, v, out))
    for run, run_lse in _with_lse(q, k, windows, lse, packed):
        library.forward(
            q_[..., run.q, :],
            k_[..., run.kv, :],
            v_[..., run.kv, :],
            out_[..., run.q, :],
            run_lse,
            run.window,
            scale,
            packed,
        )
    return out, lse


def compute_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    windows: Sequence[int],
    bounds: Tensor | None,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv.

    The order of sums over tiles varies unless torch.use_deterministic_algorithms is on.
    """
    dq, dk, dv = _gradients(q, k)
    library = flash_library.find(q.device)
    packed = _packed(bounds, longest, q.shape[1])
    of_queries = tuple(_in_tokens(x, packed) for x in (dout.contiguous(), q, out, dq))
    of_keys = tuple(_in_tokens(x, packed) for x in (k, v, dk, dv))
    for run, run_lse in _with_lse(q, k, windows, lse, packed):
        dout_, q_, out_, dq_ = (x[..., run.q, :] for x in of_queries)
        k_, v_, dk_, dv_ = (x[..., run.kv, :] for x in of_keys)
        library.backward(dout_, q_, k_, v_, out_, run_lse, dq_, dk_, dv_, run.window, scale, packed)
    return dq, dk, dv


def _packed(bounds: Tensor | None, longest: int, length: int) -> Packed | None:
    return None if bounds is None else Packed(bounds, longest, length)


def _in_tokens(x: Tensor, packed: Packed | None) -> Tensor:
    """x (B, S, heads, D), or as (B S, heads, D) if documents are packed."""
    return x if packed is None else x.flatten(0, 1)


def _with_lse(
    q: Tensor, k: Tensor, windows: Sequence[int], lse: Tensor, packed: Packed | None
) -> Iterator[tuple[Run, Tensor]]:
    """Each run with its part of lse, as `flash_library.Library` takes it."""
    batch, queries, heads, _ = q.shape
    _, length, kv_heads, _ = k.shape
    per_head = batch * queries
    for run in runs(windows, length, heads // kv_heads):
        block = lse[run.q.start * per_head : run.q.stop * per_head]
        shape = (batch, -1, queries) if packed is None else (-1, per_head)
        yield run, block.view(shape)


forward = torch.library.custom_op("megaconsa::flash_attention", compute_forward, mutates_args=())
"""`compute_forward` as an operator, which torch.compile can trace."""
backward = torch.library.custom_op(
    "megaconsa::flash_attention_backward", compute_backward, mutates_args=()
)


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Sequence[int],
    bounds: Tensor | None,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    windows: Sequence[int],
    bounds: Tensor | None,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, k)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads * batch * length,), dtype=torch.float32)


def _gradients(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.windows, bounds, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bounds, *output)
    ctx.mark_non_differentiable(output[1])


def _traced(ctx, dout, _):  # type: ignore[no-untyped-def]
    return _of_inputs(ctx, dout, backward)


forward.register_autograd(_traced, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator without torch's dispatch, which takes the host longer than the launches."""

    forward = staticmethod(compute_forward)
    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx, dout, _):  # type: ignore[no-untyped-def]
        return _of_inputs(ctx, dout, compute_backward)


def _of_inputs(ctx, dout, run):  # type: ignore[no-untyped-def]
    """run: `backward`, or what it computes."""
    q, k, v, bounds, out, lse = ctx.saved_tensors
    dq, dk, dv = run(dout, q, k, v, out, lse, ctx.windows, bounds, ctx.longest, ctx.scale)
    return dq, dk, dv, None, None, None, None
