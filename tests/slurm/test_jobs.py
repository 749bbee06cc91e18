"""The jobs of slurm/ on a real Slurm.

They are stopped, killed, crashing, refused, over two nodes, in a chain, and as a sweep.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.checkpoint import store
from megaconsa.consa.allocation import Allocation
from megaconsa.reporting.metrics import computed, read_metrics
from tests.support import ROOT
from tests.support.disks import OUT_OF_REACH
from tests.support.interruptions import contents
from tests.support.slurm_cluster import Cluster, await_until
from tests.support.slurm_jobs import LONG, log, number, running_at, steps

pytestmark = pytest.mark.slurm

Submit = Callable[..., str]
WriteConfig = Callable[..., Path]
ONE_NODE = ("--gpus-per-node", 2)
EIO_SECONDS = float(os.environ.get("MEGACONSA_TEST_EIO_SECONDS", "10"))
"""How long the storage does not answer."""


def test_stopped_and_killed_job_ends_as_an_undisturbed_one(
    cluster: Cluster, submit: Submit, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Runs two ranks.

    The first start gets the signal that announces the time limit. In the second start a rank is
    killed.
    """
    job = number(submit("learn", write_config("disturbed", **LONG), *ONE_NODE))
    running_at(cluster, tmp_path / "disturbed", 30)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    await_until(
        lambda: cluster.job(job)["Restarts"] == "1",
        "requeue",
        60,
        lambda: log(tmp_path / "disturbed"),
    )
    stopped = steps(tmp_path / "disturbed")
    assert 30 <= stopped < 90
    undisturbed = number(submit("learn", write_config("undisturbed", **LONG), *ONE_NODE))
    running_at(cluster, tmp_path / "disturbed", stopped + 20)
    cluster.call("scancel", "--signal=KILL", f"{job}.0")
    for each in (job, undisturbed):
        assert cluster.ended(each)["JobState"] == "COMPLETED", log(tmp_path / "disturbed")
    assert cluster.job(job)["Restarts"] == "2"

    said = log(tmp_path / "disturbed")
    assert "stopped after saving a checkpoint; requeued" in said
    assert f"resumes at step {stopped} " in said
    (failure,) = json.loads((tmp_path / "disturbed" / "restarts.json").read_text())
    assert failure["job"] == job
    disturbed, whole = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("disturbed", "undisturbed")
    )
    assert computed(disturbed) == computed(whole)
    assert contents(tmp_path / "disturbed") == contents(tmp_path / "undisturbed")


def test_a_dead_hosts_lock_and_storage_that_does_not_answer_stop_no_job(
    cluster: Cluster, submit: Submit, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Runs two ranks and kills them.

    The lock then names a host that no longer exists, and the newest checkpoint gives EIO for a
    while.
    """
    run = tmp_path / "disturbed"
    job = number(submit("learn", write_config("disturbed", **LONG), *ONE_NODE))
    undisturbed = number(submit("learn", write_config("undisturbed", **LONG), *ONE_NODE))
    running_at(cluster, run, 50)
    cluster.call("scancel", "--signal=KILL", f"{job}.0")
    lock = run / ".lock"
    lock.write_text(
        json.dumps(json.loads(lock.read_text()) | {"host": "gone", "machine": "another"})
    )
    newest = store.committed(run)[0]
    state = newest / "state.json"
    aside = state.rename(run / "aside")
    state.symlink_to(OUT_OF_REACH)
    await_until(lambda: "trying again" in log(run), "the next start", 120, lambda: log(run))
    time.sleep(EIO_SECONDS)
    aside.replace(state)
    for each in (job, undisturbed):
        assert cluster.ended(each)["JobState"] == "COMPLETED", log(run)

    said = log(run)
    assert "on gone, since" in said
    assert "its lock is void" in said
    assert f"{state} cannot be read (Input/output error), trying again" in said
    assert f"resumes at step {newest.name.removeprefix('step_')} " in said
    assert cluster.job(job)["Restarts"] == "1"
    assert not list((run / "checkpoints").glob("*.damaged"))
    disturbed, whole = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("disturbed", "undisturbed")
    )
    assert computed(disturbed) == computed(whole)
    assert contents(run) == contents(tmp_path / "undisturbed")


def test_the_time_limit_is_foreseen(
    cluster: Cluster, submit: Submit, write_config: WriteConfig, tmp_path: Path
) -> None:
    """The run stops long before Slurm's signal.

    It sees that a save of unknown length would not fit into the rest of its four minutes.
    """
    config = write_config("limited", training={"steps": 100_000}, checkpoint={"every": 0})
    job = number(
        submit("learn", config, "--gpus-per-node", 1, "--time", 4, "--sbatch=--signal=B:USR1@1")
    )
    await_until(
        lambda: cluster.job(job)["Restarts"] == "1",
        "requeue",
        200,
        lambda: log(tmp_path / "limited"),
    )
    cluster.call("scancel", job)
    said = log(tmp_path / "limited")
    assert "the job ends in" in said
    assert "stopped after saving a checkpoint; requeued" in said
    newest = store.newest(tmp_path / "limited")
    assert newest is not None
    assert newest.step <= steps(tmp_path / "limited")
    assert "SIGUSR1" not in said


def test_two_nodes_equal_one_process(
    cluster: Cluster,
    submit: Submit,
    write_config: WriteConfig,
    make_config: Callable[..., dict[str, Any]],
    train: Callable[..., Any],
    tmp_path: Path,
) -> None:
    job = number(submit("learn", write_config("two"), "--nodes", 2, "--gpus-per-node", 1))
    one = train(make_config(run={"dir": str(tmp_path / "one")}))
    record = cluster.ended(job)
    assert (record["JobState"], record["NodeList"], record["NumNodes"]) == (
        "COMPLETED",
        "node[1-2]",
        "2",
    ), log(tmp_path / "two")
    two = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)


def test_crash_loop_is_given_up(
    cluster: Cluster, submit: Submit, write_config: WriteConfig, tmp_path: Path
) -> None:
    """The learning rate makes the loss infinite in the first steps, after every restart."""
    config = write_config(
        "diverging", training={"steps": 50, "learning_rate": 1e30}, checkpoint={"every": 0}
    )
    job = number(submit("learn", config, "--gpus-per-node", 1, MEGACONSA_MAX_FAILURES="2"))
    record = cluster.ended(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "1:0", "1")
    said = log(tmp_path / "diverging").splitlines()
    assert any(
        "exit code 1, failure 1 of 2 since the start of the run; requeued" in line for line in said
    )
    given_up = (
        "given up: failed 2 times in a row since the start of the run, "
        "without a newer checkpoint (exit codes 1, 1)"
    )
    assert given_up in said[-1]


def test_refused_input_is_not_requeued(
    cluster: Cluster, submit: Submit, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Runs two ranks. Exit code 2 of either rank must not get lost."""
    job = number(
        submit(
            "learn", write_config("refused", data={"path": str(tmp_path / "nowhere")}), *ONE_NODE
        )
    )
    record = cluster.ended(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "2:0", "0")
    assert f"error: data {tmp_path}/nowhere: no such folder" in log(tmp_path / "refused")
    assert "Not requeued" in log(tmp_path / "refused").splitlines()[-1]
    assert not (tmp_path / "refused" / "restarts.json").exists()


def test_cancelled_job_stays_cancelled(
    cluster: Cluster, submit: Submit, write_config: WriteConfig, tmp_path: Path
) -> None:
    job = number(
        submit("learn", write_config("cancelled", training={"steps": 5000}), "--gpus-per-node", 1)
    )
    running_at(cluster, tmp_path / "cancelled", 3)
    cluster.call("scancel", job)
    assert cluster.ended(job)["JobState"] == "CANCELLED"
    await_until(
        lambda: not cluster.call("squeue", "-h", "-j", job),
        "end of its tasks",
        60,
        lambda: log(tmp_path / "cancelled"),
    )
    assert cluster.job(job)["JobState"] == "CANCELLED"
    newest = store.newest(tmp_path / "cancelled")
    assert newest is not None
    assert newest.step == steps(tmp_path / "cancelled"), "it saves before it ends"


def test_chain(cluster: Cluster, write_config: WriteConfig, tmp_path: Path) -> None:
    """Submits the chain by hand, as a job.

    Its options are not the defaults of the files.
    """
    learn = write_config("learn")
    train = write_config("train", allocation={"source": "rule", "rule": "dense"})
    options = f"--nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --output={tmp_path}/%x.out"
    variables = {
        "MEGACONSA_TRAINING_OPTIONS": options,
        "MEGACONSA_JOB_OPTIONS": f"--output={tmp_path}/%x.out",
        "MEGACONSA_VENV": str(ROOT / ".venv"),
    }
    output = tmp_path / "chain.out"
    arguments = ("slurm/chain.sbatch", learn, train, tmp_path / "out")
    cluster.ended(
        cluster.call("sbatch", "--parsable", f"--output={output}", *arguments, **variables).strip()
    )
    numbers = dict(line.split(": job ") for line in output.read_text().splitlines())
    assert list(numbers) == ["learn", "finalize-masks", "train", "export-hf"]
    for name, job in numbers.items():
        assert cluster.ended(job)["JobState"] == "COMPLETED", (tmp_path / f"{name}.out").read_text()
    learned = Allocation.load(tmp_path / "out" / "allocation.json")
    trained = store.resolve(tmp_path / "out" / "train").allocation
    assert trained is not None
    assert learned.full == trained.full
    assert (tmp_path / "out" / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "hf" / "config.json").is_file()


def test_sweep(cluster: Cluster, submit: Submit, write_config: WriteConfig, tmp_path: Path) -> None:
    wanted = {"kv_head_0.25": 0.25, "layer_0.25": 0.25}
    sweep = (
        "--sparsity",
        0.25,
        "--granularity",
        "kv_head",
        "--granularity",
        "layer",
        "--out",
        tmp_path / "sweep",
    )
    job = number(submit("sweep", write_config("sweep_base"), "--gpus-per-node", 1, *sweep))
    for task in range(2):
        assert cluster.ended(f"{job}_{task}")["JobState"] == "COMPLETED", (
            tmp_path / f"sweep/slurm/sweep-{job}_{task}.out"
        ).read_text()
    for name, sparsity in wanted.items():
        allocation = Allocation.load(tmp_path / "sweep" / name / "allocation.json")
        assert allocation.sparsity == sparsity
        assert allocation.granularity == name.removesuffix("_0.25")
