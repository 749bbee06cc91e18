"""Tasks of lm-eval-harness, an extra of the installation, on a loaded export."""

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
"""By which the number of requests in a batch follows from its tokens."""


class Harness:
    """The tasks, found and checked once for all models. Paths of data in the tasks of a folder are relative to it."""

    def __init__(self, tasks: Sequence[str], folder: Path | None) -> None:
        """Finds `tasks` in `folder`, or, if that is None, among those that lm-eval brings.

        InputError where lm-eval is not installed, a task is not there, or its data cannot be read.
        """
        if (
            importlib.util.find_spec("lm_eval") is None
            or importlib.util.find_spec("accelerate") is None
        ):
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
        for task in tasks:
            if task not in self._manager.all_tasks:
                known = (
                    "among lm-eval's; --task-folder names a folder of your own"
                    if folder is None
                    else f"in {folder}"
                )
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
        """Every metric of every task, with its standard error where lm-eval gives one.

        RunError where lm-eval fails.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        language_model = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=max(1, batch_tokens // TOKENS_OF_A_REQUEST),
            softmax_dtype=torch.float32,  # or in the model's: rounded to bfloat16, choices tie
        )
        try:
            with self._beside_data():
                found = lm_eval.simple_evaluate(
                    model=language_model,
                    tasks=self.settings.tasks,
                    task_manager=self._manager,
                    log_samples=False,
                )
        except Exception as error:  # tasks are code and data of others
            raise RunError(
                f"lm-eval failed: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        return {task: _metrics(values) for task, values in found["results"].items()}

    def _read_data(self, tasks: Sequence[str]) -> None:
        """Before a model is loaded; lm-eval reads them again for each, out of the cache of datasets."""
        try:
            with self._beside_data():
                self._manager.load(list(tasks))
        except (
            OSError,
            ValueError,
        ) as error:  # of datasets: a missing file, no network, another format
            raise InputError(
                f"--task {' '.join(tasks)}: data cannot be read ({' '.join(str(error).split())}); name files beside the task, or fill "
                "Hugging Face's cache with HF_HUB_OFFLINE=0"
            ) from error

    def _beside_data(self) -> AbstractContextManager[None]:
        return nullcontext() if self._folder is None else chdir(self._folder)


def _metrics(values: dict[str, Any]) -> dict[str, Metric]:
    """lm-eval's "acc,none" and "acc_stderr,none" as one metric "acc"; a filter other than none stays in the name."""
    metrics = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{kind}")
        metrics[name if kind == "none" else f"{name} ({kind})"] = Metric(
            value=_finite(value), standard_error=_finite(error)
        )
    return metrics


def _finite(value: Any) -> float | None:
    """lm-eval gives "N/A" for a standard error that it does not know."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _digest(folder: Path) -> str:
    """16 hex digits that change with any file in the folder."""
    found = hashlib.sha256()
    for path in sorted(
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ):
        stat = path.stat()
        found.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]
