"""Checks of a study's runs before the first one begins.

No time may be spent on the dense start and on whole arms if the study fails afterwards.
"""

from __future__ import annotations

from megaconsa import config as configuration
from megaconsa.consa.allocation import Allocation
from megaconsa.data.dataset_info import TRAIN
from megaconsa.data.mixture_file import read_info
from megaconsa.data.token_mixture import open_sequences
from megaconsa.errors import InputError
from megaconsa.evaluation.unit_scores import TRAINED, ScoreRequest, check_sequences
from megaconsa.study.fields import Overrides, Trial
from megaconsa.study.native_needles import open_needles
from megaconsa.study.runs import Runs

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
SHARED_FIELDS = {"data.path", "attention.window"}
"""Fields that must be the same in all runs.

Tables are made for one window, and losses are comparable only on the same data.
"""


def check(runs: Runs) -> None:
    """Raises InputError for every fault that can be found before a run starts. Writes nothing."""
    _check_overrides(runs)
    read_info(runs.start_config.data.path)
    for trial in runs.study.trials():
        try:
            _check_trial(runs, trial)
        except InputError as error:
            raise InputError(f"arms.{trial.arm}: {error}") from None
    if runs.study.needles.count:
        try:
            open_needles(runs.start_config.data.path, runs.study.needles)
        except InputError as error:
            raise InputError(f"needles.lengths: {error}") from None


def _check_overrides(runs: Runs) -> None:
    """Refuses overrides of fields that the study sets itself or that all runs share."""
    places: dict[str, Overrides] = {
        "start": runs.study.start,
        "learn": runs.study.learn,
        "train": runs.study.train,
    }
    for name, arm in runs.study.arms.items():
        places[f"arms.{name}.learn"] = arm.learn or {}
    for place, overrides in places.items():
        own = OWN_FIELDS if place == "start" else OWN_FIELDS | {"run.seed"}
        for field, value in overrides.items():
            if field in own:
                raise InputError(f"{place}: {field}={value} is set by the study; remove it")
            if field in SHARED_FIELDS:
                fix = f"set it in {runs.study.config} instead"
                raise InputError(f"{place}: {field}={value} must be the same in all runs; {fix}")


def _check_trial(runs: Runs, trial: Trial) -> None:
    """Refuses a trial whose configurations or table cannot work."""
    arm = runs.arm(trial)
    model_config = runs.start_config.to_model_config()
    configuration.load(runs.study.config, runs.train_overrides(trial))
    if runs.has_first_leg(trial):
        configuration.load(runs.study.config, runs.first_overrides(trial))
    if arm.kind == "rule":
        runs.rule_table(trial)
    elif arm.kind == "file":
        assert arm.file is not None
        table = Allocation.load(arm.file)
        table.check_shape(
            model_config.num_hidden_layers,
            model_config.num_key_value_heads,
            f"file={arm.file}",
        )
    else:
        runs.constraint(trial)
    if arm.kind == "score":
        _check_scoring(runs, trial)
    if arm.kind == "learn":
        _check_learning(runs, trial)


def _check_scoring(runs: Runs, trial: Trial) -> None:
    """Checks the number of sequences for scoring by the rules of megaconsa score-units."""
    arm = runs.arm(trial)
    if arm.score in TRAINED:
        return
    config = runs.start_config
    data = config.data.path
    sequences = arm.options.sequences or ScoreRequest.sequences
    available = len(open_sequences(data, TRAIN))
    try:
        check_sequences(sequences, config.training.micro_batch, available, data)
    except InputError as error:
        raise InputError(f"options: {error}") from None


def _check_learning(runs: Runs, trial: Trial) -> None:
    """Checks the settings of a learning arm and, with the whole budget, its number of steps."""
    config = configuration.load(runs.study.config, runs.learn_overrides(trial))
    config.gate_settings()  # Refuses what the controller cannot work with.
    if not runs.arm(trial).whole_budget:
        return
    dense = runs.study.reference(trial)
    assert dense is not None, "settings.load refuses a trial without a reference"
    first = configuration.load(runs.study.config, runs.first_overrides(dense))
    steps = config.training.steps
    if steps != first.training.steps:
        raise InputError(
            f"learn.training.steps={steps} is not the study's {first.training.steps}: the dense "
            "arm of the whole budget would train for another number of steps; remove it"
        )
