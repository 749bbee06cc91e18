"""Records skipped steps, stops and rewinds among the run's incidents."""

from __future__ import annotations

from pathlib import Path

from megaconsa import incidents
from megaconsa.training.trainer import Callback, Order, Row, Stop, Trainer

STOPS = {
    Stop.REWIND: (
        "the run goes back to its newest checkpoint and passes over the batches up to this step"
    ),
    Stop.INTERRUPTED: "a signal, or the end of the job's time, stops the run after this step",
    Stop.ASKED: "the file stop in the run folder stops the run after this step",
}


class IncidentLog(Callback):
    """Runs on the main rank only.

    Other incidents are recorded elsewhere. The rank that first meets an error, a hang or a lost
    rank records it, and Checkpointing records failed saves.
    """

    order = Order.REPORT
    main_rank_only = True

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if trainer.fault is not None:
            incidents.record(
                self.run,
                "skipped",
                f"the step was not applied: {trainer.fault.reason}",
                step=row["step"],
                rank=0,
            )
        if trainer.stop in STOPS:
            kind: incidents.Kind = "rewind" if trainer.stop is Stop.REWIND else "stop"
            incidents.record(self.run, kind, STOPS[trainer.stop], step=row["step"], rank=0)
