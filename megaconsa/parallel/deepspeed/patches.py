"""Patches to one DeepSpeed engine: what DeepSpeed 0.19 gets wrong in bf16 with a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from megaconsa.parallel.deepspeed.flat_views import joined
from megaconsa.parallel.deepspeed.gradient_reduction import GradientReduction


def patch_bf16(engine: Any, tied: Collection[Tensor]) -> GradientReduction | None:
    """Applies all patches.

    tied: weights that other stages hold too.

    Returns what averages gradients over data ranks, or None if there is one data rank.

    Tied weights are summed after the mean over data ranks. The gradient norm takes a few launches,
    and a rank without gradients contributes 0 to it.
    """
    from deepspeed.runtime.pipe import schedule

    optimizer = engine.optimizer
    reduction = None
    if engine.grid.get_data_parallel_world_size() > 1:
        reduction = GradientReduction(optimizer, tied)

    def reduce_over_data_then_stages(engine: Any) -> None:
        """Reduces over data ranks first, then over the stages of tied weights.

        DeepSpeed sums over data ranks last. The two stages of a tied weight use different buckets
        there, so their rounding differs and the two copies drift apart. Here the stages are summed
        last. A sum of two terms does not depend on their order, so the copies stay equal.
        """
        if reduction is not None:
            reduction.finish()
        engine._exec_reduce_tied_grads()

    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: lambda engine: None,
        schedule.ReduceGrads: reduce_over_data_then_stages,
    }
    optimizer.get_grads_for_norm = _in_few_tensors(optimizer, reduction)
    return reduction


def _in_few_tensors(optimizer: Any, reduction: GradientReduction | None) -> Callable[..., Any]:
    """Wraps `get_grads_for_norm`, which lists one gradient for each weight.

    DeepSpeed launches several kernels for each tensor of the list, and fails if it is empty. It is
    empty on tensor ranks other than the first, if their stage holds only the final norm and a tied
    head. With several data ranks, it would read gradients that are other ranks'.
    """
    original = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping and reduction is not None:
            return reduction.own_gradients()
        found = original(for_clipping)
        if for_clipping:
            return joined(found)
        if reduction is not None:
            return [reduction.own_norm(found[0])], found[1]
        if found[0]:
            return joined(found[0]), found[1]
        return [optimizer.fp32_groups_gradients_flat[0].new_zeros(1)], found[1]

    return get_grads_for_norm
