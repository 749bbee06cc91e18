"""The training loop. docs/life_of_a_step.md explains it."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import torch

from megaconsa.config import BadStepsSection, TrainingSection
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.gates import GateBank
from megaconsa.data.stream import Batch
from megaconsa.errors import RunError
from megaconsa.model.flops import peak_flops, training_flops
from megaconsa.parallel.deepspeed.engine import Engine
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.step_result import Fault, StepResult
from megaconsa.training.bad_steps import BadSteps
from megaconsa.training.batches import carries, document_lengths, labelled_tokens
from megaconsa.training.learning_rate import learning_rate

logger = logging.getLogger(__name__)


Row = dict[str, Any]
"""One line of metrics.jsonl."""


class Order(IntEnum):
    """When a callback is called, relative to the others."""

    LEASE = 0
    """Holds the run folder. Its `on_finish` comes last."""
    WATCH = 1
    """Notices lost ranks, hangs and signals."""
    MEASURE = 2
    """Adds to the row of metrics."""
    REPORT = 3
    """Writes or prints the row."""
    REQUEST = 4
    """Asks for a stop or a save."""
    SAVE = 5
    """Saves, after the row of the step was written."""


class Callback:
    """Something that happens around a step. One concern per subclass."""

    order: ClassVar[Order] = Order.REPORT
    main_rank_only: ClassVar[bool] = False
    """Whether it exists on the main rank only. It must not call collectives then."""

    def on_start(self, trainer: Trainer) -> None:
        """Called before the first step."""

    def before_data(self, trainer: Trainer) -> None:
        """Called before each step, before it waits for its data."""

    def before_step(self, trainer: Trainer) -> None:
        """Called before each step, once every rank has its data."""

    def on_step(self, trainer: Trainer, row: Row) -> None:
        """Called after each step.

        row: the step's metrics, including those that earlier callbacks added.
        """

    def on_finish(self, trainer: Trainer) -> None:
        """Called after the last step, and after an error, in reverse order.

        After an error the trainer is not `completed`.
        """


class Stop(IntEnum):
    """Why a run ends before its last step. If ranks have different reasons, the greatest wins."""

    NO = 0
    REWIND = 1
    """A spike sends the run back to its newest checkpoint. It does not save."""
    UNSAVED = 2
    """Saves keep failing, so more steps would be lost. It does not save."""
    INTERRUPTED = 3
    """A signal, or the end of the job's time. The run is to be resumed."""
    ASKED = 4
    """A person asked for it. The job must not be queued again."""


@dataclass
class Progress:
    """How far a run is. Part of every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on in this run."""
    sequences: int = 0
    """Place in the data order: sequences taken, including those of the run that this one was
    initialised from."""
    bad_steps: BadSteps = field(default_factory=BadSteps)


@dataclass(frozen=True)
class Fetched:
    """The data of a step, and how long the step waited for it."""

    batches: list[Batch]
    labelled: int
    """Labelled tokens of all ranks."""
    began: float
    """When the step began, by time.perf_counter."""
    own_seconds: float
    """Seconds until this rank had its data."""
    data_seconds: float
    """Seconds until all ranks had theirs."""


@dataclass
class Trainer:
    """One run on one rank. It has either `gates` (while learning) or an `allocation`, not both."""

    training: TrainingSection
    bad_steps: BadStepsSection
    mesh: Mesh
    engine: Engine
    steps: Iterator[list[Batch]]
    """This rank's micro-batches of each step, starting at `progress`. Empty lists on ranks where
    the pipeline does not begin."""
    gates: GateBank | None
    allocation: Allocation | None
    progress: Progress
    callbacks: Sequence[Callback] = ()
    rewinds: int = 0
    """How often the run went back to the checkpoint that it resumed from."""
    stop: Stop = field(default=Stop.NO, init=False)
    """Whether the run ends after the current step, and why. The same on all ranks."""
    completed: bool = field(default=False, init=False)
    """All steps up to the end or up to a stop are done. False if an error ended the run."""
    own_data_seconds: float = field(default=0.0, init=False)
    """Seconds of the last step in which this rank waited for its own data."""
    work_seconds: float = field(default=0.0, init=False)
    """Seconds of the last step in which this rank worked or waited for its own data. Excludes
    time spent waiting for other ranks."""
    saving: bool = field(default=False, init=False)
    """Whether a rank asked for a checkpoint after the current step. The same on all ranks."""
    _fetched: Fetched | None = field(default=None, init=False)
    """Data of the step that is about to begin."""
    _requested: Stop = field(default=Stop.NO, init=False)
    _save_requested: bool = field(default=False, init=False)
    fault: Fault | None = field(default=None, init=False)
    """Why the last step was not applied. None if it was."""

    @property
    def stopping(self) -> bool:
        return self.stop is not Stop.NO

    def request_stop(self, reason: Stop = Stop.INTERRUPTED) -> None:
        """Makes all ranks stop after the current step.

        A signal handler may call this between two steps. Then the next step is the last.
        """
        self._requested = max(self._requested, reason)

    def request_save(self) -> None:
        """Makes all ranks save after the next step."""
        self._save_requested = True

    def run(self) -> bool:
        """Trains to the last step.

        Returns whether it got there. False means that it was asked to stop, or must go back.
        """
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            while self.progress.step < self.training.steps and not self.stopping:
                for callback in self.callbacks:
                    callback.before_data(self)
                self._fetched = self._fetch()
                for callback in self.callbacks:
                    callback.before_step(self)
                row = self.step()
                self._agree()
                for callback in self.callbacks:
                    callback.on_step(self, row)
            self.engine.finish()
            self.completed = True
        finally:
            # Every callback finishes, even if one raises. The first one holds the folder's lock,
            # and finishes last.
            with ExitStack() as finishing:
                for callback in self.callbacks:
                    finishing.callback(callback.on_finish, self)
        return self.progress.step == self.training.steps and self.stop is not Stop.REWIND

    def _agree(self) -> None:
        """Agrees with all ranks on stop and save requests, in one all-reduce.

        If some rank asks to stop, a save request of another rank may be lost. That does no harm,
        because a run saves before it stops.
        """
        agreed = self.mesh.all_reduce_max(2 * self._requested + self._save_requested)
        self.stop = Stop(agreed // 2)
        self.saving = bool(agreed % 2)
        if self.saving:
            self._save_requested = False

    def step(self) -> dict[str, Any]:
        """One optimizer step of weights and gates. Returns its row of metrics.

        On one GPU, this returns while AdamW still runs there, so that the host can prepare the next
        step meanwhile. The row's seconds then end where the host went on. They include what was
        left of the AdamW of the step before.
        """
        fetched = self._fetched or self._fetch()
        self._fetched = None
        return self._work(fetched)

    def _fetch(self) -> Fetched:
        """Waits until every rank has its data."""
        began = time.perf_counter()
        batches = next(self.steps)
        own_seconds = time.perf_counter() - began
        labelled = labelled_tokens(batches, self.mesh)
        return Fetched(batches, labelled, began, own_seconds, time.perf_counter() - began)

    def _work(self, fetched: Fetched) -> dict[str, Any]:
        batches = fetched.batches
        rate = learning_rate(self.progress.step, self.training)
        if self.gates:
            self.gates.sample(self.progress.step)
        micro_batches = carries(batches, fetched.labelled, self.mesh)
        result = self.engine.train_step(micro_batches, rate, self._check)
        self.fault = result.fault
        self._count(result)
        gate_metrics = self._update_gates(result)
        if self.mesh.device.type == "cuda" and self.mesh.world.size > 1:
            # The ranks agree on something next, through their GPUs, and so wait for AdamW in any
            # case. Here that wait counts as time of the step, and not as waiting for data. It does
            # not include the weights, which other streams gather.
            torch.cuda.current_stream().synchronize()
        seconds = time.perf_counter() - fetched.began
        self.own_data_seconds = fetched.own_seconds
        self.work_seconds = fetched.own_seconds + self.engine.compute_seconds()
        tokens = self.training.global_batch * self.training.sequence_length
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.sequences += self.training.global_batch
        return {
            "step": self.progress.step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "tokens": self.progress.tokens,
            "sequences": self.progress.sequences,
            "loss": _number(result.loss),
            "learning_rate": rate,
            "grad_norm": _number(result.grad_norm),
            "skipped": self.progress.bad_steps.skipped,
            "tokens_per_second": tokens / seconds,
            "mfu": self._mfu(batches, seconds),
            "step_seconds": seconds,
            "data_seconds": fetched.data_seconds,
            "memory_gib": peak_memory_gib(self.mesh.device),
            **gate_metrics,
        }

    def _check(self, loss: float, grad_norm: float) -> Fault | None:
        """Why the step must not be applied, or None. All ranks decide alike.

        Weights, gates and multipliers still have their values from before the step.

        This is where the host reads what it needs of a step. On one GPU it reads nothing more until
        the check of the next step, so AdamW runs while the host works.
        """
        numbers = {"loss": loss, "grad_norm": grad_norm}
        if self.gates:
            gradient = self.gates.gradient(self._reduce).sum(dim=0)
            numbers["gate_grad_norm"] = float(torch.linalg.vector_norm(gradient))
        own_fault = self.progress.bad_steps.fault(self.bad_steps, numbers)
        any_fault = self.mesh.all_reduce_max(int(own_fault is not None))
        if any_fault and own_fault is None:
            return Fault("another rank found a fault in it")
        return own_fault

    def _count(self, result: StepResult) -> None:
        """Keeps count of bad steps. Ends a run that has diverged before it saves a checkpoint."""
        bad_steps = self.progress.bad_steps
        step = self.progress.step + 1
        fault = result.fault
        if fault is None:
            bad_steps.applied(result.loss, result.grad_norm)
            return
        logger.warning(
            "step %d was not applied: %s; weights and gates stay as they are", step, fault.reason
        )
        bad_steps.skip(self.bad_steps, step, fault.reason)
        if fault.is_spike and self.bad_steps.spikes == "rewind":
            if self.rewinds == self.bad_steps.limit:
                raise RunError(
                    f"the run went back to its newest checkpoint {self.rewinds} times "
                    f"(bad_steps.limit={self.bad_steps.limit}) and met a spike again, in step "
                    f"{step}; lower training.learning_rate, or continue from an earlier checkpoint"
                )
            self.request_stop(Stop.REWIND)

    def _update_gates(self, result: StepResult) -> dict[str, Any]:
        """Moves the gates if the step was applied. Returns their metrics."""
        if self.gates is None:
            return {}
        if result.fault is None:
            return self.gates.update()
        self.gates.discard()
        return {}

    def _reduce(self, gradient: torch.Tensor) -> None:
        # Each rank has the part of its own layers, heads and tokens. DeepSpeed's loss is a mean
        # over data ranks and context ranks.
        self.mesh.all_reduce(gradient).div_(self.mesh.dp_cp_size)

    def _mfu(self, batches: list[Batch], seconds: float) -> float | None:
        """Model FLOPs utilisation: share of the dense bf16 peak of the ranks that share a batch.

        None if the peak of the device is not known.
        """
        if self.mesh.device.type != "cuda" or not batches:
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.mesh.device))
        if peak is None:
            return None
        lengths = document_lengths(batches)
        flops = training_flops(
            self.engine.model_config, self.allocation, int(lengths.sum()), lengths
        )
        sharing = self.mesh.tp.size * self.mesh.cp.size * self.mesh.pp_size
        return flops / seconds / (peak * sharing)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _number(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if math.isfinite(value) else None
