"""A real Slurm of two nodes on this machine, for the duration of a test run.

It has its own munged, slurmctld, slurmds, folder and ports. A Slurm that is already there is not
touched.
Needs root, and the programs of Debian's packages slurm-wlm and munge. Does not need systemd.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SEARCHED = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
"""Debian puts the daemons into folders that are not in the PATH of every user."""
NODES = ("node1", "node2")
GPUS = 2
"""GPUs that each node pretends to have. Jobs then ask for the same as on a real cluster."""
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
)
CONFIGURATION = """\
ClusterName=megaconsa-tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
# The ports of jobs follow from their numbers. Another such Slurm on this machine must get others.
FirstJobId={port}
AuthType=auth/munge
# A requeued job waits until its old credential has expired.
# This takes two minutes by default, and also with less than 5.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
# Nodes have more cores than this machine, so that jobs share its time instead of queueing.
SlurmdParameters=config_overrides
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=30
MinJobAge=3600
# Many sites set this. The scripts ask for requeueing themselves.
JobRequeue=0
{nodes}
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
    "CPUs=32 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN"
)


def missing() -> str | None:
    """Returns why no Slurm can be started here, or None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    if absent:
        return (
            f"{', '.join(absent)} not found; "
            "apt-get install --no-install-recommends slurm-wlm slurm-client munge"
        )
    return None if os.geteuid() == 0 else "only root can start slurmctld and slurmd"


class Cluster:
    """Context manager that runs the daemons in the empty folder `folder` while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH"))
        }
        # Slurm's names for this machine are unknown to its network. So the jobs are told where to
        # meet.
        own = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": SEARCHED,
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        self.environment = inherited | own
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._attempt("scancel", "--full", "--signal=KILL", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: object, **variables: str) -> str:
        """Runs a command in the root of the repository, with additional environment variables.

        Returns its standard output. Raises AssertionError if the command fails.
        """
        ended = self._attempt(*command, **variables)
        assert ended.returncode == 0, (
            f"{command}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}"
        )
        return ended.stdout

    def job(self, job: str) -> dict[str, str]:
        """Returns Slurm's record of a job: JobState, ExitCode, Restarts, ..."""
        words = self.call("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: str, seconds: float = 300) -> dict[str, str]:
        """Waits for the final end of a job and returns its record."""
        await_until(
            lambda: self.job(job)["JobState"] in ENDED,
            f"end of job {job}",
            seconds,
            lambda: str(self.job(job)),
        )
        return self.job(job)

    def _attempt(self, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        environment = self.environment | variables
        return subprocess.run(
            words,
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def _configure(self) -> None:
        host = socket.gethostname()
        folder = self.folder
        ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            NODE.format(name=name, host=host, port=port, gpus=GPUS)
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=host, port=ports[0], folder=folder, nodes=nodes)
        )
        devices = [folder / f"gpu{number}" for number in range(GPUS)]
        (folder / "gres.conf").write_text(
            "AutoDetect=off\n" + "".join(f"Name=gpu File={device}\n" for device in devices)
        )
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for device in devices:
            device.touch()
        for name in ("state", *(f"spool_{node}" for node in NODES)):
            (folder / name).mkdir()
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))

    def _start(self) -> None:
        files = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munge.pid",
            "seed-file": "munge.seed",
        }
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            *(f"--{option}={self.folder / file}" for option, file in files.items()),
        )
        self._await((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self._await(
            lambda: (
                self._attempt("sinfo", "-h", "-N", "-o", "%t").stdout.split()
                == ["idle"] * len(NODES)
            ),
            "idle nodes",
        )

    def _daemon(self, *command: str) -> None:
        # The daemons end with the tests, even if these are killed. Otherwise queued jobs would
        # still run.
        words = ["setpriv", "--pdeathsig", "TERM", *command]
        with (self.folder / f"daemon_{len(self.daemons)}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    words, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def _await(self, reached: Callable[[], bool], what: str) -> None:
        def logs() -> str:
            return "\n".join(
                f"{path}:\n{path.read_text(errors='replace')[-2000:]}"
                for path in self.folder.glob("*.log")
            )

        await_until(reached, what, 30, logs)


def await_until(
    reached: Callable[[], bool], what: str, seconds: float, told: Callable[[], str]
) -> None:
    """Polls until `reached` is true.

    Raises AssertionError with the text of `told` after `seconds` seconds.
    """
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"no {what} after {seconds:.0f} s\n{told()}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
