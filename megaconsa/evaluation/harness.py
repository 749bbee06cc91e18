"""Runs tasks of lm-eval-harness on a loaded export. lm-eval is an optional dependency."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, chdir, nullcontext
from pathlib import Path
from typing import Any

import torch

from megaconsa.errors import InputError, RunError
from megaconsa.evaluation.record import HarnessSettings, Metric

TOKENS_OF_A_REQUEST = 1024
"""Assumed length of a request, which turns a batch's tokens into its number of requests."""


class Harness:
    """The tasks of an evaluation, found and checked once for all models.

    Data paths in the tasks of a folder are relative to that folder.
    """

    def __init__(self, tasks: Sequence[str], folder: Path | None) -> None:
        """Finds `tasks` in `folder`, or among lm-eval's own tasks if `folder` is None.

        Raises InputError if lm-eval is not installed, a task does not exist, or its data cannot be
        read.
        """
        has_lm_eval = importlib.util.find_spec("lm_eval") is not None
        has_accelerate = importlib.util.find_spec("accelerate") is not None
        if not has_lm_eval or not has_accelerate:
            raise InputError(
                "--task needs lm-eval; install it with: pip install 'megaconsa[harness]'"
            )
        if folder is not None and not folder.is_dir():
            raise InputError(
                f"--task-folder {folder} is not a folder; give the one with the tasks' YAML files"
            )
        from lm_eval.tasks import TaskManager

        self._folder = None if folder is None else folder.absolute()
        self._manager = TaskManager(include_path=self._folder, include_defaults=folder is None)
        if folder is None:
            known = "among lm-eval's; --task-folder names a folder of your own"
        else:
            known = f"in {folder}"
        for task in tasks:
            if task not in self._manager.all_tasks:
                raise InputError(f"--task {task} is not {known}")
        self._read_data(tasks)
        self.settings = HarnessSettings(
            tasks=list(tasks),
            task_files=_digest(folder) if folder is not None else "",
            lm_eval=importlib.metadata.version("lm_eval"),
        )

    def measure(
        self, model: Any, tokenizer: Any, batch_tokens: int
    ) -> dict[str, dict[str, Metric]]:
        """Runs all tasks on a model.

        Returns task -> metric name -> metric, with a standard error if lm-eval gives one. Raises
        RunError if lm-eval fails.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        language_model = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=max(1, batch_tokens // TOKENS_OF_A_REQUEST),
            # In the model's bfloat16, rounding would make choices tie.
            softmax_dtype=torch.float32,
        )
        try:
            with self._beside_data():
                found = lm_eval.simple_evaluate(
                    model=language_model,
                    tasks=self.settings.tasks,
                    task_manager=self._manager,
                    log_samples=False,
                )
        except Exception as error:  # tasks are foreign code and data, and may raise anything
            raise RunError(
                f"lm-eval failed: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        return {task: _metrics(values) for task, values in found["results"].items()}

    def _read_data(self, tasks: Sequence[str]) -> None:
        """Reads the data before a model is loaded, so that missing data is found early.

        lm-eval reads it again for each model, from the cache of the datasets library.
        """
        try:
            with self._beside_data():
                self._manager.load(list(tasks))
        # The datasets library raises these for a missing file, no network or another format.
        except (OSError, ValueError) as error:
            raise InputError(
                f"--task {' '.join(tasks)}: data cannot be read ({' '.join(str(error).split())}); "
                "name files beside the task, or fill Hugging Face's cache with HF_HUB_OFFLINE=0"
            ) from error

    def _beside_data(self) -> AbstractContextManager[None]:
        """Changes into the task folder, to which the tasks' data paths are relative."""
        return nullcontext() if self._folder is None else chdir(self._folder)


def _metrics(values: dict[str, Any]) -> dict[str, Metric]:
    """Joins lm-eval's "acc,none" and "acc_stderr,none" into one metric "acc".

    A filter other than none stays in the name.
    """
    metrics = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{kind}")
        full_name = name if kind == "none" else f"{name} ({kind})"
        metrics[full_name] = Metric(value=_finite(value), standard_error=_finite(error))
    return metrics


def _finite(value: Any) -> float | None:
    """Returns a finite number as float, and None for all else.

    lm-eval gives "N/A" for a standard error that it does not know.
    """
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def _digest(folder: Path) -> str:
    """Returns 16 hex digits that change with any file in the folder, except for Python's caches."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        stat = path.stat()
        found.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]
