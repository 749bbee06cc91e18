"""Patches to one DeepSpeed engine: what DeepSpeed 0.19 gets wrong in bf16 with a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from megaconsa.config import Shard
from megaconsa.parallel.deepspeed.compute_clock import Pause
from megaconsa.parallel.deepspeed.flat_views import joined
from megaconsa.parallel.deepspeed.gradient_reduction import GradientReduction
from megaconsa.parallel.deepspeed.own_gradients import OwnGradients
from megaconsa.parallel.deepspeed.sharded_gradients import ShardedGradients
from megaconsa.parallel.pipeline import BlockLayer


class Reduction(Protocol):
    """Averages gradients over data ranks."""

    def begin(self) -> None:
        """Starts a step."""

    def begin_pass(self) -> None:
        """Called before each backward pass."""

    def added(self, weight: Tensor) -> None:
        """Notes that a backward pass has added to the gradient of a weight."""

    def finish(self) -> None:
        """Ends the sums after the last backward pass. Gradients are then means over data ranks."""

    def settle(self) -> None:
        """Called when the gradients of tied weights have been summed over stages."""


def patch_bf16(engine: Any, shard: Shard, pause: Pause) -> Reduction | None:
    """Applies all patches.

    pause: makes a context for waits that are not this rank's own work.

    Returns what averages gradients over data ranks, or None if there is one data rank.

    Tied weights are summed after the mean over data ranks. The gradient norm takes a few launches,
    and a rank without gradients contributes 0 to it.
    """
    from deepspeed.runtime.pipe import schedule

    optimizer = engine.optimizer
    tied = engine.module.tied_over_stages()
    reduction: Reduction | None = None
    own = None
    if engine.grid.get_data_parallel_world_size() > 1:
        if shard == "gradients":
            reduction = ShardedGradients(optimizer, _blocks(engine.module), tied, pause)
        else:
            reduction = GradientReduction(optimizer, tied)
        own = OwnGradients(optimizer)

    def reduce_over_data_then_stages(engine: Any) -> None:
        """Reduces over data ranks first, then over the stages of tied weights.

        DeepSpeed sums over data ranks last. The two stages of a tied weight use different buckets
        there, so their rounding differs and the two copies drift apart. Here the stages are summed
        last. A sum of two terms does not depend on their order, so the copies stay equal.
        """
        if reduction is not None:
            reduction.finish()
        engine._exec_reduce_tied_grads()
        if reduction is not None:
            reduction.settle()

    backward_pass = engine._INSTRUCTION_MAP[schedule.BackwardPass]

    def begin_and_run_pass(engine: Any, *arguments: Any, **named: Any) -> None:
        if reduction is not None:
            reduction.begin_pass()
        backward_pass(engine, *arguments, **named)

    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        schedule.BackwardPass: begin_and_run_pass,
        schedule.ReduceTiedGrads: lambda engine: None,
        schedule.ReduceGrads: reduce_over_data_then_stages,
    }
    optimizer.get_grads_for_norm = _in_few_tensors(optimizer, own)
    return reduction


def _blocks(module: nn.Module) -> list[list[Tensor]]:
    """The matrices of each block of a pipeline rank."""
    blocks = [layer for layer in module.modules() if isinstance(layer, BlockLayer)]
    return [[weight for weight in block.parameters() if weight.dim() > 1] for block in blocks]


def _in_few_tensors(optimizer: Any, own: OwnGradients | None) -> Callable[..., Any]:
    """Wraps `get_grads_for_norm`, which lists one gradient for each weight.

    DeepSpeed launches several kernels for each tensor of the list, and fails if it is empty. It is
    empty on tensor ranks other than the first, if their stage holds only the final norm and a tied
    head. With several data ranks, it would read gradients that are other ranks'.
    """
    original = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping and own is not None:
            return own.partitions
        found = original(for_clipping)
        if for_clipping:
            return joined(found)
        if own is not None:
            return [own.norm(found[0])], found[1]
        if found[0]:
            return joined(found[0]), found[1]
        return [optimizer.fp32_groups_gradients_flat[0].new_zeros(1)], found[1]

    return get_grads_for_norm
