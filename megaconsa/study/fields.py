"""The typed fields of a study's YAML, and the trials that they expand to.

settings.py reads and checks the YAML.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megaconsa.config import Section
from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Granularity, Scope

ScoreMethod = Literal[
    "leave-one-out",
    "leave-one-in",
    "gradient",
    "calibrate",
    "scalar-gates",
    "attention-mass",
]
Kind = Literal["rule", "score", "learn", "file"]
Overrides = dict[str, Any]
"""Values by `section.field`, as `megaconsa train` takes them on the command line."""

Sparsity = Annotated[float, Field(ge=0, le=1)]

WITHOUT_SPARSITY = ("dense", "all-swa")
"""Rules whose table is the same at every sparsity."""
DRAWN = ("random", "head-share")
"""Rules that take a separate seed for their draw."""


class ScoreOptions(Section):
    """How an arm scores units. Null is the default of `megaconsa score-units`."""

    sequences: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)
    z: float | None = Field(None, gt=0, lt=1)
    steps: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    weight_learning_rate: float | None = Field(None, gt=0)


class Arm(Section):
    """One way to an allocation: exactly one of rule, score, learn and file."""

    rule: rules.Rule | None = None
    score: ScoreMethod | None = None
    """Score the units of the start checkpoint."""
    learn: Overrides | None = None
    """Learn from the start checkpoint. These overrides are added to the study's own `learn`."""
    file: Path | None = None
    """A finished allocation.json. The path is relative to the study."""
    scope: Scope | None = None
    """Null is the run configuration's, as for granularity."""
    granularity: Granularity | None = None
    sparsities: tuple[Sparsity, ...] | None = None
    """Null is the study's, as for seeds."""
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    draws: tuple[int, ...] | None = Field(None, min_length=1)
    """Seeds of the rule's own random draw."""
    whole_budget: bool = False
    """Count learning in the budget.

    Learning arms continue from their learning run. The others continue from a run of the same
    schedule on their finished table.
    """
    options: ScoreOptions = ScoreOptions()

    @property
    def kind(self) -> Kind:
        if self.rule is not None:
            return "rule"
        if self.score is not None:
            return "score"
        return "learn" if self.learn is not None else "file"

    @property
    def is_dense(self) -> bool:
        """Whether other arms are compared with this one."""
        return self.rule == "dense"


class Needles(Section):
    """Needle retrieval on every trained model. A count of 0 turns it off."""

    lengths: tuple[int, ...] = ()
    """Tokens of an example."""
    count: int = Field(0, ge=0)
    """Examples of each length and depth."""


@dataclass(frozen=True)
class Trial:
    """One arm at one sparsity with one seed and, for a drawn rule, one draw."""

    arm: str
    sparsity: float | None
    """None if the arm does not depend on it."""
    seed: int
    draw: int | None
    """None unless the arm has draws."""

    @property
    def name(self) -> str:
        parts = [self.arm]
        if self.sparsity is not None:
            parts.append(f"{self.sparsity:g}")
        parts.append(f"seed{self.seed}")
        if self.draw is not None:
            parts.append(f"draw{self.draw}")
        return "-".join(parts)


class Study(Section):
    """The fields of a study."""

    config: Path
    """The run configuration that all runs share. The path is relative to the study."""
    start: Overrides = Field(default_factory=dict)
    """Overrides of the dense run whose checkpoint every arm starts from."""
    learn: Overrides = Field(default_factory=dict)
    """Overrides of all learning runs."""
    train: Overrides = Field(default_factory=dict)
    """Overrides of all training runs."""
    sparsities: tuple[Sparsity, ...] = ()
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    needles: Needles = Needles()
    arms: dict[str, Arm] = Field(min_length=1)

    def trials(self) -> list[Trial]:
        """Returns all trials, in the order of the file."""
        found = []
        for name, arm in self.arms.items():
            for sparsity in self._sparsities(arm):
                for seed in arm.seeds or self.seeds:
                    for draw in arm.draws or (None,):
                        found.append(Trial(name, sparsity, seed, draw))
        return found

    def reference(self, trial: Trial) -> Trial | None:
        """Returns the dense trial of the same seed and budget, or None if the study has none."""
        budget = self.arms[trial.arm].whole_budget
        for candidate in self.trials():
            arm = self.arms[candidate.arm]
            if arm.is_dense and arm.whole_budget == budget and candidate.seed == trial.seed:
                return candidate
        return None

    def _sparsities(self, arm: Arm) -> tuple[float | None, ...]:
        if arm.rule in WITHOUT_SPARSITY:
            return (None,)
        if arm.file is not None:
            return (Allocation.load(arm.file).sparsity,)
        return arm.sparsities or self.sparsities
