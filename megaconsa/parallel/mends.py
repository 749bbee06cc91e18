"""What DeepSpeed 0.19 gets wrong in bf16 with a pipeline, put right in one engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def mend_bf16(engine: Any) -> None:
    """Sums of tied weights after those over data ranks, and a gradient norm where a rank has nothing to add to it."""
    from deepspeed.runtime.pipe import schedule

    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: lambda engine: None,
        schedule.ReduceGrads: _reduce_over_data_then_stages,
    }
    engine.optimizer.get_grads_for_norm = _never_empty(engine.optimizer)


def _reduce_over_data_then_stages(engine: Any) -> None:
    """In DeepSpeed's order both stages of a tied weight sum over data ranks last, in buckets of other sizes and so with other
    rounding: the copies part. A sum over two stages has one order only."""
    engine._exec_reduce_grads()
    engine._exec_reduce_tied_grads()


def _never_empty(optimizer: Any) -> Callable[..., Any]:
    """`get_grads_for_norm` is stacked also where it finds no gradient: on a rank other than the first of its tensor group whose stage
    holds the final norm and a tied head only."""
    original = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        found = original(for_clipping)
        if for_clipping or found[0]:
            return found
        return [optimizer.fp32_groups_gradients_flat[0].new_zeros(1)], found[1]

    return get_grads_for_norm
