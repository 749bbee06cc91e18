"""Patches to one DeepSpeed engine: what DeepSpeed 0.19 gets wrong in bf16 with a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def patch_bf16(engine: Any) -> None:
    """Applies both patches.

    Tied weights are summed after the sum over data ranks. The gradient norm takes a few launches,
    and a rank without gradients contributes 0 to it.
    """
    from deepspeed.runtime.pipe import schedule

    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: lambda engine: None,
        schedule.ReduceGrads: _reduce_over_data_then_stages,
    }
    engine.optimizer.get_grads_for_norm = _in_few_tensors(engine.optimizer)


def _reduce_over_data_then_stages(engine: Any) -> None:
    """Reduces over data ranks first, then over the stages of tied weights.

    DeepSpeed sums over data ranks last. The two stages of a tied weight use different buckets
    there, so their rounding differs and the two copies drift apart. Here the stages are summed
    last. A sum of two terms does not depend on their order, so the copies stay equal.
    """
    engine._exec_reduce_grads()
    engine._exec_reduce_tied_grads()


def _in_few_tensors(optimizer: Any) -> Callable[..., Any]:
    """Wraps `get_grads_for_norm`, which lists one gradient for each weight.

    DeepSpeed launches several kernels for each tensor of the list, and fails if it is empty. It is
    empty on tensor ranks other than the first, if their stage holds only the final norm and a tied
    head.
    """
    original = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        found = original(for_clipping)
        if for_clipping:
            return joined(found)
        if found[0]:
            return joined(found[0]), found[1]
        return [optimizer.fp32_groups_gradients_flat[0].new_zeros(1)], found[1]

    return get_grads_for_norm


def joined(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Vectors of one storage, with those that follow each other in memory as one view."""
    views: list[Tensor] = []
    begin = 0
    for number, vector in enumerate(vectors):
        following = vectors[number + 1] if number + 1 < len(vectors) else None
        if following is None or not _follows(following, vector):
            first = vectors[begin]
            size = sum(part.numel() for part in vectors[begin : number + 1])
            views.append(first.as_strided((size,), (1,)))
            begin = number + 1
    return views


def _follows(vector: Tensor, other: Tensor) -> bool:
    """Whether a vector begins in memory where the other one ends."""
    is_next = vector.data_ptr() == other.data_ptr() + other.numel() * other.element_size()
    return is_next and vector.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
