"""Reads a study and makes the checks that need only the file itself.

checks.py has the checks that need the configurations of the runs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from megaconsa.config import Section, read_yaml
from megaconsa.errors import InputError
from megaconsa.study.fields import (
    DRAWN,
    WITHOUT_SPARSITY,
    Arm,
    Needles,
    ScoreOptions,
    Study,
)
from megaconsa.study.score_options import OPTIONS


def load(path: Path) -> Study:
    """Reads and checks a study.

    Raises InputError, which names the field, its value and the fix.
    """
    data = read_yaml(path, "study", "fields")
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise InputError(f"study {path}: {_describe(error)}") from None
    study = _with_paths(study, path.parent)
    _check_repeats("", {"sparsities": study.sparsities, "seeds": study.seeds})
    for name, arm in study.arms.items():
        _check_arm(name, arm, study)
    _check_names(study)
    _check_references(study)
    return study


def _with_paths(study: Study, folder: Path) -> Study:
    """Returns the study with paths relative to the working directory, not to the study's folder."""
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
    lists = {"sparsities": arm.sparsities, "seeds": arm.seeds, "draws": arm.draws}
    _check_repeats(f"{field}.", lists)
    _check_options(field, arm)
    fixed = arm.rule in WITHOUT_SPARSITY or arm.file is not None
    if arm.sparsities is not None and fixed:
        raise InputError(
            f"{field}.sparsities={list(arm.sparsities)}: the arm has a single table; remove it",
        )
    if not fixed and not (arm.sparsities or study.sparsities):
        raise InputError(f"{field} has no sparsity; give sparsities, of the study or of the arm")


def _check_options(field: str, arm: Arm) -> None:
    """Refuses options that the arm would silently ignore."""
    if arm.score is None:
        if arm.options != ScoreOptions():
            raise InputError(f"{field}.options belong to an arm with score; remove them")
        return
    for name, value in arm.options.model_dump(exclude_none=True).items():
        if name not in OPTIONS[arm.score]:
            raise InputError(
                f"{field}.options.{name}={value} has no effect on score: {arm.score}; remove it",
            )


def _check_repeats(prefix: str, lists: Mapping[str, Sequence[float] | None]) -> None:
    """Refuses a value that is given twice.

    The same run twice would count as two runs, with an interval of no width.

    prefix: start of the field's name in the error.
    """
    for name, given in lists.items():
        values = list(given or ())
        for value in values:
            if values.count(value) > 1:
                raise InputError(
                    f"{prefix}{name}={values} holds {value} more than once; keep one of them",
                )


def _check_names(study: Study) -> None:
    """Refuses trials that would share a folder."""
    owners: dict[str, str] = {}
    for trial in study.trials():
        if trial.name in owners:
            raise InputError(
                f"arms.{trial.arm}: its trial {trial.name} has the same folder as one of "
                f"arms.{owners[trial.name]}; rename an arm, or give sparsities that differ in the "
                "first six digits"
            )
        owners[trial.name] = trial.arm


def _check_references(study: Study) -> None:
    """Refuses trials that have no dense trial to be compared with."""
    for trial in study.trials():
        if study.reference(trial) is None:
            budget = ", whole_budget: true" if study.arms[trial.arm].whole_budget else ""
            raise InputError(
                f"arms.{trial.arm} with seed {trial.seed} has no dense arm to be compared with; "
                f"give an arm {{rule: dense{budget}, seeds: [..., {trial.seed}]}}"
            )


def _describe(error: ValidationError) -> str:
    """Returns the first fault that pydantic found, as one sentence."""
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
    """Returns the class of the field at this place."""
    if place[0] == "arms" and len(place) > 2:
        # A place is arms, the arm's name, the field of the arm, and so on.
        in_options = place[2] == "options" and len(place) > 3
        return ScoreOptions if in_options else Arm
    in_needles = place[0] == "needles" and len(place) > 1
    return Needles if in_needles else Study
