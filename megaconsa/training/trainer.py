"""The loop: take a batch, step the weights, step the gates, tell the callbacks."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

from megaconsa.config import BadStepsSection, TrainingSection
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.gates import GateBank
from megaconsa.data.stream import Batch
from megaconsa.errors import RunError
from megaconsa.model.flops import peak_flops, training_flops
from megaconsa.parallel.engine import Engine
from megaconsa.parallel.mesh import Mesh
from megaconsa.training.bad_steps import BadSteps
from megaconsa.training.batches import carries, document_lengths, labelled_tokens
from megaconsa.training.schedule import learning_rate

if TYPE_CHECKING:
    from megaconsa.training.callbacks.base import Callback

logger = logging.getLogger(__name__)


class Stop(IntEnum):
    """Why a run ends before its last step. Where ranks have different reasons, the greatest holds."""

    NO = 0
    REWIND = 1
    """Without a save: a spike sends it back to its newest checkpoint."""
    UNSAVED = 2
    """Without a save: saves fail one after another, and more steps would be lost with the others."""
    INTERRUPTED = 3
    """By a signal, or because the job's time ends: it is to go on."""
    ASKED = 4
    """By a person, who does not want it queued again."""


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on in this run."""
    sequences: int = 0
    """Place in the data order: sequences taken, those of the run it was initialised from included."""
    bad_steps: BadSteps = field(default_factory=BadSteps)


@dataclass(frozen=True)
class Fetched:
    """The data of a step, and how long they were waited for."""

    batches: list[Batch]
    labelled: int
    """Labelled tokens of all ranks."""
    began: float
    """When the step did, by time.perf_counter."""
    own_seconds: float
    """Until this rank had its own."""
    data_seconds: float
    """Until all ranks had theirs."""


@dataclass
class Trainer:
    """One run on one rank. Exactly one of `gates` (learning) and `allocation` (a finished table) is there."""

    training: TrainingSection
    bad_steps: BadStepsSection
    mesh: Mesh
    engine: Engine
    steps: Iterator[list[Batch]]
    """This rank's micro-batches, step by step, from the place where `progress` stands; empty where the pipeline does not begin."""
    gates: GateBank | None
    allocation: Allocation | None
    progress: Progress
    callbacks: Sequence[Callback] = ()
    rewinds: int = 0
    """Times that the run went back to the checkpoint it goes on from."""
    stop: Stop = field(default=Stop.NO, init=False)
    """Whether the run ends after the present step, and why; all ranks agree on it. It saves before where it can and is not to go back."""
    completed: bool = field(default=False, init=False)
    """All steps are done, or all up to a stop; False where an error ended them."""
    work_seconds: float = field(default=0.0, init=False)
    """Of the last step, this rank's own: waiting for its data, forward and backward passes. In the others it waits for other ranks too."""
    saving: bool = field(default=False, init=False)
    """Whether a checkpoint is due after the present step because a rank asked for one; all ranks agree on it."""
    _fetched: Fetched | None = field(default=None, init=False)
    """The data of the step that begins: its callbacks come after them."""
    _requested: Stop = field(default=Stop.NO, init=False)
    _save_requested: bool = field(default=False, init=False)
    fault: str | None = field(default=None, init=False)
    """Why the last step was not applied; None where it was."""
    _is_spike: bool = field(default=False, init=False)

    @property
    def stopping(self) -> bool:
        return self.stop is not Stop.NO

    def request_stop(self, reason: Stop = Stop.INTERRUPTED) -> None:
        """Has all ranks stop after the present step, or after the next where it is called between two (from a signal handler)."""
        self._requested = max(self._requested, reason)

    def request_save(self) -> None:
        """Has all ranks save after the next step."""
        self._save_requested = True

    def run(self) -> bool:
        """Trains to the last step; returns whether it got there, False if it was asked to stop before or is to go back."""
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            while self.progress.step < self.training.steps and not self.stopping:
                self._fetched = self._fetch()
                for callback in self.callbacks:
                    callback.before_step(self)
                row = self.step()
                self._agree()
                for callback in self.callbacks:
                    callback.on_step(self, row)
            self.completed = True
        finally:
            # All of them, whatever one raises; the first, which holds the folder's lock, last.
            with ExitStack() as finishing:
                for callback in self.callbacks:
                    finishing.callback(callback.on_finish, self)
        return self.progress.step == self.training.steps and self.stop is not Stop.REWIND

    def _agree(self) -> None:
        """What the ranks asked for, in one exchange. A save that a stop hides is none lost: a run saves before it stops."""
        agreed = self.mesh.largest(2 * self._requested + self._save_requested)
        self.stop = Stop(agreed // 2)
        self.saving = bool(agreed % 2)
        if self.saving:
            self._save_requested = False

    def step(self) -> dict[str, Any]:
        """One optimizer step of weights and gates; returns its row of metrics."""
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
        # Where the gradient is not finite, the engine asks nobody.
        self.fault, self._is_spike = "its gradient is not finite", False
        loss = self.engine.train_step(
            carries(batches, fetched.labelled, self.mesh), rate, self._accepts
        )
        self._count_step(loss)
        gate_metrics = self._update_gates() if self.gates else {}
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - fetched.began
        self.work_seconds = fetched.own_seconds + self.engine.compute_seconds()
        tokens = self.training.global_batch * self.training.sequence_length
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.sequences += self.training.global_batch
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": _number(loss),
            "learning_rate": rate,
            "grad_norm": _number(self.engine.grad_norm),
            "skipped": self.progress.bad_steps.skipped,
            "tokens_per_second": tokens / seconds,
            "mfu": self._mfu(batches, seconds),
            "step_seconds": seconds,
            "data_seconds": fetched.data_seconds,
            "memory_gib": self._memory(),
            **gate_metrics,
        }

    def _accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether the step is to be applied, the same on every rank; weights, gates and multipliers are still those before it."""
        numbers = {"loss": loss, "grad_norm": grad_norm}
        if self.gates:
            gradient = self.gates.gradient(self._reduce).sum(dim=0)
            numbers["gate_grad_norm"] = float(torch.linalg.vector_norm(gradient))
        self.fault = self.progress.bad_steps.fault(self.bad_steps, numbers)
        self._is_spike = self.fault is not None and all(map(math.isfinite, numbers.values()))
        if self.mesh.largest(int(self.fault is not None)) and self.fault is None:
            self.fault = "another rank found a fault in it"
        return self.fault is None

    def _count_step(self, loss: float) -> None:
        """Ends a run that has diverged, before a checkpoint of it replaces a good one."""
        bad, step = self.progress.bad_steps, self.progress.step + 1
        if self.fault is None:
            bad.applied(loss, self.engine.grad_norm)
            return
        logger.warning(
            "step %d was not applied: %s; weights and gates stay as they are", step, self.fault
        )
        bad.skip(self.bad_steps, step, self.fault)
        if self._is_spike and self.bad_steps.spikes == "rewind":
            if self.rewinds == self.bad_steps.limit:
                raise RunError(
                    f"the run went back to its newest checkpoint {self.rewinds} times (bad_steps.limit={self.bad_steps.limit}) and met a "
                    f"spike again, in step {step}; lower training.learning_rate, or go on from an earlier checkpoint"
                )
            self.request_stop(Stop.REWIND)

    def _update_gates(self) -> dict[str, Any]:
        assert self.gates is not None
        if self.fault is None:
            return self.gates.update()
        self.gates.discard()
        return {}

    def _reduce(self, gradient: torch.Tensor) -> None:
        # Each rank holds its layers', heads' and sequences' part; DeepSpeed's loss is a mean over data ranks.
        self.mesh.sum(gradient).div_(self.mesh.data_ranks)

    def _mfu(self, batches: list[Batch], seconds: float) -> float | None:
        """Share of the dense bf16 peak of the ranks that these batches went through; None where the peak is not known."""
        peak = (
            peak_flops(torch.cuda.get_device_name(self.mesh.device))
            if self.mesh.device.type == "cuda"
            else None
        )
        if peak is None or not batches:
            return None
        lengths = document_lengths(batches)
        flops = training_flops(self.engine.shape, self.allocation, int(lengths.sum()), lengths)
        return flops / seconds / (peak * self.mesh.tensor.size * self.mesh.pipeline_ranks)

    def _memory(self) -> float:
        """Largest memory so far in GiB: allocated on the GPU, or resident on a CPU."""
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.mesh.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _number(value: float) -> float | None:
    """As JSON can hold it."""
    return value if math.isfinite(value) else None
