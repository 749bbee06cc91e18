"""The commands that submit the jobs of slurm/ to Slurm.

The inputs are checked first. The commands are the same that a user could type.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaconsa import config as configuration
from megaconsa import slurm
from megaconsa.config import Config
from megaconsa.errors import InputError, RunError
from megaconsa.parallel.topology import Topology

FILES = Path(slurm.__file__).parent
TIME = re.compile(r"\d+(:\d\d(:\d\d)?)?|\d+-\d\d?(:\d\d(:\d\d)?)?")
"""Slurm's forms of a time limit.

They are minutes, minutes:seconds, hours:minutes:seconds and days-hours[:minutes[:seconds]]."""

WHOLE_NODE_GPUS = 8
"""GPUs per node at which a job uses the whole node, on most clusters."""


@dataclass(frozen=True)
class Resources:
    """The resources that a training job requests, and sbatch options for every job."""

    nodes: int
    gpus_per_node: int
    time: str | None = None
    """Time limit. None keeps the sbatch file's limit."""
    partition: str | None = None
    account: str | None = None
    options: tuple[str, ...] = ()
    """Further sbatch options, each without spaces, such as --qos=high."""
    cpus_per_task: int = 8
    """CPU cores per process, for Python, NCCL, data workers, checkpoint writer and watchdog."""
    exclusive: bool | None = None
    """Whether the job has its nodes to itself.

    None: only if it uses WHOLE_NODE_GPUS or more GPUs per node."""

    @property
    def gpus(self) -> int:
        """GPUs on all nodes."""
        return self.nodes * self.gpus_per_node

    def check(self) -> None:
        """Raises InputError if Slurm cannot accept a value."""
        if self.time is not None and not TIME.fullmatch(self.time):
            raise InputError(
                f"--time {self.time} is not a time limit; give minutes, hours:minutes:seconds or "
                "days-hours:minutes:seconds, such as "
                "24:00:00 or 2-12:00:00"
            )
        for option in self.options:
            if not option.startswith("--") or any(letter.isspace() for letter in option):
                raise InputError(
                    f"--sbatch {option!r} is not one option of sbatch without spaces, "
                    "such as --sbatch=--qos=high"
                )

    def of_every_job(self, output: Path) -> list[str]:
        """sbatch options for every job: where it runs, and where its output is written.

        output: file in which sbatch replaces patterns such as %x (job name) and %j (job ID).
        """
        named = {"partition": self.partition, "account": self.account, "output": output}
        options = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return [*options, *self.options]

    def of_training(self) -> list[str]:
        """sbatch options for the size and time limit of a training job: one task per GPU."""
        size = {
            "nodes": self.nodes,
            "ntasks-per-node": self.gpus_per_node,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
        }
        exclusive = self.exclusive
        if exclusive is None:
            exclusive = self.gpus_per_node >= WHOLE_NODE_GPUS
        options = [f"--{name}={number}" for name, number in size.items()]
        if exclusive:
            options.append("--exclusive")
        return options + self.limit()

    def limit(self) -> list[str]:
        """sbatch's option for the time limit. The list is empty if there is none."""
        return [f"--time={self.time}"] if self.time else []


@dataclass(frozen=True)
class Submission:
    """A command that submits jobs.

    variables: environment variables that it needs.
    logs: folder in which its jobs write their output.
    """

    command: list[str]
    variables: Mapping[str, str]
    logs: Path

    def __str__(self) -> str:
        """The command as a user would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.command)])

    def run(self) -> str:
        """Submits the jobs. Returns what sbatch or the chain's script printed.

        Raises RunError with the error output if it failed.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        ended = subprocess.run(
            self.command,
            env={**os.environ, **self.variables},
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise RunError(f"{self.command[0]} failed: {' '.join(ended.stderr.split())}")
        return ended.stdout.strip()

    def rehearse(self) -> str:
        """The commands that `run` would submit, one per line.

        A chain's script is run for this. It prints its commands instead of running them.
        """
        if self.command[0] != "bash":
            return str(self)
        environment = {**os.environ, **self.variables, "MEGACONSA_DRY_RUN": "1"}
        printed = subprocess.run(
            self.command, env=environment, capture_output=True, text=True, check=True
        ).stdout
        return f"{self}\n# which submits\n{printed.strip()}"


def check_slurm() -> None:
    """Raises InputError if this machine cannot submit jobs."""
    if shutil.which("sbatch") is None:
        raise InputError(
            "sbatch is not found; submit on a node that has Slurm, "
            "or see with --dry-run what would be submitted"
        )


def training(job: str, path: Path, overrides: Sequence[str], resources: Resources) -> Submission:
    """A training run as one job.

    job: learn or train.
    Raises InputError if the run cannot work.
    """
    run = _checked(path, overrides, resources, learning=job == "learn").run.dir
    logs = run / "slurm"
    command = [
        "sbatch",
        "--parsable",
        *resources.of_every_job(logs / "%x-%j.out"),
        *resources.of_training(),
        str(FILES / f"{job}.sbatch"),
        str(path),
        *overrides,
    ]
    return Submission(command, _variables(), logs)


def evaluation(arguments: Sequence[str], resources: Resources) -> Submission:
    """`megaconsa evaluate` as a job on one GPU.

    arguments: command line arguments of `megaconsa evaluate`.
    Raises InputError if there are none.
    """
    resources.check()
    if not arguments:
        raise InputError(
            "give the arguments of megaconsa evaluate behind --: "
            "megaconsa submit evaluate -- --model a=FOLDER ..."
        )
    logs = Path("slurm-logs")
    command = [
        "sbatch",
        "--parsable",
        *resources.of_every_job(logs / "%x-%j.out"),
        f"--cpus-per-task={resources.cpus_per_task}",
        *resources.limit(),
        str(FILES / "evaluate.sbatch"),
        *arguments,
    ]
    return Submission(command, _variables(), logs)


def chain(
    learn: Path, train: Path, out: Path, overrides: Sequence[str], resources: Resources
) -> Submission:
    """Both stages and the export, as four jobs that wait for each other.

    learn: configuration of stage 1.
    train: configuration of stage 2.
    out: folder in which the runs and the export are written.
    Raises InputError if the runs cannot work.
    """
    learned = _checked(learn, overrides, resources, learning=True)
    from_file = ["allocation.source=file", f"allocation.file={out}/allocation.json"]
    if (origin := learned.model.init_from) is not None:
        # Stage 2 will start from stage 1, which is not there yet. It has the shape of its origin.
        from_file.append(f"model.init_from={origin}")
    _checked(train, [*overrides, *from_file], resources, learning=False)
    logs = out / "slurm"
    if any(letter.isspace() for letter in str(out)):
        raise InputError(
            f"--out {str(out)!r} has a space in it, which the chain's options cannot hold; "
            "choose another folder"
        )
    variables = {
        **_variables(),
        "MEGACONSA_JOB_OPTIONS": " ".join(resources.of_every_job(logs / "%x-%j.out")),
        "MEGACONSA_TRAINING_OPTIONS": " ".join(resources.of_training()),
    }
    script = str(FILES / "chain.sbatch")
    command = ["bash", script, str(learn), str(train), str(out), *overrides]
    return Submission(command, variables, logs)


def sweep(
    path: Path,
    out: Path,
    sparsities: Sequence[float],
    granularities: Sequence[str],
    overrides: Sequence[str],
    resources: Resources,
) -> Submission:
    """Stage 1 for every combination of sparsity and granularity, as an array of jobs.

    out: folder in which each run gets a folder GRANULARITY_SPARSITY.
    Raises InputError if a run cannot work.
    """
    for granularity in granularities:
        for sparsity in sparsities:
            swept = [f"allocation.granularity={granularity}", f"allocation.sparsity={sparsity:g}"]
            if granularity == "layer":
                swept.append("allocation.scope=global")  # sweep.sbatch does the same.
            _checked(path, [*overrides, *swept], resources, learning=True)
    logs = out / "slurm"
    variables = {
        **_variables(),
        "MEGACONSA_SPARSITIES": " ".join(f"{sparsity:g}" for sparsity in sparsities),
        "MEGACONSA_GRANULARITIES": " ".join(granularities),
    }
    array = f"--array=0-{len(sparsities) * len(granularities) - 1}"
    command = [
        "sbatch",
        "--parsable",
        array,
        *resources.of_every_job(logs / "%x-%A_%a.out"),
        *resources.of_training(),
        str(FILES / "sweep.sbatch"),
        str(path),
        str(out),
        *overrides,
    ]
    return Submission(command, variables, logs)


def _checked(path: Path, overrides: Sequence[str], resources: Resources, learning: bool) -> Config:
    """Loads and checks the configuration of a job.

    learning: whether the job is stage 1.
    Raises InputError if the configuration does not load, is of the other stage, or does not fit the
    GPUs.
    """
    resources.check()
    config = configuration.load(path, list(overrides))
    if config.learning != learning:
        source = f"allocation.source={config.allocation.source}"
        if learning:
            wanted = "learn an allocation, set it to learn"
        else:
            wanted = "train on a finished allocation, set it to file or rule"
        raise InputError(f"{path} has {source}, but this job is to {wanted}")
    try:
        Topology.of(config, resources.gpus)
    except InputError as error:
        raise InputError(
            f"--nodes {resources.nodes} --gpus-per-node {resources.gpus_per_node}: {error}"
        ) from None
    tensor = config.parallel.tensor
    if resources.gpus_per_node % tensor:
        raise InputError(
            f"--gpus-per-node {resources.gpus_per_node}: parallel.tensor={tensor} does not divide "
            "it, and a tensor group across nodes waits for the network in every layer; set "
            "parallel.tensor to a number that does"
        )
    return config


def expanded(path: Path, name: str) -> Path:
    """Replaces `~` and `$VARIABLES` in a path, as in a configuration.

    name: the option that holds the path, for the error message.
    Raises InputError for an unknown variable or user.
    """
    try:
        return Path(configuration.expand_path(str(path)))
    except ValueError as error:
        raise InputError(f"{name} {path}: {error}") from None


def _variables() -> dict[str, str]:
    """Environment variables that tell the jobs where to find lib.sh and this Python environment.

    The Python environment is omitted if another one or a container is chosen.
    """
    variables = {"MEGACONSA_SLURM": str(FILES)}
    chosen = ("MEGACONSA_VENV", "MEGACONSA_PYXIS_IMAGE", "MEGACONSA_APPTAINER_IMAGE")
    if sys.prefix != sys.base_prefix and not any(os.environ.get(name) for name in chosen):
        variables["MEGACONSA_VENV"] = sys.prefix
    return variables
