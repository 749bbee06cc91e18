"""Ctrl-C and SIGTERM end a run after the present step, with a checkpoint."""

from __future__ import annotations

import signal
from typing import Any

from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals(Callback):
    def __init__(self) -> None:
        self.before: dict[signal.Signals, Any] = {}

    def on_start(self, trainer: Trainer) -> None:
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        self._install(trainer)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        # Again after every step. On a GPU, a run that had just compiled its kernels died of a SIGTERM sent twice (as `timeout` does)
        # in spite of the handler; most likely the LLVM inside Triton had put its one-shot handlers in place. This mends it.
        self._install(trainer)

    def on_finish(self, trainer: Trainer) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _install(self, trainer: Trainer) -> None:
        for number in SIGNALS:
            signal.signal(number, lambda *_: trainer.request_stop())
