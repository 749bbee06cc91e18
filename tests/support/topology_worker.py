"""One rank that trains several configurations of one topology, one after the other.

A job is {"config": plain values of a run, "fault": None or a name in FAULTS, "kernels": whether
blocks run by the kernels of a GPU, in Triton's interpreter, "stop": None or the step after which
the run stops as if by a signal}.
All configurations have the same numbers of ranks. DeepSpeed keeps the topology in globals, so
another topology needs fresh processes.
A run that resumes from its own checkpoint must hold the saved tensors, bit for bit, before it
trains. No rank may read much more of them than it keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import safe_get_full_fp32_param

from megaconsa.checkpoint.store import Checkpoint
from megaconsa.config import build
from megaconsa.model import kernel_use
from megaconsa.parallel import gathered_weights, mesh, world
from megaconsa.parallel.deepspeed import flat_buckets
from megaconsa.parallel.deepspeed.engine import Engine
from megaconsa.parallel.deepspeed.weight_gathering import WeightGathering
from megaconsa.tensor_files import StoredTensor, TensorFiles
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from megaconsa.training.trainer import Row, Trainer
from tests.support.interruptions import StopAfter
from tests.support.planted_nan import nan_in_a_gradient

READ_LIMIT = 1.2
"""Bytes that a rank may read at a restart, as a multiple of those that it keeps."""
BYTES_KEPT = 12
"""Bytes of a weight and its two moments in fp32."""


def without_sums_over_heads() -> Any:
    """Leaves out a sum over ranks.

    The gradients of the norms of q and k remain those of the heads of this rank.
    """
    return patch("megaconsa.parallel.deepspeed.engine.sums_over_heads", lambda name: False)


def without_exchange_of_tied_weights() -> Any:
    """Leaves out the exchange between stages.

    A tied embedding keeps the gradient of its use in its own stage.
    """
    from megaconsa.parallel.deepspeed.pipeline_modules import CostCutModule

    return patch.object(
        CostCutModule, "get_tied_weights_and_groups", lambda self: list(self.tensor_sums)
    )


def with_a_nan_in_step_3_of_the_last_rank() -> Any:
    """Plants a NaN in the gradient of one parameter of that rank.

    The gradients of the other ranks are left alone.
    """
    step = Trainer.step

    def planted(trainer: Trainer) -> Row:
        world = trainer.mesh.world
        if trainer.progress.step != 2 or world.rank != world.size - 1:
            return step(trainer)
        with nan_in_a_gradient(trainer.engine):
            return step(trainer)

    return patch.object(Trainer, "step", planted)


def with_step_3_passed_over() -> Any:
    """Takes the batch of step 3 and computes nothing.

    Skipping a step must have the same result.
    """
    step = Trainer.step

    def passed_over(trainer: Trainer) -> Row:
        if trainer.progress.step != 2:
            return step(trainer)
        trainer._fetched = None
        before = trainer.progress
        batch = trainer.training.global_batch
        trainer.progress = replace(
            before,
            step=3,
            tokens=before.tokens + batch * trainer.training.sequence_length,
            sequences=before.sequences + batch,
            bad_steps=replace(before.bad_steps, skipped=1),
        )
        return {"step": 3, "loss": None, "tokens_per_second": 0.0, "mfu": None}

    return patch.object(Trainer, "step", passed_over)


def without_the_sum_of_a_block() -> Any:
    """Leaves out the sum of one block's gradients over data ranks, in every micro-batch."""
    from megaconsa.parallel.deepspeed.sharded_gradients import ShardedGradients

    sum_block = ShardedGradients._sum

    def sum_all_but_one(self: ShardedGradients, block: Any) -> None:
        if block is not self._blocks[0]:
            sum_block(self, block)
        else:
            self._works.append((block, Finished()))

    return patch.object(ShardedGradients, "_sum", sum_all_but_one)


class Finished:
    """A communication that has nothing to wait for."""

    def wait(self) -> None:
        pass


def with_divided_tensors() -> Any:
    """Lets several ranks write a tensor, as with hundreds of ranks. This is no fault."""
    stack = ExitStack()
    divide = gathered_weights._divided
    stack.enter_context(patch.object(gathered_weights, "SMALLEST_DIVIDED", 0))
    stack.enter_context(
        patch.object(gathered_weights, "_divided", lambda shape, share: divide(shape, share / 20))
    )
    return stack


FAULTS: dict[str, Callable[[], Any]] = {
    "sums_over_heads": without_sums_over_heads,
    "tied_weights": without_exchange_of_tied_weights,
    "block_sum": without_the_sum_of_a_block,
    "nan": with_a_nan_in_step_3_of_the_last_rank,
    "passed_over": with_step_3_passed_over,
    "divided_tensors": with_divided_tensors,
}


def with_kernels() -> Any:
    """Runs blocks and norms as on a GPU, with the kernels in Triton's interpreter.

    Gradients are summed over data ranks in many buckets.
    """
    stack = ExitStack()
    stack.enter_context(patch.object(kernel_use, "kernels_serve_device", lambda device: True))
    stack.enter_context(patch.object(flat_buckets, "BUCKET_ELEMENTS", 5000))
    stack.enter_context(patch.object(flat_buckets, "SMALL_GROUP", 0))
    return stack


def check_engine_weights(trainer: Trainer) -> None:
    """Checks that the weights of the engine are the master weights in its precision.

    The master weights are divided over data ranks.
    """
    for name, parameter in trainer.engine.distributed.parameters.items():
        master = safe_get_full_fp32_param(parameter)
        assert torch.equal(master.to(parameter.dtype), parameter), name


def check_loaded(trainer: Trainer, saved: Checkpoint) -> None:
    """Checks that what the ranks hold, gathered, is what was saved.

    All ranks together look at each tensor once.
    """
    check_engine_weights(trainer)
    own = dict(trainer.engine.weights()) | dict(trainer.engine.moments())
    whole = dict(saved.weights()) | dict(saved.moments())
    for name, tensor in own.items():
        assert torch.equal(tensor.view(torch.int32), whole[name].view(torch.int32)), name
    seen = trainer.mesh.all_reduce(torch.tensor(len(own)))
    assert int(seen) == len(whole)


@contextmanager
def no_sum_behind_weights(trainer: Trainer) -> Iterator[None]:
    """Checks that no step sums over data ranks once it has begun to gather weights there.

    NCCL would let the sum wait for all weights.
    """
    data_ranks = getattr(trainer.engine.optimizer, "real_dp_process_group", [None])[0]
    is_gathering = False
    start = WeightGathering.start
    train_step = Engine.train_step
    all_reduce = torch.distributed.all_reduce

    def starting(self: WeightGathering) -> None:
        nonlocal is_gathering
        start(self)
        is_gathering = True

    def stepping(self: Engine, *arguments: Any, **named: Any) -> Any:
        nonlocal is_gathering
        result = train_step(self, *arguments, **named)
        is_gathering = False
        return result

    def summing(tensor: Any, *arguments: Any, group: Any = None, **named: Any) -> Any:
        assert not (is_gathering and group is data_ranks), "a sum waits for weights"
        return all_reduce(tensor, *arguments, group=group, **named)

    with (
        patch.object(WeightGathering, "start", starting),
        patch.object(Engine, "train_step", stepping),
        patch.object(torch.distributed, "all_reduce", summing),
    ):
        yield


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Yields a list that gets the bytes of each tensor and slice that is read from a file."""
    counted: list[int] = []

    def count(reader: Any) -> Any:
        read = reader.__getitem__

        def counting(self: Any, index: Any) -> torch.Tensor:
            found: torch.Tensor = read(self, index)
            counted.append(found.nbytes)
            return found

        return patch.object(reader, "__getitem__", counting)

    with count(TensorFiles), count(StoredTensor):
        yield counted


def check_reads(trainer: Trainer, read: int) -> None:
    """Checks that a restart read little more than the rank's own master weights and moments."""
    kept = 0
    for group in trainer.engine.adamw.param_groups:
        for partition in group["params"]:
            kept += BYTES_KEPT * partition.numel()
    assert 0 < read <= READ_LIMIT * kept, (read, kept)


def main(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("megaconsa").setLevel(logging.WARNING)
    try:
        for job in jobs:
            config = build(job["config"])
            place = mesh.initialize(config.parallel)
            inputs = check_inputs(config, place.world)
            with (
                FAULTS[job["fault"]]() if job["fault"] else nullcontext(),
                with_kernels() if job["kernels"] else nullcontext(),
            ):
                with counted_reads() as read:
                    trainer = build_trainer(inputs, place)
                if inputs.resume is not None:
                    check_reads(trainer, sum(read))
                    check_loaded(trainer, inputs.resume)
                if job["stop"]:
                    trainer.callbacks = [*trainer.callbacks, StopAfter(job["stop"])]
                with no_sum_behind_weights(trainer):
                    assert trainer.run() == (job["stop"] is None)
                check_engine_weights(trainer)
    finally:
        world.leave()
