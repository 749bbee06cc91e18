"""The data of a run: the stream that it trains on, and what it is validated on."""

from __future__ import annotations

from pathlib import Path

from megaconsa.config import Config
from megaconsa.data.dataset_info import TRAIN, VALIDATION, DatasetInfo
from megaconsa.data.mixture import Mixture
from megaconsa.data.mixture_file import MixtureInfo, is_mixture
from megaconsa.data.stream import BatchStream
from megaconsa.errors import InputError
from megaconsa.parallel.launcher import launch
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.topology import Topology
from megaconsa.training.callbacks.validation import HeldOutSet, Validation


def open_training(config: Config, mesh: Mesh) -> BatchStream:
    """The training batches of this data rank. Raises InputError where data cannot be opened."""
    shuffle_shards = config.data.shuffle_shards or 0
    return _open(config, mesh, config.data.path, TRAIN, config.data.workers, shuffle_shards)


def open_validation(config: Config, topology: Topology, mesh: Mesh) -> Validation:
    """The held-out batches of this data rank: the same number of sequences from each source.

    Raises InputError where data cannot be opened.
    """
    wanted = config.validation.sequences
    least = topology.least_evaluated
    if not is_mixture(config.data.path):
        return Validation(
            [_held_out(config, mesh, config.data.path, wanted, least)], config.validation.every
        )
    mixture = MixtureInfo(config.data.path, config.data.cache_settings)
    of_each = -(-wanted // len(mixture.folders))
    if of_each < config.training.micro_batch:
        raise InputError(
            f"validation.sequences={wanted} gives each of the {len(mixture.folders)} sources of "
            f"{config.data.path} {of_each}, less than one micro-batch of "
            f"{config.training.micro_batch}; raise it"
        )
    sets = []
    for (name, folder), share in zip(
        mixture.folders.items(), mixture.phases[0].shares, strict=True
    ):
        sets.append(_held_out(config, mesh, folder, of_each, least, share=float(share), name=name))
    return Validation(sets, config.validation.every)


def describe_passes(config: Config, data: DatasetInfo) -> list[str]:
    """What the run reads: one line, or for a mixture one line for each source."""
    wanted = config.training.steps * config.training.global_batch
    if not is_mixture(config.data.path):
        sequences = data.splits[TRAIN].sequences
        return [f"{sequences:,} sequences of data, {wanted / sequences:.2f} epochs in this run"]
    mixture = MixtureInfo(config.data.path, config.data.cache_settings)
    counts = Mixture(mixture.phases, config.run.seed).counts(wanted)
    lines = []
    for (name, info), count in zip(mixture.infos.items(), counts.tolist(), strict=True):
        sequences = info.splits[TRAIN].sequences
        lines.append(
            f"source {name}: {count / wanted:.1%} of this run, {sequences:,} sequences, "
            f"{count / sequences:.2f} epochs"
        )
    return lines


def _held_out(
    config: Config,
    mesh: Mesh,
    path: Path,
    wanted: int,
    least: int,
    *,
    share: float = 1.0,
    name: str | None = None,
) -> HeldOutSet:
    """The held-out sequences of one data folder.

    wanted: number of sequences.
    least: minimum number of micro-batches.
    """
    stream = _open(config, mesh, path, VALIDATION, 0)
    batches = stream.fixed_batches(wanted, least) if mesh.reads_data else []
    return HeldOutSet(batches, stream.fixed_count(wanted, least), share, name)


def _open(
    config: Config, mesh: Mesh, path: Path, split: str, workers: int, shuffle_shards: int = 0
) -> BatchStream:
    training = config.training
    return BatchStream(
        path,
        split,
        seed=config.run.seed,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        workers=workers,
        separate_documents=config.attention.separate_documents,
        shuffle_shards=shuffle_shards,
        cache=config.data.cache_settings,
        prefetches=launch().local_rank == 0,
    )
