"""The division of the ranks: what is refused, and the schedules of the pipeline.

The schedules are compared with DeepSpeed's own orders of passes.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from typing import Any

import pytest

from megaconsa.config import Config, build
from megaconsa.errors import InputError
from megaconsa.parallel.topology import Topology


def config(global_batch: int = 16, micro_batch: int = 1, **parallel: Any) -> Config:
    return build(
        {
            "run": {"dir": "run"},
            "model": {"num_hidden_layers": 16},
            "attention": {"window": 8},
            "allocation": {"source": "rule"},
            "parallel": parallel,
            "training": {
                "steps": 1,
                "micro_batch": micro_batch,
                "global_batch": global_batch,
                "sequence_length": 32,
                "learning_rate": 0.1,
            },
            "data": {"path": "data"},
        }
    )


def test_the_rest_of_the_world_is_data_parallel() -> None:
    assert Topology.of(config(), 1) == Topology(1, 1, 1, 16)
    assert Topology.of(config(tensor=2, pipeline=2), 8) == Topology(2, 2, 2, 8)
    assert Topology.of(config(tensor=2, pipeline=2, micro_batch=4), 8) == Topology(2, 2, 2, 2)
    assert Topology.of(config(context=2, tensor=2), 8) == Topology(2, 1, 2, 8, context=2)
    assert Topology.of(config(pipeline=2, schedule="dualpipev", micro_batch=4), 2) == Topology(
        1, 2, 1, 4, "dualpipev"
    )


@pytest.mark.parametrize(
    ("run", "processes", "message"),
    [
        (
            config(tensor=2, pipeline=2),
            6,
            "6 processes are not a multiple of parallel.tensor=2 x parallel.pipeline=2; "
            "start 4 or 8, or lower one",
        ),
        (
            config(tensor=2, context=2),
            6,
            "6 processes are not a multiple of parallel.tensor=2 x parallel.context=2 x "
            "parallel.pipeline=1; start 4 or 8, or lower one",
        ),
        (
            config(tensor=2),
            1,
            "1 processes are not a multiple of parallel.tensor=2 x parallel.pipeline=1",
        ),
        (
            config(micro_batch=4),
            3,
            "training.global_batch=16 must be a multiple of training.micro_batch=4 x data ranks=3 "
            "(3 processes); use 12 or 24",
        ),
        (
            config(micro_batch=4),
            8,
            "training.global_batch=16 must be a multiple of training.micro_batch=4 x data ranks=8",
        ),
        (
            config(pipeline=2, micro_batch=8),
            4,
            "training.global_batch=16 makes 1 micro-batches on each of 2 data ranks, "
            "fewer than the 2 stages of parallel.pipeline=2: stages would idle; "
            "raise training.global_batch to 32, or lower training.micro_batch",
        ),
        (
            config(pipeline=2, micro_batch=8, schedule="dualpipev"),
            2,
            "fewer than the 4 stages of parallel.pipeline=2: parallel.schedule=dualpipev "
            "cannot run; raise training.global_batch to 32",
        ),
        (
            config(pipeline=2, micro_batch=16, schedule="interleaved"),
            2,
            "makes 1 micro-batches on each of 1 data ranks, fewer than the 2 stages",
        ),
        (
            config(pipeline=3, schedule="interleaved"),
            3,
            "makes 16 micro-batches on each of 1 data ranks, and parallel.schedule=interleaved "
            "needs a multiple of parallel.pipeline=3; use training.global_batch 15 or 18, or ",
        ),
    ],
)
def test_refusals(run: Config, processes: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Topology.of(run, processes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stages_of_the_ranks() -> None:
    assert [Topology(1, 3, 1, 6).stages_of(rank) for rank in range(3)] == [(0,), (1,), (2,)]
    assert [Topology(1, 3, 1, 6, "dualpipev").stages_of(rank) for rank in range(3)] == [
        (0, 5),
        (1, 4),
        (2, 3),
    ]


def passes(topology: Topology) -> list[list[Any]]:
    """Returns the instructions of each pipeline rank in one step, as DeepSpeed gives them."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.pipe import schedule

    made = schedule.TrainSchedule
    if topology.schedule == "dualpipev":
        made = schedule.DualPipeVSchedule
    instructions = []
    for rank in range(topology.pipeline):
        steps = made(topology.accumulation, topology.pipeline, rank).steps()
        instructions.append([command for step in steps for command in step])
    return instructions


TOPOLOGIES = [
    *[
        Topology(1, pipeline, 1, pipeline + extra)
        for pipeline in (1, 2, 3, 4, 8)
        for extra in (0, 1, 9)
    ],
    *[
        Topology(1, pipeline, 1, 2 * pipeline + extra, "dualpipev")
        for pipeline in (2, 3, 4, 8)
        for extra in (0, 1, 9)
    ],
]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_micro_batches_in_flight(topology: Topology) -> None:
    """Counts along the passes of each rank.

    A forward pass keeps its activations until its backward pass.
    """
    for rank, instructions in enumerate(passes(topology)):
        held = [0] * len(topology.stages_of(rank))
        peak = tuple(held)
        for each in instructions:
            if type(each).__name__ in ("ForwardPass", "BackwardPass"):
                held[getattr(each, "phase", 0)] += 1 if type(each).__name__ == "ForwardPass" else -1
                peak = max(peak, tuple(held), key=sum)
        assert topology.in_flight(rank) == peak


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_bubble(topology: Topology) -> None:
    """Simulates DeepSpeed's schedule.

    A forward pass of a stage takes 1, a backward pass takes 2, and exchanges take no time.
    """
    busy = 3 * topology.accumulation * len(topology.stages_of(0))
    assert topology.bubble == pytest.approx(1 - busy / duration(topology))


Exchange = tuple[str, int, int]
"""An exchange between stages: activation or gradient, micro-batch, receiving stage."""


def duration(topology: Topology) -> int:
    """Simulates the time of one step.

    A rank that exchanges continues when the other side of each of its exchanges has arrived. 1F1B
    waits at each exchange. DualPipeV queues some exchanges and waits for all of them at CommitP2P.
    """
    ranks: list[list[int | list[Exchange]]] = []
    for rank, instructions in enumerate(passes(topology)):
        program: list[int | list[Exchange]] = []
        queued: list[Exchange] = []
        counts: Counter[tuple[str, int]] = Counter()
        for each in instructions:
            kind = type(each).__name__
            phase = getattr(each, "phase", 0)
            if kind in ("ForwardPass", "BackwardPass"):
                program.append(1 if kind == "ForwardPass" else 2)
            elif kind.startswith(("Send", "Recv")):
                offset = {"SendActivation": 1, "SendGrad": -1}.get(kind, 0)
                receiver = topology.stages_of(rank)[phase] + offset
                queued.append((kind[4:], counts[kind, phase], receiver))
                counts[kind, phase] += 1
            if queued and (topology.schedule == "1f1b" or kind == "CommitP2P"):
                program.append(queued)
                queued = []
        assert not queued
        ranks.append(program)
    clock = [0] * len(ranks)
    place = [0] * len(ranks)
    reached: dict[Exchange, dict[int, int]] = defaultdict(dict)
    while any(place[rank] < len(program) for rank, program in enumerate(ranks)):
        before = list(place)
        for rank, program in enumerate(ranks):
            while place[rank] < len(program):
                work = program[place[rank]]
                if isinstance(work, int):
                    clock[rank] += work
                else:
                    for exchange in work:
                        reached[exchange][rank] = clock[rank]
                    if any(len(reached[exchange]) < 2 for exchange in work):
                        break
                    clock[rank] = max(max(reached[exchange].values()) for exchange in work)
                place[rank] += 1
        assert place != before, "the schedule hangs"
    return max(clock)


def test_bubble_in_figures() -> None:
    assert Topology(1, 1, 1, 1).bubble == 0
    assert Topology(1, 4, 1, 4).bubble == pytest.approx(3 / 7)
    assert Topology(1, 4, 1, 16).bubble == pytest.approx(18 / 114)
    assert Topology(1, 4, 1, 16, "dualpipev").bubble == pytest.approx(14 / 110)
