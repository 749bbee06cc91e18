"""How the ranks of a launch find each other before a process group exists."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistError, HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from megaconsa.errors import UnreachableError
from megaconsa.parallel.launcher import Launch

PATIENCE_SECONDS = 600.0
"""Time limit for all ranks to arrive.

It is long, because a rank may load its imports from a busy file system.
"""
GRACE_SECONDS = 10.0
"""Time after its timeout within which TCPStore returns, unless another program has the port."""
NOTICE_SECONDS = 10.0
"""Time after which a waiting rank prints which ranks it waits for."""
REPEAT_SECONDS = 60.0
"""Time after which rank 0 prints that message again."""
POLL_SECONDS = 0.05
NAMED_RANKS = 16
"""Largest number of missing ranks that a message lists."""


def meet(launch: Launch) -> Store:
    """Waits until all ranks have arrived. Returns a key-value store that they share.

    Only the ranks of this start see its keys. A restart by torchrun is another start.

    Raises UnreachableError if the port is taken, if rank 0 is lost, or if a rank does not arrive
    within PATIENCE_SECONDS.
    """
    if launch.size == 1:
        # A lone process uses its own memory, not a port. A port that was free when it was chosen
        # may be taken by now.
        return HashStore()
    deadline = time.monotonic() + PATIENCE_SECONDS
    store = _connect(launch, deadline)
    try:
        join = _gather if launch.rank == 0 else _report
        return PrefixStore(join(store, launch, deadline), store)
    except DistError as error:
        raise UnreachableError(
            f"{_place(launch)} hears nothing more from rank 0 at {_meeting(launch)} "
            f"({_first_line(error)}); look at why rank 0 ended, or never came"
        ) from None


def _connect(launch: Launch, deadline: float) -> Store:
    """Connects to the store of the launch.

    torchrun serves the store if it started the launch. Otherwise rank 0 does.

    deadline: by time.monotonic.

    Raises UnreachableError if the port is taken or the store does not answer before the deadline.
    """
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    connecting: Future[Store] = Future()

    def connect() -> None:
        try:
            store = TCPStore(
                launch.address,
                launch.port,
                is_master=launch.rank == 0 and not served,
                timeout=timedelta(seconds=PATIENCE_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,
            )
            connecting.set_result(store)
        except RuntimeError as error:
            connecting.set_exception(error)

    # It runs in a thread, because TCPStore ignores its timeout if another program listens on the
    # port and does not answer.
    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    try:
        with _notice(f"{_place(launch)} waits for rank 0 at {_meeting(launch)}"):
            # A process must not end while the thread returns from TCPStore, which aborts it. So
            # TCPStore's own timeout comes first.
            return connecting.result(deadline - time.monotonic() + GRACE_SECONDS)
    except (DistError, TimeoutError) as error:
        if "EADDRINUSE" in str(error):
            raise UnreachableError(
                f"MASTER_PORT={launch.port} of this machine, where the ranks are to meet, is taken "
                "by another process; set MASTER_PORT to a free port, or wait for it to end"
            ) from None
        reason = _first_line(error) or "no answer"
        raise UnreachableError(
            f"{_place(launch)} cannot reach rank 0 at {_meeting(launch)} ({reason}); look at "
            "whether rank 0 runs there and the network lets it be reached"
        ) from None


def _gather(store: Store, launch: Launch, deadline: float) -> str:
    """Runs on rank 0: names the start, tells the name to each rank, and waits for all of them.

    torchrun keeps one store for all its restarts, so the store may hold keys of an earlier start.
    torchrun's restart count cannot serve as the name, because each node counts by itself. So each
    rank asks under a new number, and only the rank 0 of the current start answers.

    Returns the name. Raises UnreachableError with the missing ranks at the deadline.
    """
    start = f"start_{store.add('starts', 1)}"
    awaited = [f"{start}/{rank}" for rank in range(1, launch.size)]
    answered = 0
    notice = time.monotonic() + NOTICE_SECONDS
    while awaited and not store.check(awaited):
        asked = store.add("asked", 0)
        for number in range(answered + 1, asked + 1):
            store.set(f"answer/{number}", start)
        answered = asked
        now = time.monotonic()
        if now > min(notice, deadline):
            awaited = [key for key in awaited if not store.check([key])]
            ranks = [int(key.rpartition("/")[2]) for key in awaited]
            if now > deadline:
                raise UnreachableError(
                    f"{_named(ranks)} of {launch.size} did not come to {_meeting(launch)} within "
                    f"{PATIENCE_SECONDS:g} s; look at why they did not start, or cannot reach it"
                )
            _say(f"waiting for {_named(ranks)} of {launch.size} at {_meeting(launch)}")
            notice = now + REPEAT_SECONDS
        time.sleep(POLL_SECONDS)
    store.set(f"{start}/all", "")
    return start


def _report(store: Store, launch: Launch, deadline: float) -> str:
    """Runs on all other ranks: asks rank 0 for the start's name, and waits for all ranks.

    Returns the name.
    """
    answer = f"answer/{store.add('asked', 1)}"
    with _notice(f"{_place(launch)} waits for rank 0 at {_meeting(launch)}"):
        store.wait([answer], timedelta(seconds=PATIENCE_SECONDS))
    start = str(store.get(answer).decode())
    store.set(f"{start}/{launch.rank}", "")
    # Rank 0 must reach the deadline first, because only rank 0 knows which ranks are missing.
    store.wait([f"{start}/all"], timedelta(seconds=max(1.0, deadline - time.monotonic()) + 5))
    return start


@contextmanager
def _notice(text: str) -> Iterator[None]:
    """Prints `text` once if the work inside takes longer than NOTICE_SECONDS."""
    timer = threading.Timer(NOTICE_SECONDS, _say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _place(launch: Launch) -> str:
    return f"rank {launch.rank} of {launch.size}"


def _meeting(launch: Launch) -> str:
    return f"{launch.address}:{launch.port}"


def _named(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:NAMED_RANKS]))
    more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
