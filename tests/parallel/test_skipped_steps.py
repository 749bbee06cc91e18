"""A step with a NaN on one rank is skipped on all ranks.

What follows equals, bit for bit, a run that never computed that step.
"""

from __future__ import annotations

import pytest
import torch

from megaconsa.reporting.metrics import computed, read_metrics
from tests.support.comparison import checkpoint, tensors
from tests.support.topologies import (
    DP2,
    LEARN_TIED,
    PP2,
    PP2_DUALPIPEV,
    PP2_INTERLEAVED,
    STEPS,
    TP2_SEQUENCE,
    Job,
    Layout,
    Runs,
)


@pytest.mark.parametrize(
    "layout",
    [
        DP2,
        *(
            pytest.param(each, marks=pytest.mark.nightly)
            for each in (TP2_SEQUENCE, PP2, PP2_DUALPIPEV, PP2_INTERLEAVED)
        ),
    ],
)
def test_a_nan_on_one_rank_skips_the_step_on_all(layout: Layout, runs: Runs) -> None:
    precisions = ("fp32", "bf16")
    jobs = [
        Job(fault, LEARN_TIED, precision, fault)
        for precision in precisions
        for fault in ("nan", "passed_over")
    ]
    runs.launch(layout, jobs)
    for precision in precisions:
        skipped, passed_over = (
            runs.run_of(layout, job) for job in jobs if job.precision == precision
        )
        rows, expected = (
            computed(read_metrics(run / "metrics.jsonl")) for run in (skipped, passed_over)
        )
        assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
        assert rows[2]["grad_norm"] is None
        assert rows[:2] + rows[3:] == expected[:2] + expected[3:], precision
        own = checkpoint(skipped, STEPS)
        theirs = checkpoint(passed_over, STEPS)
        assert own.state["optimizer_steps"] == theirs.state["optimizer_steps"] == STEPS - 1
        assert tensors(own).keys() == tensors(theirs).keys()
        for name, tensor in tensors(own).items():
            assert torch.equal(tensor, tensors(theirs)[name]), f"{precision} {name}"
        # A checkpoint waits for a step that is applied.
        assert not (skipped / "checkpoints" / "step_3").exists()
