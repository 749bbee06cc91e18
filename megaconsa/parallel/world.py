"""The processes that train together: joining them, refusing together, leaving."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed as dist

from megaconsa.errors import InputError, UnreachableError
from megaconsa.exit_codes import LOST, REFUSED
from megaconsa.parallel.launcher import START_FORMAT, Launch, launch
from megaconsa.parallel.open_files import raise_limit
from megaconsa.parallel.rendezvous import meet
from megaconsa.reading import is_out_of_reach

Result = TypeVar("Result")
Refusal = InputError | UnreachableError
BACKGROUND_TIMEOUT = timedelta(hours=2)
"""Timeout of the background group. Ranks wait in it while another rank reads or writes a large
checkpoint."""


@dataclass(frozen=True)
class World:
    """All processes of a launch, and this one's place among them."""

    rank: int
    size: int
    device: torch.device
    background: Any
    """torch.distributed's group of all ranks on gloo, with a long timeout. It is used at start-up
    and by threads beside the training. None if this process is alone."""
    launch: str
    """Launch ID: when the launch began, the same on every rank. Example: 20261124T112233."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and shared files."""
        return self.rank == 0

    def agreed(self, check: Callable[[], Result], *, alike: bool = False) -> Result:
        """Runs `check` and returns its result if it succeeds on every rank.

        All ranks must call this. If any rank raises InputError or UnreachableError, all ranks end
        together. The main rank raises one error that contains each distinct message once. The
        other ranks print nothing and exit with the same code. If ranks raise both kinds, the error
        is an InputError, because a later start would be refused again.

        alike: whether the check reads the same files on every rank. If it does and only some ranks
            raise InputError, their nodes do not see the files, so the error is an
            UnreachableError.
        """
        if self.size == 1:
            return check()
        result, refusal = _attempt(check)
        refusals: list[Refusal | None] = self.exchange(refusal)
        ranks_of: dict[str, list[int]] = {}
        for rank, own in enumerate(refusals):
            if own is not None:
                ranks_of.setdefault(str(own), []).append(rank)
        if ranks_of:
            said = "; ".join(text + self._named(ranks) for text, ranks in ranks_of.items())
            refused = sum(isinstance(own, InputError) for own in refusals)
            fixable = refused == self.size if alike else refused > 0
            self.refuse(InputError(said) if fixable else UnreachableError(said))
        return result  # type: ignore[return-value]

    def from_main(self, find: Callable[[], Result]) -> Result:
        """Calls `find` on the main rank only and returns its result on every rank.

        If `find` raises InputError or UnreachableError, all ranks end as in `agreed`.
        """
        if self.size == 1:
            return find()
        result, refusal = self.exchange(_attempt(find) if self.is_main else None)[0]
        if refusal is not None:
            self.refuse(refusal)
        found: Result = result
        return found

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank.

        Uses a process group of its own, so it cannot get mixed up with the training's collectives.
        Call it at start-up, and afterwards from one thread only.
        """
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.background)
        return values

    def refuse(self, refusal: Refusal) -> NoReturn:
        """Ends all ranks, as `agreed` does. Every rank must call it with the same refusal."""
        if self.size == 1:
            raise refusal
        leave()
        if self.is_main:
            raise refusal
        raise SystemExit(REFUSED if isinstance(refusal, InputError) else LOST)

    def _named(self, ranks: list[int]) -> str:
        if len(ranks) == self.size:
            return ""
        return f" (on rank {', '.join(map(str, ranks))} of {self.size})"


ALONE = World(0, 1, torch.device("cpu"), None, "")
"""This process by itself."""


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, Refusal | None]:
    """The function's result and None, or None and the error that it raised."""
    try:
        return function(), None
    except (InputError, UnreachableError) as error:
        return None, error
    except OSError as error:
        if not is_out_of_reach(error):
            raise
        return None, UnreachableError(str(error))


def join() -> World:
    """Joins the process group of the launch: NCCL on GPUs, gloo on CPUs.

    A process without a launcher is a world of one.

    Raises InputError if the launcher's variables or the GPUs do not fit. Raises UnreachableError if
    the ranks do not find each other.
    """
    place = launch()
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        place = replace(place, local_rank=_gpu(place))
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        # NCCL warns that DeepSpeed's pipeline does not batch its sends. Users cannot change that.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    # Number of recent collectives that each rank records for the watchdog's report.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    # Ranks of a gloo group connect when they first exchange something. Its collectives use rings
    # and trees, so each rank has a few connections instead of one to every other rank.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    raise_limit(place)
    if not dist.is_initialized():
        place.export()
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=meet(place),
            rank=place.rank,
            world_size=place.size,
            device_id=device if cuda else None,
        )
    began = torch.tensor(int(time.time()), device=device)
    dist.broadcast(began, 0)
    began_at = time.strftime(START_FORMAT, time.localtime(int(began)))
    size = dist.get_world_size()
    background = dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT) if size > 1 else None
    return World(dist.get_rank(), size, device, background, began_at)


def _gpu(place: Launch) -> int:
    """CUDA index of this process's GPU. Raises InputError if there is none for it."""
    count = torch.cuda.device_count()
    if place.hides_gpus and count == 1:
        return 0
    if place.local_rank >= count:
        raise InputError(
            f"local rank {place.local_rank} has no GPU: this process sees {count}; "
            "start as many processes a node as it has GPUs"
        )
    return place.local_rank


def is_joined() -> bool:
    """Whether this process is in the process group."""
    return dist.is_initialized()


def leave() -> None:
    """Leaves the process group."""
    if is_joined():
        dist.destroy_process_group()
