"""The gathering of updated weights over data ranks, under the next forward pass.

Each data rank updates the weights of its partition. DeepSpeed's BF16 optimizer then gathers all
partitions, and waits. Here a step ends when the gathering has begun. Each layer of the next forward
pass waits for its own weights only, as in Megatron-LM's distributed optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from megaconsa.parallel.deepspeed.compute_clock import Pause
from megaconsa.parallel.deepspeed.flat_buckets import buckets


class WeightGathering:
    """Sends the weights of a BF16 optimizer from the data ranks that update them to all others."""

    def __init__(self, optimizer: Any, pipeline: Any, pause: Pause) -> None:
        """optimizer: DeepSpeed's BF16_Optimizer.

        pipeline: DeepSpeed's PipelineModule, whose layers will wait for their weights.
        pause: makes a context for these waits.
        """
        self._optimizer = optimizer
        self._pause = pause
        self._works: dict[int, Any] = {}
        """The unfinished calls, by number of the bucket."""
        self._sends: list[Callable[[], Any]] = []
        """Starts the gathering of each bucket, in the order in which layers need them."""
        layers = list(_layers(pipeline))
        first_layer_of: dict[int, int] = {}
        """The position of the first layer that needs a weight, by the weight's id."""
        for position, (_, weights) in enumerate(layers):
            for weight in weights:
                first_layer_of.setdefault(id(weight), position)
        in_order = []
        for group in range(len(optimizer.bf16_groups)):
            for bucket in buckets(optimizer, group):
                first_layer = min(first_layer_of[id(weight)] for weight in bucket.weights)
                in_order.append((first_layer, group, bucket))
        in_order.sort(key=lambda entry: entry[0])
        buckets_of: dict[int, list[int]] = {}
        for number, (_, group, bucket) in enumerate(in_order):
            self._sends.append(self._send(group, bucket.elements, bucket.owner))
            for weight in bucket.weights:
                buckets_of.setdefault(id(weight), []).append(number)
        for wait_before, weights in layers:
            needed = {number for weight in weights for number in buckets_of[id(weight)]}
            wait_before(partial(self._wait, sorted(needed)))

    @torch.no_grad()
    def start(self) -> None:
        """Rounds this rank's master weights to bf16 and begins to gather all ranks' weights."""
        self.finish()
        optimizer = self._optimizer
        for group, master in enumerate(optimizer.fp32_groups_flat_partition):
            optimizer.bf16_partitioned_groups[group][self._rank(group)].copy_(master)
        self._works = {number: send() for number, send in enumerate(self._sends)}

    def finish(self) -> None:
        """Waits for all weights. On a GPU, the current stream waits."""
        self._wait(list(self._works))

    def _wait(self, numbers: Sequence[int]) -> None:
        """Waits for the buckets of these numbers, if they are still under way."""
        unfinished = [number for number in numbers if number in self._works]
        if not unfinished:
            return
        with self._pause():
            for number in unfinished:
                self._works.pop(number).wait()

    def _rank(self, group: int) -> int:
        return dist.get_rank(self._optimizer.real_dp_process_group[group])

    def _send(self, group: int, elements: slice, owner: int | None) -> Callable[[], Any]:
        """The call that gathers a bucket."""
        flat = self._optimizer.bf16_groups_flat[group]
        ranks = self._optimizer.real_dp_process_group[group]
        if owner is None:
            own = self._optimizer.bf16_partitioned_groups[group][self._rank(group)]
            return partial(dist.all_gather_into_tensor, flat, own, group=ranks, async_op=True)
        return partial(dist.broadcast, flat[elements], owner, group=ranks, async_op=True)


def _layers(pipeline: Any) -> Iterator[tuple[Callable[[Any], None], Collection[Tensor]]]:
    """The layers of a rank in the order of a forward pass.

    Yields a function that makes a layer call another function first, and the layer's weights.
    """
    # DualPipeV and the interleaved schedule have two lists of layers.
    for functions in getattr(pipeline, "phase_funcs", [pipeline.forward_funcs]):
        for index, layer in enumerate(functions):
            if isinstance(layer, nn.Module):
                yield partial(_hook, layer), list(layer.parameters())
            else:
                # A tied head is a function of the embedding.
                (module,) = layer.args
                yield partial(_wrap, functions, index), list(module.parameters())


def _hook(layer: nn.Module, before: Callable[[], None]) -> None:
    layer.register_forward_pre_hook(lambda *_: before())


def _wrap(functions: list[Any], index: int, before: Callable[[], None]) -> None:
    functions[index] = partial(_after, before, functions[index])


def _after(before: Callable[[], None], function: Callable[[Any], Any], carry: Any) -> Any:
    before()
    return function(carry)
