"""Which jobs there are, what each waits for, and how its run is configured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa import config as configuration
from megaconsa.config import Config
from megaconsa.study import settings
from megaconsa.study.fields import Trial
from megaconsa.study.jobs import graph
from megaconsa.study.runs import Runs

PROTOCOLS = {
    "dense": {"rule": "dense"},
    "long": {"rule": "dense", "whole_budget": True},
    "learned": {"learn": {"gates.warmup_steps": 3}, "scope": "global"},
    "protocol": {"learn": {}, "whole_budget": True},
}


def train_config(runs: Runs, arm: str) -> Config:
    sparsity = None if arm in ("dense", "long") else 0.5
    overrides = runs.train_overrides(Trial(arm, sparsity, 0, None))
    return configuration.load(runs.study.config, overrides)


def test_each_job_comes_after_what_it_needs(make_runs: Callable[..., Runs]) -> None:
    jobs = graph(make_runs(sparsities=[0.5, 0.75]))
    seen: set[str] = set()
    for job in jobs:
        assert seen.issuperset(job.needs)
        seen.add(job.name)
    assert len(seen) == len(jobs)
    needs = {job.name: job.needs for job in jobs}
    assert needs["start"] == ()
    assert needs["train-dense-seed0"] == ("start",)
    assert needs["learn-evidence-0.75-seed1"] == ("start",)
    assert needs["train-evidence-0.75-seed1"] == ("start", "learn-evidence-0.75-seed1")
    # Units are scored once for both sparsities.
    assert [name for name in needs if name.startswith("score")] == ["score-leave-one-out"]
    assert needs["train-leave-one-out-0.75-seed0"] == ("start", "score-leave-one-out")


def test_a_job_is_done_when_its_result_exists(make_runs: Callable[..., Runs]) -> None:
    job = graph(make_runs())[0]
    assert not job.done
    job.result.mkdir(parents=True)
    assert job.done


def test_transfer_trains_every_arm_equally_long_from_the_start(
    make_runs: Callable[..., Runs],
) -> None:
    runs = make_runs(arms=PROTOCOLS)
    for arm in ("dense", "learned"):
        config = train_config(runs, arm)
        assert config.training.steps == 4
        assert config.model.init_from == runs.start
        assert config.allocation.source == "file"


def test_arms_of_the_whole_budget_train_the_same_two_legs(make_runs: Callable[..., Runs]) -> None:
    """Arms that do not learn also train in two legs.

    A single cosine over both legs would differ from the learning rates of a learning arm at every
    step.
    """
    runs = make_runs(
        arms=PROTOCOLS,
        learn={"training.steps": 24, "training.learning_rate": 0.002},
        train={"training.steps": 4, "training.learning_rate": 0.001},
    )
    dense_trial = Trial("long", None, 0, None)
    learned_trial = Trial("protocol", 0.5, 0, None)
    first = configuration.load(runs.study.config, runs.first_overrides(dense_trial))
    learning = configuration.load(runs.study.config, runs.learn_overrides(learned_trial))
    assert first.training == learning.training
    assert first.model.init_from == runs.start
    assert first.allocation.source == "file"
    dense = train_config(runs, "long")
    learned = train_config(runs, "protocol")
    assert dense.training == learned.training
    assert dense.training.steps == 4
    assert dense.model.init_from == runs.out / "trials" / "long-seed0" / "first"
    assert learned.model.init_from == runs.out / "trials" / "protocol-0.5-seed0" / "learn"


def test_only_arms_that_do_not_learn_have_a_first_leg(make_runs: Callable[..., Runs]) -> None:
    needs = {job.name: job.needs for job in graph(make_runs(arms=PROTOCOLS))}
    assert [name for name in needs if name.startswith("first")] == ["first-long-seed0"]
    assert needs["train-long-seed0"] == ("start", "first-long-seed0")
    assert needs["train-protocol-0.5-seed0"] == ("start", "learn-protocol-0.5-seed0")


@pytest.mark.parametrize(
    ("arm", "floor"),
    [
        ({"scope": "global"}, 1),
        ({"scope": "per_layer"}, 0),
        ({"scope": "global", "granularity": "layer"}, 0),
    ],
)
def test_a_floor_applies_where_a_target_can_have_one(
    arm: dict[str, Any],
    floor: int,
    make_runs: Callable[..., Runs],
    tmp_path: Path,
) -> None:
    arms = {
        "dense": {"rule": "dense"},
        "scored": {"score": "leave-one-out", "options": {"sequences": 4}} | arm,
        "learned": {"learn": {}} | arm,
        "drawn": {"rule": "random", "draws": [0]} | arm,
    }
    runs = make_runs(arms=arms)
    base = tmp_path / "base.yaml"
    values = yaml.safe_load(base.read_text())
    values["allocation"]["floor"] = 1
    base.write_text(yaml.safe_dump(values))
    learned = Trial("learned", 0.5, 0, None)
    config = configuration.load(runs.study.config, runs.learn_overrides(learned))
    assert config.allocation.floor == floor
    assert runs.constraint(Trial("scored", 0.5, 0, None)).floor == floor
    table = runs.rule_table(Trial("drawn", 0.5, 0, 0))
    assert min(map(sum, table.full)) >= floor


def test_learning_takes_the_study_s_overrides_and_the_arm_s(make_runs: Callable[..., Runs]) -> None:
    runs = make_runs(arms=PROTOCOLS)
    overrides = runs.learn_overrides(Trial("learned", 0.5, 0, None))
    config = configuration.load(runs.study.config, overrides)
    assert config.training.steps == 24
    assert config.gates.warmup_steps == 3
    assert config.allocation.source == "learn"
    assert config.allocation.scope == "global"


def test_the_repository_s_studies_hold_together(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "configs"
    for name in ("study.yaml", "study_cpu.yaml"):
        runs = Runs(settings.load(folder / name), tmp_path)
        for trial in runs.study.trials():
            configuration.load(runs.study.config, runs.train_overrides(trial))
            configuration.load(runs.study.config, runs.first_overrides(trial))
            if runs.arm(trial).kind == "rule":
                runs.rule_table(trial)
            else:
                runs.constraint(trial)
