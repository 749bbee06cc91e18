"""The interleaved schedule: its order, its bubble, and what it keeps in memory.

A simulation runs the instructions that DeepSpeed's engine gets. A receive waits until the other
rank has sent, and a send waits for nothing.
"""

from __future__ import annotations

import os
from fractions import Fraction
from typing import Any

import pytest
import torch

from megaconsa.parallel.deepspeed.messages import Layout, pack, unpack
from megaconsa.parallel.topology import Topology

SHAPES = [(2, 2), (2, 4), (2, 10), (3, 3), (3, 9), (4, 4), (4, 16), (8, 8), (8, 32)]


def instructions(topology: Topology, forward_only: bool = False) -> list[list[Any]]:
    """The instructions of each pipeline rank in one step."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from megaconsa.parallel.mesh import initialize

    initialize()
    from megaconsa.parallel.deepspeed.interleaved_engine import InterleavedSchedule

    found = []
    for rank in range(topology.pipeline):
        made = InterleavedSchedule(topology.accumulation, topology.pipeline, rank, forward_only)
        found.append([command for step in made.steps() for command in step])
    return found


def duration(topology: Topology, forward_only: bool = False) -> Fraction:
    """Simulates the time of a step.

    A forward pass of a stage takes 1, a backward pass takes 2, and messages take no time.
    """
    ranks = instructions(topology, forward_only)
    clock = [Fraction(0)] * len(ranks)
    place = [0] * len(ranks)
    sent: dict[tuple[str, int, int], Fraction] = {}
    posted: list[set[tuple[str, int]]] = [set() for _ in ranks]
    while any(place[rank] < len(program) for rank, program in enumerate(ranks)):
        before = list(place)
        for rank, program in enumerate(ranks):
            while place[rank] < len(program):
                each = program[place[rank]]
                kind = type(each).__name__
                if kind in ("RecvActivation", "RecvGrad"):
                    posted[rank].add((kind[4:], each.buffer_id))
                elif kind in ("SendActivation", "SendGrad"):
                    step = 1 if kind == "SendActivation" else -1
                    receiver = (rank + step) % len(ranks)
                    chunk = each.phase + (rank + step) // len(ranks)
                    buffer = chunk * topology.accumulation + each.buffer_id % topology.accumulation
                    sent[kind[4:], receiver, buffer] = clock[rank]
                elif kind == "WaitForMessage":
                    needed = "Activation" if each.is_forward else "Grad"
                    assert (needed, each.buffer_id) in posted[rank]
                    if (needed, rank, each.buffer_id) not in sent:
                        break
                    clock[rank] = max(clock[rank], sent[needed, rank, each.buffer_id])
                elif kind in ("ForwardPass", "BackwardPass"):
                    clock[rank] += 1 if kind == "ForwardPass" else 2
                place[rank] += 1
        assert place != before, "the schedule hangs"
    return max(clock)


@pytest.mark.parametrize(("pipeline", "micro_batches"), SHAPES)
def test_bubble(pipeline: int, micro_batches: int) -> None:
    topology = Topology(1, pipeline, 1, micro_batches, "interleaved")
    busy = 3 * micro_batches * 2
    assert topology.bubble == pytest.approx(float(1 - busy / duration(topology)))
    assert topology.bubble < Topology(1, pipeline, 1, micro_batches).bubble


@pytest.mark.parametrize(("pipeline", "micro_batches"), [*SHAPES, (2, 1), (4, 3), (3, 7)])
def test_an_evaluation_takes_any_number_of_micro_batches(pipeline: int, micro_batches: int) -> None:
    topology = Topology(1, pipeline, 1, micro_batches, "interleaved")
    assert duration(topology, forward_only=True) >= 2 * micro_batches


@pytest.mark.parametrize(("pipeline", "micro_batches"), SHAPES)
def test_micro_batches_in_flight(pipeline: int, micro_batches: int) -> None:
    """Counts along the passes of each rank.

    A forward pass keeps its activations until its backward pass.
    """
    topology = Topology(1, pipeline, 1, micro_batches, "interleaved")
    for rank, program in enumerate(instructions(topology)):
        held = [0, 0]
        peak = (0, 0)
        passed = []
        for each in program:
            kind = type(each).__name__
            if kind in ("ForwardPass", "BackwardPass"):
                held[each.phase] += 1 if kind == "ForwardPass" else -1
                peak = max(peak, (held[0], held[1]), key=sum)
                passed.append((kind, each.buffer_id))
        assert topology.in_flight(rank) == peak
        # Each chunk runs each micro-batch forward once, and backward once, later.
        buffers = range(2 * micro_batches)
        assert sorted(passed) == sorted(
            (kind, buffer) for kind in ("ForwardPass", "BackwardPass") for buffer in buffers
        )
        for buffer in buffers:
            assert passed.index(("ForwardPass", buffer)) < passed.index(("BackwardPass", buffer))


def test_the_stages_of_a_rank() -> None:
    topology = Topology(1, 3, 1, 6, "interleaved")
    assert topology.stages == 6
    assert [topology.stages_of(rank) for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]


def test_a_message_holds_its_tensors_bit_for_bit() -> None:
    tensors = [
        torch.randn(3, 5, 7).bfloat16(),
        torch.arange(11),
        torch.randn(2, 3, dtype=torch.float64),
        torch.tensor([1, 2], dtype=torch.int32),
    ]
    layout = Layout.of(tensors)
    message = pack(tensors)
    assert message.dtype == torch.uint8
    assert len(message) == layout.bytes
    for tensor, found in zip(tensors, unpack(message, layout), strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert layout.floating() == Layout.of([tensors[0], tensors[2]])
