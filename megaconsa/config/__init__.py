"""The run configuration: typed sections, YAML files, overrides, and checks.

`load(path, overrides)` is the entry point. A value that cannot work raises an InputError that names
the field, its value and the fix.
"""

from megaconsa.config.comparison import differences, with_defaults
from megaconsa.config.loading import build, load, read_yaml
from megaconsa.config.run_config import Config
from megaconsa.config.sections import (
    BadStepsSection,
    CheckpointSection,
    ParallelSection,
    PipelineSchedule,
    Section,
    Shard,
    TrainingSection,
    WatchdogSection,
    expand_path,
)

__all__ = [
    "BadStepsSection",
    "CheckpointSection",
    "Config",
    "ParallelSection",
    "PipelineSchedule",
    "Section",
    "Shard",
    "TrainingSection",
    "WatchdogSection",
    "build",
    "differences",
    "expand_path",
    "load",
    "read_yaml",
    "with_defaults",
]
