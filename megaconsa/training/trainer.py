"""The loop: take a batch, step the weights, step the gates, tell the callbacks."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from megaconsa.config import TrainingSection
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.gates import GateBank
from megaconsa.data.stream import Batch
from megaconsa.errors import RunError
from megaconsa.model.flops import peak_flops, training_flops
from megaconsa.parallel.engine import Engine
from megaconsa.parallel.mesh import Mesh
from megaconsa.training.batches import carries, document_lengths, labelled_tokens
from megaconsa.training.schedule import learning_rate

if TYPE_CHECKING:
    from megaconsa.training.callbacks.base import Callback

logger = logging.getLogger(__name__)

MOST_SKIPPED = 3
"""Steps in a row whose gradients may be non-finite."""


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on in this run."""
    sequences: int = 0
    """Place in the data order: sequences taken, those of the run it was initialised from included."""


@dataclass
class Trainer:
    """One run on one rank. Exactly one of `gates` (learning) and `allocation` (a finished table) is there."""

    training: TrainingSection
    mesh: Mesh
    engine: Engine
    steps: Iterator[list[Batch]]
    """This rank's micro-batches, step by step, from the place where `progress` stands; empty where the pipeline does not begin."""
    gates: GateBank | None
    allocation: Allocation | None
    progress: Progress
    callbacks: Sequence[Callback] = ()
    stopping: bool = field(default=False, init=False)
    """The run saves and ends after the present step; all ranks agree on it."""
    _stop_requested: bool = field(default=False, init=False)
    _skipped: int = field(default=0, init=False)

    def request_stop(self) -> None:
        """Asks this rank to stop after the present step (from a signal handler)."""
        self._stop_requested = True

    def run(self) -> bool:
        """Trains to the last step; returns whether it got there, False if it was asked to stop before."""
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            while self.progress.step < self.training.steps and not self.stopping:
                row = self.step()
                self.stopping = bool(self.mesh.sum(torch.tensor(int(self._stop_requested), device=self.mesh.device)))
                for callback in self.callbacks:
                    callback.on_step(self, row)
        finally:
            # All of them, whatever one raises; the first, which holds the folder's lock, last.
            with ExitStack() as finishing:
                for callback in self.callbacks:
                    finishing.callback(callback.on_finish, self)
        return self.progress.step == self.training.steps

    def step(self) -> dict[str, Any]:
        """One optimizer step of weights and gates; returns its row of metrics."""
        started = time.perf_counter()
        batches = next(self.steps)
        labelled = labelled_tokens(batches, self.mesh)
        data_seconds = time.perf_counter() - started
        rate = learning_rate(self.progress.step, self.training)
        if self.gates:
            self.gates.sample(self.progress.step)
        loss = self.engine.train_step(carries(batches, labelled, self.mesh), rate)
        self._check_step(loss)
        gate_metrics = self._update_gates() if self.gates else {}
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        tokens = self.training.global_batch * self.training.sequence_length
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.sequences += self.training.global_batch
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm if math.isfinite(norm := self.engine.grad_norm) else None,
            "tokens_per_second": tokens / seconds,
            "mfu": self._mfu(batches, seconds),
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "memory_gib": self._memory(),
            **gate_metrics,
        }

    def _check_step(self, loss: float) -> None:
        """Ends a run that has diverged, before a checkpoint of it replaces a good one."""
        step = self.progress.step + 1
        if not math.isfinite(loss):
            raise RunError(
                f"the loss of step {step} is {loss}; lower training.learning_rate, or go on from an earlier checkpoint"
            )
        self._skipped = 0 if self.engine.step_applied else self._skipped + 1
        if self._skipped:
            logger.warning("step %d was not applied: its gradient is not finite; weights and gates stay as they are", step)
        if self._skipped == MOST_SKIPPED:
            raise RunError(
                f"the gradients of {MOST_SKIPPED} steps in a row, up to {step}, are not finite; lower training.learning_rate"
            )

    def _update_gates(self) -> dict[str, Any]:
        assert self.gates is not None
        if not self.engine.step_applied:
            self.gates.discard()
            return {}

        def reduce(gradient: torch.Tensor) -> None:
            # Each rank holds its layers', heads' and sequences' part; DeepSpeed's loss is a mean over data ranks.
            self.mesh.sum(gradient).div_(self.mesh.data_ranks)

        return self.gates.update(reduce)

    def _mfu(self, batches: list[Batch], seconds: float) -> float | None:
        """Share of the dense bf16 peak of the ranks that these batches went through; None where the peak is not known."""
        peak = peak_flops(torch.cuda.get_device_name(self.mesh.device)) if self.mesh.device.type == "cuda" else None
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
