"""Runs that become longer, and new runs with a longer context.

A run may become longer if it is then the run that it would have been.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.checkpoint import store
from megaconsa.config import build
from megaconsa.errors import InputError
from megaconsa.reporting.metrics import computed
from megaconsa.training.inputs import check_inputs
from tests.support.interruptions import RULE, StopAfter, contents, interrupted

MakeConfig = Callable[..., dict[str, Any]]
WSD = {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 4}


@pytest.fixture
def run_of(make_config: MakeConfig, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def values(
        name: str, steps: int, allocation: dict[str, Any] = RULE, **training: Any
    ) -> dict[str, Any]:
        return make_config(
            run={"dir": str(tmp_path / name)},
            allocation=allocation,
            training=WSD | {"steps": steps} | training,
        )

    return values


@pytest.mark.parametrize("stopped", [3, 7], ids=["constant", "last constant step"])
def test_a_longer_run_is_the_one_it_would_have_been(stopped: int, run_of: Any, train: Any) -> None:
    """The last 3 of 10 steps are below the full learning rate.

    Step 7 is the last one at the full rate.
    """
    whole = train(run_of("whole", 14))
    interrupted(run_of("longer", 10), StopAfter(stopped))
    longer = run_of("longer", 14)
    assert computed(train(longer)) == computed(whole)
    assert contents(longer["run"]["dir"]) == contents(run_of("whole", 14)["run"]["dir"])


def test_within_the_warmup_any_schedule_allows_it(run_of: Any, train: Any) -> None:
    cosine = {"schedule": "cosine", "decay_steps": 0, "warmup_steps": 4}
    whole = train(run_of("whole", 14, **cosine))
    interrupted(run_of("longer", 10, **cosine), StopAfter(4))
    assert computed(train(run_of("longer", 14, **cosine))) == computed(whole)


@pytest.mark.parametrize(
    ("stopped", "training", "said"),
    [
        (8, {}, r"its step 8 of 8 would have had another learning rate in a longer run"),
        (
            5,
            {"schedule": "cosine", "decay_steps": 0},
            r"its step 4 of 5 would have had another learning rate",
        ),
    ],
    ids=["decay", "cosine"],
)
def test_not_after_steps_that_depend_on_the_length(
    stopped: int, training: dict[str, Any], said: str, run_of: Any
) -> None:
    interrupted(run_of("run", 10, **training), StopAfter(stopped))
    with pytest.raises(InputError, match=rf"training.steps: 10 -> 14\): {said}.*model.init_from="):
        check_inputs(build(run_of("run", 14, **training)))


def test_a_finished_run_has_decayed(run_of: Any, train: Any) -> None:
    train(run_of("run", 10))
    with pytest.raises(InputError, match="its step 8 of 10 would have had another learning rate"):
        check_inputs(build(run_of("run", 14)))


def test_learning_runs_and_shorter_ones_are_refused(run_of: Any) -> None:
    learn = {"source": "learn"}
    interrupted(run_of("learn", 10, learn), StopAfter(3))
    with pytest.raises(InputError, match="gates decide by the length of the run"):
        check_inputs(build(run_of("learn", 14, learn)))
    interrupted(run_of("train", 10), StopAfter(3))
    with pytest.raises(InputError, match="longer, not shorter"):
        check_inputs(build(run_of("train", 8)))


def test_other_fields_stay_refused_beside_it(run_of: Any) -> None:
    interrupted(run_of("run", 10), StopAfter(3))
    with pytest.raises(InputError, match=r"\(training.decay_steps: 4 -> 5\); choose"):
        check_inputs(build(run_of("run", 14, decay_steps=5)))


def test_a_new_run_may_extend_the_context(
    make_config: MakeConfig, train: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(make_config(run={"dir": str(tmp_path / "short")}, allocation=RULE))
    longer = {
        "init_from": str(tmp_path / "short"),
        "rope_theta": 5e6,
        "max_position_embeddings": 8192,
    }
    values = make_config(run={"dir": str(tmp_path / "long")}, allocation=RULE, model=longer)
    with caplog.at_level(logging.INFO, "megaconsa"):
        check_inputs(build(values))
    assert (
        "max_position_embeddings: 4096 -> 8192; rope_theta: 1000000.0 -> 5000000.0" in caplog.text
    )
    train(values)
    assert store.resolve(tmp_path / "long").model_config.rope_theta == 5e6
    values["model"]["rope_theta"] = 1e6
    # A resumed run must keep these fields.
    with pytest.raises(InputError, match="another configuration"):
        check_inputs(build(values))
    wider = make_config(
        run={"dir": str(tmp_path / "wide")},
        allocation=RULE,
        model=longer | {"intermediate_size": 96},
    )
    with pytest.raises(InputError, match=r"model\.intermediate_size=96 contradicts"):
        build(wider)
