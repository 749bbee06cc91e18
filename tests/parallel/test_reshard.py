"""A run stops in one topology and resumes in another.

Its tensors are equal bit for bit, and its losses up to rounding. tests/support/topology_worker.py
compares what the ranks hold after loading with what was saved.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megaconsa.reporting.metrics import computed, read_metrics
from tests.support.comparison import checkpoint
from tests.support.topologies import (
    CP2,
    DP2,
    LEARN_TIED,
    ONE,
    PP2,
    PP2_DP2,
    PP2_DUALPIPEV,
    PP2_INTERLEAVED,
    RECOMPUTED_TIED,
    TP2_DP2,
    TP2_PP2,
    TP2_SEQUENCE,
    TRAIN_UNTIED,
    Case,
    Job,
    Layout,
    Runs,
)

OTHERS = (ONE, TP2_SEQUENCE, CP2, PP2, DP2, PP2_DP2, PP2_DUALPIPEV, PP2_INTERLEAVED)


def contents(run: Path, step: int) -> dict[str, bytes]:
    saved = checkpoint(run, step).path
    return {
        path.name: path.read_bytes()
        for path in [*saved.glob("*.safetensors"), *saved.glob("allocation.json")]
    }


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ONE, marks=pytest.mark.nightly),
        pytest.param(TP2_PP2, marks=pytest.mark.slow),
    ],
    ids=lambda layout: layout.name,
)
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(runs: Runs, layout: Layout) -> None:
    """Compares 20 steps with 7 and then 13 steps."""
    cases = {"learn": LEARN_TIED, "train": TRAIN_UNTIED}
    whole = runs.launch(
        layout, [Job(f"{name}-whole", case, steps=20, every=20) for name, case in cases.items()]
    )
    runs.launch(
        layout,
        [Job(f"{name}-stopped", case, steps=20, stop=7, every=20) for name, case in cases.items()],
    )
    stopped = runs.launch(
        layout, [Job(f"{name}-stopped", case, steps=20, every=20) for name, case in cases.items()]
    )
    for name in cases:
        one = whole[f"{name}-whole"]
        two = stopped[f"{name}-stopped"]
        rows = [computed(read_metrics(run / "metrics.jsonl")) for run in (one, two)]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 20
        assert contents(one, 20) == contents(two, 20)
        # The next batch is a function of this number and the seed.
        for run in (one, two):
            assert checkpoint(run, 20).state["sequences"] == 160


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        (TP2_DP2, "fp32"),
        (TP2_DP2, "bf16"),
        pytest.param(TP2_PP2, "bf16", marks=pytest.mark.slow),
        pytest.param(PP2_DP2, "bf16", marks=pytest.mark.slow),
        pytest.param(CP2, "bf16", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_restart_reads_what_its_ranks_keep(runs: Runs, layout: Layout, precision: str) -> None:
    """The worker counts what each rank reads, and compares all ranks with the checkpoint.

    Both ranks wrote some tensors of the checkpoint together. The vocabulary is padded, and the
    table changes the order of heads.
    """
    case = Case("read-little", RECOMPUTED_TIED.sections)
    start = [Job("read-little", case, precision, fault="divided_tensors", steps=4, stop=2, every=4)]
    if not runs.run_of(DP2, start[0]).exists():
        runs.launch(DP2, start)
    written = {path.name for path in checkpoint(runs.run_of(DP2, start[0]), 2).path.iterdir()}
    assert "model-model.embed_tokens.weight.safetensors" in written
    assert "optimizer-exp_avg.model.embed_tokens.weight.safetensors" in written
    jobs = [Job("read-little", case, precision=precision, steps=4, every=4)]
    go_on(runs, runs.run_of(DP2, start[0]), layout, jobs)


@pytest.mark.nightly
def test_copies_of_a_tied_weight_stay_equal(runs: Runs) -> None:
    """Runs in bf16 with three data ranks.

    A checkpoint holds one of the copies, so a resumed run would differ if the copies differed.
    """
    case = Case("tied-12", LEARN_TIED.sections | {"training": {"global_batch": 12}})
    layout = Layout("pp2-dp3", 6, {"pipeline": 2})
    whole = runs.launch(layout, [Job("tied-12-whole", case, precision="bf16", steps=8, every=8)])[
        "tied-12-whole"
    ]
    runs.launch(layout, [Job("tied-12-stopped", case, precision="bf16", steps=8, stop=3, every=8)])
    stopped = runs.launch(
        layout, [Job("tied-12-stopped", case, precision="bf16", steps=8, every=8)]
    )["tied-12-stopped"]
    assert contents(whole, 8) == contents(stopped, 8)


def go_on(runs: Runs, start: Path, layout: Layout, jobs: list[Job]) -> dict[str, Path]:
    """Launches jobs that each resume from a copy of a run."""
    for job in jobs:
        shutil.copytree(start, runs.run_of(layout, job))
    return runs.launch(layout, jobs)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(LEARN_TIED, marks=pytest.mark.slow),
        pytest.param(TRAIN_UNTIED, marks=pytest.mark.nightly),
    ],
    ids=lambda case: case.name,
)
def test_from_tensor_and_pipeline_parallel_to_any_other_and_back(runs: Runs, case: Case) -> None:
    """Trains 10 steps in two ways.

    One way is 5 steps in TP2 x PP2 and 5 in the other topology. The other way is 5 steps in TP2 x
    PP2, 3 in the other topology, and 2 in TP2 x PP2 again.
    """
    done = runs.launch(
        TP2_PP2,
        [
            Job(f"{case.name}-undisturbed", case, steps=10, every=10),
            Job(f"{case.name}-left", case, steps=10, stop=5, every=10),
        ],
    )
    losses = [
        row["loss"] for row in read_metrics(done[f"{case.name}-undisturbed"] / "metrics.jsonl")
    ]
    returning = []
    for layout in OTHERS:
        name = f"{case.name}-{layout.name}"
        jobs = [
            Job(f"{name}-stays", case, steps=10, every=10),
            Job(f"{name}-returns", case, steps=10, stop=8, every=10),
        ]
        runs_there = go_on(runs, done[f"{case.name}-left"], layout, jobs)
        stayed = read_metrics(runs_there[f"{name}-stays"] / "metrics.jsonl")
        assert [row["loss"] for row in stayed] == pytest.approx(losses, rel=1e-5)
        back = Job(f"{name}-returns", case, steps=10, every=10)
        shutil.copytree(runs_there[f"{name}-returns"], runs.run_of(TP2_PP2, back))
        returning.append(back)
    for run in runs.launch(TP2_PP2, returning).values():
        assert [row["loss"] for row in read_metrics(run / "metrics.jsonl")] == pytest.approx(
            losses, rel=1e-5
        )
