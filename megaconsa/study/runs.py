"""The runs of a study: their folders, configurations and tables.

checks.py refuses runs that cannot work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megaconsa import config as configuration
from megaconsa import run_folder
from megaconsa.config import Config
from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint, Granularity, Scope
from megaconsa.errors import InputError
from megaconsa.study.fields import Arm, Overrides, Study, Trial


@dataclass(frozen=True)
class Runs:
    """The runs of a study in its folder `out`.

    Configurations are lists of `section.field=value`, as the trainer takes them.
    """

    study: Study
    out: Path

    @property
    def start(self) -> Path:
        return self.out / "start"

    def folder(self, trial: Trial) -> Path:
        return self.out / "trials" / trial.name

    def learn_folder(self, trial: Trial) -> Path:
        return self.folder(trial) / "learn"

    def first_folder(self, trial: Trial) -> Path:
        """Folder of the leg that replaces learning, in trials that have two legs."""
        return self.folder(trial) / "first"

    def first_file(self, trial: Trial) -> Path:
        """The file that says that the first leg is finished. Its checkpoints are removed later."""
        return self.first_folder(trial) / "finished.json"

    def train_folder(self, trial: Trial) -> Path:
        return self.folder(trial) / "train"

    def allocation_file(self, trial: Trial) -> Path:
        return self.folder(trial) / run_folder.ALLOCATION

    def measures_file(self, trial: Trial) -> Path:
        return self.folder(trial) / "measures.json"

    def scores_file(self, arm: str) -> Path:
        return self.out / "scores" / f"{arm}.json"

    def arm(self, trial: Trial) -> Arm:
        return self.study.arms[trial.arm]

    def has_first_leg(self, trial: Trial) -> bool:
        """Whether the trial trains on its finished table during the steps of learning."""
        arm = self.arm(trial)
        return arm.whole_budget and arm.kind != "learn"

    @cached_property
    def start_config(self) -> Config:
        """Configuration of the dense run."""
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

    def first_overrides(self, trial: Trial) -> list[str]:
        """Returns the overrides of the first leg: the schedule of learning, on the finished table.

        A single run over the steps of both legs would have a different learning rate than a
        learning arm at every step. The difference between the arms would include that.
        """
        own = self._on_table(trial, self.first_folder(trial), self.start)
        return _words(self.study.learn | own)

    def train_overrides(self, trial: Trial) -> list[str]:
        origin = self.start
        if self.has_first_leg(trial):
            origin = self.first_folder(trial)
        elif self.arm(trial).whole_budget:
            origin = self.learn_folder(trial)
        own = self._on_table(trial, self.train_folder(trial), origin)
        return _words(self.study.train | own)

    def _on_table(self, trial: Trial, folder: Path, origin: Path) -> Overrides:
        return {
            "run.dir": str(folder),
            "run.seed": trial.seed,
            "model.init_from": str(origin),
            "allocation.source": "file",
            "allocation.file": str(self.allocation_file(trial)),
        }

    def units(self, trial: Trial) -> tuple[Granularity, Scope]:
        """Returns the granularity of a trial's table and the scope of its target."""
        arm = self.arm(trial)
        if arm.rule in rules.OWN_UNITS:
            return rules.OWN_UNITS[arm.rule]
        if arm.file is not None:
            table = Allocation.load(arm.file)
            return table.granularity, table.scope
        section = self.start_config.allocation
        return arm.granularity or section.granularity, arm.scope or section.scope

    def _floor(self, trial: Trial) -> int:
        """Returns the run configuration's floor, or 0 if a trial of this kind cannot have one."""
        if self.units(trial) != ("kv_head", "global"):
            return 0
        return self.start_config.allocation.floor

    def constraint(self, trial: Trial) -> Constraint:
        """Returns the target of a learning or scoring arm.

        Raises InputError if it cannot be met.
        """
        assert trial.sparsity is not None
        model_config = self.start_config.to_model_config()
        granularity, scope = self.units(trial)
        return Constraint(
            model_config.num_hidden_layers,
            model_config.num_key_value_heads,
            trial.sparsity,
            granularity,
            scope,
            self._floor(trial),
        )

    def rule_table(self, trial: Trial) -> Allocation:
        """Returns the table of a rule arm. Raises InputError if it cannot meet the sparsity."""
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
            if trial.sparsity == 1:
                raise InputError(
                    "rule interleaved keeps some layers full and cannot give a sparsity of 1; "
                    "leave this one out of the arm's sparsities, or use the rule all-swa"
                )
            # The rule takes the number of windowed layers for each full one.
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

    def _target(self, trial: Trial) -> Overrides:
        """Returns the overrides for sparsity, granularity and scope, where the trial sets them.

        The floor is 0 if the trial cannot have one.
        """
        arm = self.arm(trial)
        values = {
            "allocation.sparsity": trial.sparsity,
            "allocation.granularity": arm.granularity,
            "allocation.scope": arm.scope,
        }
        given = {field: value for field, value in values.items() if value is not None}
        if self._floor(trial) == 0:
            given["allocation.floor"] = 0
        return given


def _words(overrides: Overrides) -> list[str]:
    return [f"{field}={json.dumps(value)}" for field, value in overrides.items()]
