"""Checks of the machines before a run: GPUs, network, shared run folder, disk space and clocks.

Each check reports at the start what would otherwise show as a hang or a lost checkpoint after
hours.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from megaconsa.errors import InputError, UnreachableError
from megaconsa.files import binary_size
from megaconsa.parallel.launcher import node
from megaconsa.parallel.world import World
from megaconsa.training.disk_check import check_disk
from megaconsa.training.inputs import Inputs
from megaconsa.training.tensor_groups import check_tensor_groups

logger = logging.getLogger(__name__)

SUM_SECONDS = 300
"""Time limit of the first all-reduce. It includes the time in which NCCL connects the ranks."""
VISIBLE_SECONDS = 120
"""Time limit for a file of another node to appear. NFS attribute caches last up to a minute."""
CLOCK_SECONDS = 5.0
"""Largest difference between the nodes' clocks that causes no warning."""


def check_machines(inputs: Inputs, world: World) -> None:
    """Checks the machines. All ranks must call it, and the main rank logs one line of results.

    If a check fails, all ranks end together.
    Raises InputError if a person must change something. Raises UnreachableError if a later start
    may succeed without a change.
    """
    run = inputs.config.run.dir
    hosts = world.exchange(node())
    world.from_main(lambda: check_tensor_groups(inputs.config.parallel.tensor, hosts))
    devices = world.agreed(lambda: _check_devices(world, hosts))
    world.agreed(lambda: _check_sum(world))
    world.agreed(lambda: _check_folder(run, world))
    free, needed = world.from_main(lambda: check_disk(inputs))
    apart = _clocks_apart(world)
    if not world.is_main:
        return
    if apart > CLOCK_SECONDS:
        logger.warning(
            "the nodes' clocks differ by %.1f s: times in logs and incidents do not fit together",
            apart,
        )
    disk = f"{binary_size(free)} are free (checkpoints need {binary_size(needed)})"
    names = ", ".join(sorted(set(devices)))
    if world.size == 1:
        # There is nobody to compare with.
        logger.info("1 process, %s; %s", names, disk)
        return
    nodes = len(set(hosts))
    logger.info(
        "%d ranks on %d node%s, %s; the sum over all ranks is right, %s is shared, "
        "clocks agree within %.1f s, %s",
        world.size,
        nodes,
        "s" if nodes > 1 else "",
        names,
        run,
        apart,
        disk,
    )


def _check_devices(world: World, hosts: list[str]) -> list[str]:
    """Returns the name of each rank's device.

    Raises InputError if two ranks use the same GPU. They would share its memory and might hang in
    NCCL.
    """
    if world.device.type != "cuda":
        return world.exchange("CPU")
    properties = torch.cuda.get_device_properties(world.device)
    names, identities = zip(*world.exchange((properties.name, str(properties.uuid))), strict=True)
    own = identities[world.rank]
    sharing = [rank for rank, identity in enumerate(identities) if identity == own]
    if len(sharing) > 1:
        raise InputError(
            f"ranks {', '.join(map(str, sharing))} on {hosts[world.rank]} see the same GPU "
            f"{world.device.index}; start as many processes a "
            "node as it has GPUs, each with its own LOCAL_RANK"
        )
    if len(set(names)) > 1 and world.is_main:
        logger.warning(
            "the GPUs differ (%s): all wait for the slowest", ", ".join(sorted(set(names)))
        )
    return list(names)


def _check_sum(world: World) -> None:
    """Runs an all-reduce through the training's own backend.

    Raises UnreachableError if the result is wrong or late.
    """
    if world.size == 1:
        return
    value = torch.tensor(world.rank + 1, dtype=torch.float32, device=world.device)
    expected = world.size * (world.size + 1) // 2
    backend = dist.get_backend()
    try:
        work = dist.all_reduce(value, async_op=True)
        work.wait(timedelta(seconds=SUM_SECONDS))
        found = float(value)
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise UnreachableError(
            f"a sum over all ranks by {backend} failed ({first}); "
            "look at the network between the nodes"
        ) from None
    if found != expected:
        raise UnreachableError(
            f"a sum over all ranks by {backend} gave {found:g} instead of {expected}; "
            "look at the network between the nodes"
        )


def _check_folder(run: Path, world: World) -> None:
    """Checks that all ranks share the run folder: the main rank writes a file that all must see.

    The file is removed afterwards. If the check fails, the folders that it made are removed too.
    """
    if world.size == 1:
        return
    probe = run / f".shared_{world.launch}"
    made = None
    fault = None
    if world.is_main:
        missing = (path for path in reversed([run, *run.parents]) if not path.exists())
        made = next(missing, None)
        try:
            run.mkdir(parents=True, exist_ok=True)
            # The file is empty, because the disk may be full of files that the run will remove.
            probe.touch()
        except OSError as error:
            fault = f"run.dir={run} cannot be written: {error.strerror}"
    fault = world.exchange(fault)[0]
    seen = fault is None and (world.is_main or _appears(probe))
    saw = world.exchange(seen)
    if world.is_main:
        probe.unlink(missing_ok=True)
        if not all(saw) and made is not None:
            _remove_empty(run, made)
    if fault is not None:
        raise InputError(fault)
    if not seen:
        raise UnreachableError(
            f"run.dir={run} is not the folder that rank 0 writes in; "
            "put it on a file system that all nodes share"
        )


def _remove_empty(folder: Path, outermost: Path) -> None:
    """Removes the folder and its parents up to `outermost`, as far as they are empty.

    They may not be empty, because other runs may have started there meanwhile.
    """
    for path in (folder, *folder.parents):
        try:
            path.rmdir()
        except OSError:
            return
        if path == outermost:
            return


def _appears(path: Path) -> bool:
    """Whether the file appears within VISIBLE_SECONDS."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _clocks_apart(world: World) -> float:
    """Seconds between the earliest and the latest clock, plus the time that the exchange takes."""
    world.exchange(None)  # All ranks return from it at about the same moment.
    times = world.exchange(time.time())
    return float(max(times) - min(times))
