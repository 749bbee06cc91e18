"""Jobs on a real Slurm: cores, whole nodes, and a failed node."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megaconsa.checkpoint import store
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import LONG, log, number, running_at

pytestmark = pytest.mark.slurm

Submit = Callable[..., str]
WriteConfig = Callable[..., Path]


def task(job: str, rank: int) -> int:
    """Returns the process ID of a rank of a job."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((process / "environ").read_bytes().split(b"\0"))
            command = (process / "cmdline").read_bytes()
        except OSError:  # the process has ended, or it is a kernel thread
            continue
        if wanted <= variables and b"python" in command and b"train" in command:
            return int(process.name)
    raise AssertionError(f"no rank {rank} of job {job}")


def test_the_node_of_a_lost_rank_is_avoided(
    cluster: Cluster, submit: Submit, write_config: WriteConfig, tmp_path: Path
) -> None:
    options = ("--gpus-per-node", 2, "--cpus-per-task", 4, "--exclusive")
    job = number(submit("learn", write_config("run", **LONG), *options))
    running_at(cluster, tmp_path / "run", 30)
    first = cluster.job(job)
    assert (first["CPUs/Task"], first["OverSubscribe"]) == ("4", "NO")
    assert int(first["NumCPUs"]) == 32, "the whole node"
    os.kill(task(job, 1), signal.SIGKILL)
    record = cluster.ended(job)
    said = log(tmp_path / "run")
    assert record["JobState"] == "COMPLETED", said
    assert record["Restarts"] == "1"
    assert f"rank 1 of 2 on {first['NodeList']} died without a word" in said
    assert f"{first['NodeList']} failed: excluded from the next starts" in said
    assert record["ExcNodeList"] == first["NodeList"]
    assert record["NodeList"] != first["NodeList"]


def test_a_node_that_cannot_be_done_without(
    cluster: Cluster, submit: Submit, write_config: WriteConfig, tmp_path: Path
) -> None:
    """There are two nodes, and the job needs both."""
    job = number(submit("learn", write_config("run", **LONG), "--nodes", 2, "--gpus-per-node", 1))
    running_at(cluster, tmp_path / "run", 30)
    os.kill(task(job, 1), signal.SIGKILL)
    record = cluster.ended(job)
    said = log(tmp_path / "run")
    assert record["JobState"] == "COMPLETED", said
    assert "rank 1 of 2 on node2 died without a word" in said
    assert "node2 failed, but tests has too few other nodes to do without it" in said
    assert record["ExcNodeList"] == "(null)"
    newest = store.newest(tmp_path / "run")
    assert newest is not None
    assert newest.step == LONG["training"]["steps"]
