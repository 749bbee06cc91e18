"""All ranks find and check a checkpoint together: each one reads a part of its files."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint, DamagedError
from megaconsa.errors import UnreachableError
from megaconsa.parallel.world import World


def newest(run: Path, world: World) -> tuple[list[Path], Checkpoint | None]:
    """The checkpoints of a run folder, newest first, and the newest that is intact.

    All ranks must call this. If any of them meets an error of `store.newest`, all of them end.
    """
    paths = world.from_main(lambda: store.committed(run))
    checkpoint, faults = store.newest_intact(paths, partial(_examine, world))
    if checkpoint is None and paths:
        world.refuse(store.none_usable(run, paths, faults))
    return paths, checkpoint


def resolve(path: Path, world: World) -> Checkpoint:
    """`store.resolve` by all ranks together."""
    if world.from_main(lambda: store.is_run_folder(path)):
        _, found = newest(path, world)
        return world.agreed(lambda: store.existing(path, found))
    try:
        checkpoint, faults = _examine(world, path)
    except DamagedError as error:
        world.refuse(error)
    return world.agreed(lambda: store.intact(checkpoint, faults))


def _examine(world: World, path: Path) -> tuple[Checkpoint, list[str]]:
    """A checkpoint and its faults, the same on every rank.

    Raises DamagedError on every rank if state or manifest are damaged.
    """
    with ExitStack() as reading:
        damage = world.from_main(lambda: _protect(path, reading))
        if damage is not None:
            raise DamagedError(damage)
        checkpoint = world.agreed(lambda: store.read(path), alike=True)
        own = world.agreed(
            lambda: checkpoint.faults(names=checkpoint.share(world.rank, world.size))
        )
        suspects: dict[str, int] = {}
        for rank, names in enumerate(world.exchange(list(own))):
            suspects |= dict.fromkeys(names, rank)
        if not suspects:
            return checkpoint, []
        # A run renames a damaged checkpoint. It must not do so because one node reads wrong bytes.
        confirmed = world.from_main(lambda: checkpoint.faults(names=suspects))
        for name, rank in suspects.items():
            if name not in confirmed:
                world.refuse(
                    UnreachableError(
                        f"rank {rank} of {world.size} finds {path / name} damaged, but rank 0 "
                        "finds it intact: the storage or the memory of that rank's node is at "
                        "fault; start without that node"
                    )
                )
        return checkpoint, list(confirmed.values())


def _protect(path: Path, reading: ExitStack) -> str | None:
    """Keeps a checkpoint from being removed while it is checked.

    Returns what is damaged if it cannot be opened at all.
    """
    try:
        reading.enter_context(store.read(path).in_use())
    except DamagedError as error:
        return str(error)
    return None
