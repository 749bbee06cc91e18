"""The runs of a study: their folders and configurations, checked before anything runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megaconsa import config as configuration
from megaconsa.config import Config
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint
from megaconsa.data.shards import DatasetInfo
from megaconsa.errors import InputError
from megaconsa.study.settings import Arm, Overrides, Study, Trial

OWN_FIELDS = {
    "run.dir",
    "model.init_from",
    "allocation.source",
    "allocation.file",
    "allocation.rule",
    "allocation.sparsity",
    "allocation.granularity",
    "allocation.scope",
    "allocation.seed",
}
"""Fields that the study sets for each run."""


@dataclass(frozen=True)
class Runs:
    """The runs of a study in its folder `out`. Configurations are lists of `section.field=value`,
    as the trainer takes them."""

    study: Study
    out: Path

    @property
    def start(self) -> Path:
        return self.out / "start"

    def folder(self, trial: Trial) -> Path:
        return self.out / "trials" / trial.name

    def learn_folder(self, trial: Trial) -> Path:
        return self.folder(trial) / "learn"

    def train_folder(self, trial: Trial) -> Path:
        return self.folder(trial) / "train"

    def allocation_file(self, trial: Trial) -> Path:
        return self.folder(trial) / "allocation.json"

    def measures_file(self, trial: Trial) -> Path:
        return self.folder(trial) / "measures.json"

    def scores_file(self, arm: str) -> Path:
        return self.out / "scores" / f"{arm}.json"

    def arm(self, trial: Trial) -> Arm:
        return self.study.arms[trial.arm]

    @cached_property
    def start_config(self) -> Config:
        return configuration.load(self.study.config, self.start_overrides())

    def start_overrides(self) -> list[str]:
        own = {
            "run.dir": str(self.start),
            "model.init_from": None,
            "allocation.source": "rule",
            "allocation.rule": "dense",
            "allocation.file": None,
        }
        return _words(self.study.start | own)

    def learn_overrides(self, trial: Trial) -> list[str]:
        arm = self.arm(trial)
        own = {
            "run.dir": str(self.learn_folder(trial)),
            "run.seed": trial.seed,
            "model.init_from": str(self.start),
            "allocation.source": "learn",
            "allocation.file": None,
        }
        return _words(self.study.learn | (arm.learn or {}) | self._target(trial) | own)

    def train_overrides(self, trial: Trial) -> list[str]:
        arm = self.arm(trial)
        own = {
            "run.dir": str(self.train_folder(trial)),
            "run.seed": trial.seed,
            "model.init_from": str(self.start),
            "allocation.source": "file",
            "allocation.file": str(self.allocation_file(trial)),
        }
        if arm.whole_budget and arm.kind == "learn":
            own["model.init_from"] = str(self.learn_folder(trial))
        elif arm.whole_budget:
            own["training.steps"] = sum(self._steps)
        return _words(self.study.train | own)

    def constraint(self, trial: Trial) -> Constraint:
        """The target of a learning or scoring arm. Raises InputError where it cannot be met."""
        assert trial.sparsity is not None
        shape = self.start_config.shape()
        section = self.start_config.allocation
        arm = self.arm(trial)
        return Constraint(
            shape.num_hidden_layers,
            shape.num_key_value_heads,
            trial.sparsity,
            arm.granularity or section.granularity,
            arm.scope or section.scope,
        )

    def rule_table(self, trial: Trial) -> Allocation:
        """The table of a rule arm. Raises InputError where the rule cannot meet the sparsity."""
        arm = self.arm(trial)
        own = {
            "run.seed": trial.seed,
            "allocation.source": "rule",
            "allocation.rule": arm.rule,
            "allocation.seed": trial.draw,
            "allocation.file": None,
        }
        if arm.rule == "interleaved":
            assert trial.sparsity is not None
            own["allocation.ratio"] = max(1, round(trial.sparsity / (1 - trial.sparsity)))
        config = configuration.load(self.study.config, _words(self._target(trial) | own))
        table = config.fixed_allocation()
        assert table is not None
        if trial.sparsity is not None and abs(table.sparsity - trial.sparsity) > 1e-6:
            raise InputError(
                f"rule {arm.rule} gives a sparsity of {table.sparsity:.4g} instead of "
                f"{trial.sparsity:g}; leave this one out of the arm's sparsities"
            )
        return table

    def check(self) -> None:
        """Raises InputError for everything that can be known before a run starts; writes
        nothing."""
        self._check_overrides()
        DatasetInfo.load(self.start_config.data.path)
        for trial in self.study.trials():
            try:
                self._check_trial(trial)
            except InputError as error:
                raise InputError(f"arms.{trial.arm}: {error}") from None

    def _check_overrides(self) -> None:
        places: dict[str, Overrides] = {
            "start": self.study.start,
            "learn": self.study.learn,
            "train": self.study.train,
        }
        for name, arm in self.study.arms.items():
            places[f"arms.{name}.learn"] = arm.learn or {}
        for place, overrides in places.items():
            refused = OWN_FIELDS if place == "start" else OWN_FIELDS | {"run.seed"}
            for field in overrides:
                if field in refused:
                    value = overrides[field]
                    raise InputError(f"{place}: {field}={value} is set by the study; remove it")

    def _check_trial(self, trial: Trial) -> None:
        arm = self.arm(trial)
        shape = self.start_config.shape()
        configuration.load(self.study.config, self.train_overrides(trial))
        if arm.kind == "rule":
            self.rule_table(trial)
        elif arm.kind == "file":
            assert arm.file is not None
            table = Allocation.load(arm.file)
            table.check_shape(
                shape.num_hidden_layers,
                shape.num_key_value_heads,
                f"file={arm.file}",
            )
        else:
            self.constraint(trial)
        if arm.kind == "learn":
            self._check_learning(trial)

    def _check_learning(self, trial: Trial) -> None:
        steps = configuration.load(self.study.config, self.learn_overrides(trial)).training.steps
        budget = self._steps[0]
        if self.arm(trial).whole_budget and steps != budget:
            raise InputError(
                f"learn.training.steps={steps} is not the study's {budget}: the dense arm of the "
                "whole budget would train for another number of steps; remove it"
            )

    @cached_property
    def _steps(self) -> tuple[int, int]:
        """Steps of learning and of training."""
        learn = configuration.load(self.study.config, _words(self.study.learn))
        train = configuration.load(self.study.config, _words(self.study.train))
        return learn.training.steps, train.training.steps

    def _target(self, trial: Trial) -> Overrides:
        """Sparsity, granularity and scope of a trial, where it has its own."""
        arm = self.arm(trial)
        values = {
            "allocation.sparsity": trial.sparsity,
            "allocation.granularity": arm.granularity,
            "allocation.scope": arm.scope,
        }
        return {field: value for field, value in values.items() if value is not None}


def _words(overrides: Overrides) -> list[str]:
    return [f"{field}={json.dumps(value)}" for field, value in overrides.items()]
