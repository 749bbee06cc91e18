"""Patches to one DeepSpeed engine: what DeepSpeed 0.19 gets wrong in bf16 with a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_bf16(engine: Any) -> None:
    """Applies both patches.

    Tied weights are summed after the sum over data ranks. A rank without gradients contributes 0 to
    the gradient norm.
    """
    from deepspeed.runtime.pipe import schedule

    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: lambda engine: None,
        schedule.ReduceGrads: _reduce_over_data_then_stages,
    }
    engine.optimizer.get_grads_for_norm = _never_empty(engine.optimizer)


def _reduce_over_data_then_stages(engine: Any) -> None:
    """Reduces over data ranks first, then over the stages of tied weights.

    DeepSpeed sums over data ranks last. The two stages of a tied weight use different buckets
    there, so their rounding differs and the two copies drift apart. Here the stages are summed
    last. A sum of two terms does not depend on their order, so the copies stay equal.
    """
    engine._exec_reduce_grads()
    engine._exec_reduce_tied_grads()


def _never_empty(optimizer: Any) -> Callable[..., Any]:
    """Wraps `get_grads_for_norm`, which fails when a rank has no gradient to add to the norm.

    This happens on tensor ranks other than the first, if their stage holds only the final norm and
    a tied head.
    """
    original = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        found = original(for_clipping)
        if for_clipping or found[0]:
            return found
        return [optimizer.fp32_groups_gradients_flat[0].new_zeros(1)], found[1]

    return get_grads_for_norm
