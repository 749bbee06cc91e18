"""The arithmetic of the table, compared with numbers computed by hand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint
from megaconsa.study.comparison import T_QUANTILES, agreement, mean_difference, overlap, t_quantile
from megaconsa.study.fields import Trial
from megaconsa.study.learning import best_units, read_learning, steps_to_target
from megaconsa.study.measures import Measures, SequenceLosses
from megaconsa.study.results import ResultRow, collect
from megaconsa.study.runs import Runs
from megaconsa.study.table import aligned, interval_text, markdown, write

DENSE = SequenceLosses([20.0, 30.0], [10, 10])


def test_several_runs_give_a_t_interval() -> None:
    """The means are 2.6, 2.7 and 2.8, compared with 2.5.

    The differences are 0.1, 0.2 and 0.3, with a standard deviation of 0.1.
    """
    others = [SequenceLosses([half, half], [10, 10]) for half in (26.0, 27.0, 28.0)]
    interval = mean_difference([(losses, DENSE) for losses in others])
    assert interval is not None
    assert interval.over == "runs"
    assert interval.mean == pytest.approx(0.2)
    half_width = 4.3027 * 0.1 / math.sqrt(3)
    assert interval.low == pytest.approx(0.2 - half_width)
    assert interval.high == pytest.approx(0.2 + half_width)
    assert interval_text(interval) == "+0.2000 ± 0.2484 (r)"


def test_a_single_pair_has_its_interval_over_sequences() -> None:
    """Sequences differ by 1 and 3 nats over 10 tokens each.

    This is 0.2 per token, with a standard error of 0.1.
    """
    interval = mean_difference([(SequenceLosses([21.0, 33.0], [10, 10]), DENSE)])
    assert interval is not None
    assert interval.over == "sequences"
    assert interval.mean == pytest.approx(0.2)
    # sqrt(2 / 1 * ((1 - 2)^2 + (3 - 2)^2)) / 20
    assert interval.high == pytest.approx(0.2 + 1.95996 * 0.1)


def test_nothing_measured_has_no_difference() -> None:
    empty = SequenceLosses([0.0, 0.0], [0, 0])
    assert mean_difference([(empty, empty)]) is None
    assert mean_difference([]) is None
    assert empty.mean is None


def test_t_quantiles_fall_to_the_normal_one() -> None:
    assert t_quantile(1) == 12.7062
    assert t_quantile(20) == 2.0860
    # The values for 30 and 100 degrees of freedom are from a printed table.
    assert t_quantile(30) == pytest.approx(2.0423, abs=5e-3)
    assert t_quantile(100) == pytest.approx(1.9840, abs=5e-3)
    assert list(T_QUANTILES) == sorted(T_QUANTILES, reverse=True)


def test_overlap_is_the_share_of_full_heads_in_common() -> None:
    table = [[True, True, False], [True, False, False]]
    other = [[True, False, True], [True, True, False]]
    assert overlap(table, other) == pytest.approx(2 / 3)
    assert overlap([[False, False]], [[True, False]]) is None


def test_agreement_is_the_mean_over_pairs() -> None:
    first = [[True, True, False]]
    second = [[True, False, True]]
    third = [[False, True, True]]
    assert agreement([first, second, third]) == pytest.approx(0.5)
    assert agreement([first, first]) == 1
    assert agreement([first]) is None


def test_the_target_counts_as_reached_where_sparsity_stays_there() -> None:
    expected = [0.1, 0.5, 0.3, 0.495, 0.509, 0.5]
    rows = [{"step": step, "expected_sparsity": value} for step, value in enumerate(expected, 1)]
    assert steps_to_target(rows, 0.5) == 4
    assert steps_to_target(rows[:3], 0.5) is None


def test_best_units() -> None:
    scores = [[0.1, 0.9], [0.5, 0.9]]
    assert best_units(scores, 2) == {1, 3}
    assert best_units(scores, 3) == {1, 2, 3}


def test_learning_cost_is_a_ratio_of_medians_after_the_first_steps(tmp_path: Path) -> None:
    slow_start = [100.0] * 10
    _write_run(tmp_path / "start", [*slow_start, 1.0, 2.0, 3.0])
    _write_run(tmp_path / "learn", [*slow_start, 3.0, 3.0, 9.0])
    (tmp_path / "learn" / "gates.json").write_text(json.dumps({"scores": [[1.0, 2.0]]}))
    figures = read_learning(tmp_path / "learn", tmp_path / "start", 0.5)
    assert figures.cost == pytest.approx(1.5)
    assert figures.split_agreement == 0.25
    assert figures.separated_share is None
    assert figures.scores == [[1.0, 2.0]]


def test_the_table_is_written_in_every_form(tmp_path: Path) -> None:
    row = make_row(difference=mean_difference([(SequenceLosses([21.0, 33.0], [10, 10]), DENSE)]))
    write([row], tmp_path)
    (content,) = json.loads((tmp_path / "results.json").read_text())
    assert content["difference"]["mean"] == pytest.approx(0.2)
    with (tmp_path / "results.csv").open() as file:
        (by_name,) = csv.DictReader(file)
    assert float(by_name["difference_mean"]) == pytest.approx(0.2)
    assert by_name["difference_over"] == "sequences"
    assert by_name["cost"] == ""
    assert "+0.2000 ± 0.1960 (s)" in markdown([row])
    heading, line = aligned([row]).splitlines()
    assert heading.index("loss") == line.index("2.5000")


def make_row(**fields: Any) -> ResultRow:
    values: dict[str, Any] = dict.fromkeys(ResultRow.__dataclass_fields__)
    values |= {"arm": "evidence", "target": 0.5, "trials": 1, "validation_loss": 2.5}
    return ResultRow(**(values | fields))


def _write_run(folder: Path, seconds: list[float]) -> None:
    folder.mkdir()
    rows = []
    for step, value in enumerate(seconds, 1):
        rows.append({"step": step, "step_seconds": value, "split_agreement": 0.25})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def save_measures(runs: Runs, trial: Trial, loss: float) -> None:
    """Saves measures of two held-out sequences.

    Each sequence has ten tokens with `loss` nats per token.
    """
    losses = SequenceLosses([10 * loss, 10 * loss], [10, 10])
    table = [[True, True, False, False]] * 2
    measures = Measures(losses, losses, None, None, table, "kv_head", 4)
    file = runs.measures_file(trial)
    file.parent.mkdir(parents=True)
    measures.save(file)


def test_arms_are_paired_with_leave_one_out_of_their_scope_and_seed(
    make_runs: Callable[..., Runs], tmp_path: Path
) -> None:
    def scored(scope: str, **fields: Any) -> dict[str, Any]:
        return {"score": "leave-one-out", "scope": scope} | fields

    table = torch.tensor([[True, True, False, False]] * 2)
    from_scores = Allocation.from_scores(
        table.double(), Constraint(2, 4, 0.5, scope="global"), 16, {}
    )
    from_scores.save(tmp_path / "found.json")
    drawn = {"rule": "random", "draws": [0], "seeds": [0, 1, 2]}
    runs = make_runs(
        arms={
            "dense": {"rule": "dense", "seeds": [0, 1, 2]},
            "layers": scored("per_layer"),
            "global": scored("global", seeds=[0, 1]),
            "drawn": drawn | {"scope": "global"},
            "drawn-layers": drawn | {"scope": "per_layer"},
            # The file records its scope.
            "found": {"file": str(tmp_path / "found.json")},
        },
    )
    bases = {
        "dense": 2.0,
        "layers": 2.25,
        "global": 2.5,
        "drawn": 3.0,
        "drawn-layers": 3.0,
        "found": 3.0,
    }
    for trial in runs.study.trials():
        save_measures(runs, trial, bases[trial.arm] + trial.seed)
    found = {row.arm: row.leave_one_out_difference for row in collect(runs)}
    # Both arms have seeds 0 and 1. Seed 2 has no partner.
    assert found["drawn"] is not None
    assert found["drawn"].mean == pytest.approx(0.5)
    assert found["drawn"].over == "runs"
    assert found["drawn-layers"] is not None
    assert found["drawn-layers"].mean == pytest.approx(0.75)
    assert found["drawn-layers"].over == "sequences"
    assert found["found"] is not None
    assert found["found"].mean == pytest.approx(0.5)
    assert found["dense"] is None
