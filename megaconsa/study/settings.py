"""The study's YAML: typed fields, and the refusals that need nothing but the file itself.

`load(path)` is the way in. What the runs' configurations refuse is found in runs.py.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from megaconsa.config import Section, read_yaml
from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Granularity, Scope
from megaconsa.errors import InputError

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

WITHOUT_SPARSITY = ("dense", "all-swa")
"""Rules whose table is the same at every sparsity."""
DRAWN = ("random", "head-share")
"""Rules that take a seed of their own."""


class ScoreOptions(Section):
    """How an arm scores units; null leaves it to `megaconsa score-units`."""

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
    """Learn from the start checkpoint. These overrides come on top of the study's own `learn`."""
    file: Path | None = None
    """A finished allocation.json, relative to the study."""
    scope: Scope | None = None
    """Null is the run configuration's, as for granularity."""
    granularity: Granularity | None = None
    sparsities: tuple[float, ...] | None = None
    """Null is the study's, as for seeds."""
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    draws: tuple[int, ...] | None = Field(None, min_length=1)
    """Seeds of the rule's own random draw."""
    whole_budget: bool = False
    """Count learning in the budget: learning arms train on from their learning run, the others
    train that much longer."""
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
    """Needle retrieval on every trained model; a count of 0 turns it off."""

    lengths: tuple[int, ...] = ()
    """Tokens of an example."""
    count: int = Field(0, ge=0)
    """Examples of each length and depth."""


@dataclass(frozen=True)
class Trial:
    """One arm at one sparsity with one seed and, of a drawn rule, one draw."""

    arm: str
    sparsity: float | None
    """None where the arm does not depend on it."""
    seed: int
    draw: int | None

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
    config: Path
    """The run configuration that all runs share, relative to the study."""
    start: Overrides = Field(default_factory=dict)
    """Of the dense run whose checkpoint every arm starts from."""
    learn: Overrides = Field(default_factory=dict)
    train: Overrides = Field(default_factory=dict)
    sparsities: tuple[float, ...] = ()
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    needles: Needles = Needles()
    arms: dict[str, Arm] = Field(min_length=1)

    def trials(self) -> list[Trial]:
        """All of them, in the order of the file."""
        found = []
        for name, arm in self.arms.items():
            for sparsity in self._sparsities(arm):
                for seed in arm.seeds or self.seeds:
                    for draw in arm.draws or (None,):
                        found.append(Trial(name, sparsity, seed, draw))
        return found

    def reference(self, trial: Trial) -> Trial | None:
        """The dense trial of the same seed and budget; None where the study has none."""
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


def load(path: Path) -> Study:
    """Reads and checks a study. Raises InputError, which names the field, its value and the fix."""
    data = read_yaml(path, "study", "fields")
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise InputError(f"study {path}: {_describe(error)}") from None
    study = _with_paths(study, path.parent)
    for name, arm in study.arms.items():
        _check_arm(name, arm, study)
    _check_references(study)
    return study


def _with_paths(study: Study, folder: Path) -> Study:
    """The study with its files relative to the working directory instead of its own folder."""
    arms = {}
    for name, arm in study.arms.items():
        file = arm.file and folder / arm.file
        arms[name] = arm.model_copy(update={"file": file})
    return study.model_copy(update={"config": folder / study.config, "arms": arms})


def _check_arm(name: str, arm: Arm, study: Study) -> None:
    field = f"arms.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise InputError(
            f"{field}: an arm names folders; use letters, digits, dots, dashes and underscores",
        )
    given = [kind for kind in ("rule", "score", "learn", "file") if getattr(arm, kind) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InputError(
            f"{field} needs exactly one of rule, score, learn and file, but has {found}",
        )
    if arm.draws is not None and arm.rule not in DRAWN:
        raise InputError(
            f"{field}.draws={list(arm.draws)} needs a rule that is drawn: {' or '.join(DRAWN)}",
        )
    if arm.options != ScoreOptions() and arm.score is None:
        raise InputError(f"{field}.options belong to an arm with score; remove them")
    fixed = arm.rule in WITHOUT_SPARSITY or arm.file is not None
    if arm.sparsities is not None and fixed:
        raise InputError(
            f"{field}.sparsities={list(arm.sparsities)}: the arm has a single table; remove it",
        )
    if not fixed and not (arm.sparsities or study.sparsities):
        raise InputError(f"{field} has no sparsity; give sparsities, of the study or of the arm")


def _check_references(study: Study) -> None:
    for trial in study.trials():
        if study.reference(trial) is None:
            budget = ", whole_budget: true" if study.arms[trial.arm].whole_budget else ""
            raise InputError(
                f"arms.{trial.arm} with seed {trial.seed} has no dense arm to be compared with; "
                f"give an arm {{rule: dense{budget}, seeds: [..., {trial.seed}]}}"
            )


def _describe(error: ValidationError) -> str:
    """The first fault that pydantic found, as one sentence."""
    fault = error.errors()[0]
    place = [str(part) for part in fault["loc"]]
    name = ".".join(place)
    if fault["type"] == "extra_forbidden":
        known = list(_section(place).model_fields)
        near = difflib.get_close_matches(place[-1], known, 1, 0.6)
        if near:
            meant = ".".join([*place[:-1], near[0]])
            return f"unknown field {name}; did you mean {meant}?"
        return f"unknown field {name}; known are {', '.join(known)}"
    if fault["type"] == "missing":
        return f"field {name} is missing"
    message = fault["msg"]
    return f"{name}={fault['input']!r} is refused: {message[0].lower()}{message[1:]}"


def _section(place: list[str]) -> type[Section]:
    """The class that holds the field at this place."""
    if place[0] == "arms" and len(place) > 2:
        return ScoreOptions if place[2] == "options" and len(place) > 3 else Arm
    return Needles if place[0] == "needles" and len(place) > 1 else Study
