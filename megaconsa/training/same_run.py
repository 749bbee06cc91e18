"""Which changes of its configuration a run may resume with."""

from __future__ import annotations

from typing import Any

from megaconsa.config import Config, differences, with_defaults
from megaconsa.errors import InputError
from megaconsa.run_paths import resolved
from megaconsa.training.schedule import learning_rate

FREE = {
    *("parallel", "validation", "checkpoint", "logging", "watchdog", "bad_steps"),
    *(
        "run.dir",
        "attention.backend",
        "training.micro_batch",
        "training.activation_checkpointing",
        "data.path",
        "data.workers",
    ),
}
"""Sections and fields that may change on resume: they change nothing of what is learned but for rounding, and `bad_steps` only which
later steps are skipped."""
OF_THE_START = {"allocation.file", "model.init_from"}
"""Fields that a checkpoint answers: it holds the table, which is compared by content, and weights that
have been trained since."""


def check_same_run(
    config: Config, old: dict[str, Any], trained_steps: int | None = None
) -> list[str]:
    """Refuses a configuration that would train on as another run; returns the changes that are harmless.

    old: as the run wrote it. A field that it lacks, of an earlier version, had its default.
    trained_steps: of the run's newest checkpoint, None where it has none.
    """
    old = with_defaults(old)
    free = FREE if trained_steps is None else FREE | OF_THE_START
    changed: list[str] = []
    harmless: list[str] = []
    reason = None
    for line in differences(resolved(old), resolved(config.to_dict())):
        name = line.split(":")[0]
        if name == "training.steps" and trained_steps is not None:
            reason = why_not_longer(config, old["training"]["steps"], trained_steps)
            (harmless if reason is None else changed).append(line)
        else:
            is_free = name in free or name.split(".")[0] in free
            (harmless if is_free else changed).append(line)
    if changed:
        because = "" if reason is None else f": {reason}"
        raise InputError(
            f"run.dir={config.run.dir} was made with another configuration ({'; '.join(changed)}){because}; choose another run.dir, "
            f"with model.init_from={config.run.dir} to go on from its newest checkpoint"
        )
    return harmless


def why_not_longer(config: Config, old_steps: int, trained_steps: int) -> str | None:
    """Why a run of `old_steps` cannot become one of training.steps; None where it can.

    It can where the steps it has done are those that a run of the new length would have done.
    """
    training = config.training
    if training.steps < old_steps:
        return "a run can be made longer, not shorter; the file stop in its folder ends it sooner"
    if config.learning:
        return "gates decide by the length of the run from its first step on"
    old = training.model_copy(update={"steps": old_steps})
    for step in range(trained_steps):
        if learning_rate(step, old) != learning_rate(step, training):
            return (
                f"its step {step + 1} of {trained_steps} would have had another learning rate in a longer run; "
                "schedule=wsd allows it up to the beginning of the decay"
            )
    return None
