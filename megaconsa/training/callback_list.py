"""Which callbacks a run has on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megaconsa.config import Config
from megaconsa.data.stream import BatchStream
from megaconsa.parallel.mesh import Mesh
from megaconsa.training.callbacks.checkpoint_upload import CheckpointUpload
from megaconsa.training.callbacks.checkpointing import Checkpointing
from megaconsa.training.callbacks.data_waits import DataWaits
from megaconsa.training.callbacks.incident_log import IncidentLog
from megaconsa.training.callbacks.lost_ranks import LostRanks
from megaconsa.training.callbacks.metrics_file import MetricsFile
from megaconsa.training.callbacks.prometheus import Prometheus
from megaconsa.training.callbacks.provenance import Provenance
from megaconsa.training.callbacks.rewinds import Rewinds
from megaconsa.training.callbacks.run_lock import RunLock
from megaconsa.training.callbacks.slow_ranks import SlowRanks
from megaconsa.training.callbacks.stop_requests import StopFile, StopSignals, TimeLimit
from megaconsa.training.callbacks.validation import Validation
from megaconsa.training.callbacks.watchdog import Watchdog
from megaconsa.training.trainer import Callback

if TYPE_CHECKING:
    from megaconsa.training.callbacks.samples import Samples


def build_callbacks(
    config: Config,
    mesh: Mesh,
    lock: RunLock | None,
    stream: BatchStream,
    validation: Validation,
    samples: Samples | None,
    checkpointing: Checkpointing,
    job_end: float | None,
    machines: Sequence[tuple[str, str]],
) -> list[Callback]:
    """The callbacks in the order in which they are called.

    lock: on the main rank, the lease of the run folder.
    stream: this rank's training data.
    job_end: when the scheduler ends the job, by time.time, or None.
    machines: host and device of each rank.
    """
    run = config.run.dir
    found: list[Callback] = [validation, SlowRanks(run, mesh), checkpointing]
    if samples is not None:
        found.append(samples)
    if mesh.world.size > 1:
        found.append(LostRanks(run, mesh.world))
    if config.watchdog.factor:
        found.append(Watchdog(run, config.watchdog, mesh.world, stream))
    found.append(StopSignals())
    if mesh.is_main:
        assert lock is not None
        found += [lock, DataWaits(run, stream), *_reporters(config, samples)]
        found += [IncidentLog(run), Provenance(run, machines), Rewinds(run), StopFile(run)]
        if config.checkpoint.upload is not None:
            found.append(CheckpointUpload(run, config.checkpoint))
        if job_end is not None:
            found.append(TimeLimit(job_end, checkpointing))
    assert mesh.is_main or not any(callback.main_rank_only for callback in found)
    # The sort is stable: callbacks of the same order keep the one above.
    return sorted(found, key=lambda callback: callback.order)


def _reporters(config: Config, samples: Samples | None) -> list[Callback]:
    """Writers of the metrics. Those that need a library import it only if they are used."""
    from megaconsa.training.callbacks.terminal import Terminal

    found: list[Callback] = [
        MetricsFile(config.run.dir),
        Prometheus(config.run.dir, config.training.steps),
    ]
    if config.logging.tensorboard:
        from megaconsa.training.callbacks.tensorboard import TensorBoard

        found.append(TensorBoard(config, samples))
    if config.logging.wandb:
        from megaconsa.training.callbacks.wandb import WandB

        found.append(WandB(config.logging.wandb, config.run.dir, config.to_dict()))
    found.append(Terminal("learn" if config.learning else "train"))
    return found
