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
        # Again after every step: the LLVM inside Triton puts its own handlers in place whenever it compiles a kernel, and a signal
        # that comes twice, as `timeout` sends it, then kills the process.
        self._install(trainer)

    def on_finish(self, trainer: Trainer) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _install(self, trainer: Trainer) -> None:
        for number in SIGNALS:
            signal.signal(number, lambda *_: trainer.request_stop())
