"""Check which configuration changes a run may resume with."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from typing import Any

from megaconsa.config import Config, differences, with_defaults
from megaconsa.errors import InputError
from megaconsa.model.config import PRESETS, ModelConfig
from megaconsa.run_paths import resolved
from megaconsa.training.learning_rate import learning_rate

FREE = {
    # Sections
    "parallel",
    "validation",
    "checkpoint",
    "logging",
    "watchdog",
    "bad_steps",
    # Fields
    "run.dir",
    "attention.backend",
    "training.micro_batch",
    "training.activation_checkpointing",
    "training.memory_gib",
    "data.path",
    "data.workers",
    "data.cache",
    "data.cache_gib",
}
"""Sections and fields that may change on resume.

They do not affect what is learned, except for rounding. `bad_steps` only affects which later steps
are skipped."""
OF_THE_START = {"allocation.file", "model.init_from"}
"""Fields that may change once the run has a checkpoint, because the checkpoint replaces them.

It holds the allocation table, which is compared by content. It also holds weights that have been
trained since."""


def check_same_run(
    config: Config, old: dict[str, Any], trained_steps: int | None = None
) -> list[str]:
    """Checks that a configuration continues the same run. Returns the changes that are harmless.

    old: the configuration as the run wrote it. A field that an earlier version did not have counts
        as its default.
    trained_steps: steps in the run's newest checkpoint. None if the run has no checkpoint.
    Raises InputError if the configuration would turn the run into another one.
    """
    old = with_defaults(old)
    free = FREE if trained_steps is None else FREE | OF_THE_START
    changed: list[str] = []
    harmless: list[str] = []
    reason = None
    before = _one_spelling(resolved(old))
    after = _one_spelling(resolved(config.to_dict()))
    before["model"] = _with_shape_fields(before["model"], after["model"])
    after["model"] = _with_shape_fields(after["model"], before["model"])
    for line in differences(before, after):
        name = line.split(":")[0]
        if name == "training.steps" and trained_steps is not None:
            reason = why_not_longer(config, old["training"]["steps"], trained_steps)
            is_harmless = reason is None
        else:
            section = name.split(".")[0]
            is_harmless = name in free or section in free
        if is_harmless:
            harmless.append(line)
        else:
            changed.append(line)
    if changed:
        because = "" if reason is None else f": {reason}"
        raise InputError(
            f"run.dir={config.run.dir} was made with another configuration "
            f"({'; '.join(changed)}){because}; choose another run.dir, "
            f"with model.init_from={config.run.dir} to continue from its newest checkpoint"
        )
    return harmless


def _one_spelling(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration's plain values in which equal orders of the data are equal.

    A recorded null means the same as 0: it comes from a local folder, or from an earlier version.
    """
    data = values["data"]
    return values | {"data": data | {"shuffle_shards": data["shuffle_shards"] or 0}}


def _with_shape_fields(model: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A copy of the section `model` that states each field of the shape that `other` states.

    Earlier versions recorded null for a value that comes from the preset.
    """
    filled = dict(model)
    preset = PRESETS.get(model["preset"])
    for field in dataclass_fields(ModelConfig):
        if filled[field.name] is None and other[field.name] is not None and preset is not None:
            filled[field.name] = getattr(preset, field.name)
    return filled


def why_not_longer(config: Config, old_steps: int, trained_steps: int) -> str | None:
    """The reason why a run of `old_steps` cannot be changed to training.steps, or None if it can.

    It can if the steps done so far are those that a run of the new length would have done.

    trained_steps: steps done so far.
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
                f"its step {step + 1} of {trained_steps} would have had another learning rate "
                "in a longer run; "
                "schedule=wsd allows it up to the beginning of the decay"
            )
    return None
