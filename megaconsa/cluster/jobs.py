"""The commands that hand the jobs of slurm/ to Slurm, checked first. They are the ones a user could type."""

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
"""Slurm's forms of a time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""

WHOLE_NODE_GPUS = 8
"""GPUs of a node from which on a job has all of it, on most clusters."""


@dataclass(frozen=True)
class Resources:
    """What a training job asks for, and sbatch's options for every job."""

    nodes: int
    gpus_per_node: int
    time: str | None = None
    """None leaves the sbatch file's."""
    partition: str | None = None
    account: str | None = None
    options: tuple[str, ...] = ()
    """Further options of sbatch, each a word: --qos=high."""
    cpus_per_task: int = 8
    """Cores of each process: Python, NCCL, data workers, the writer of checkpoints, the watchdog."""
    exclusive: bool | None = None
    """Whether nobody else's jobs share the nodes; None where a job takes WHOLE_NODE_GPUS or more."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def check(self) -> None:
        """Raises InputError where a value cannot be what Slurm takes."""
        if self.time is not None and not TIME.fullmatch(self.time):
            raise InputError(
                f"--time {self.time} is not a time limit; give minutes, hours:minutes:seconds or days-hours:minutes:seconds, such as "
                "24:00:00 or 2-12:00:00"
            )
        for option in self.options:
            if not option.startswith("--") or any(letter.isspace() for letter in option):
                raise InputError(
                    f"--sbatch {option!r} is not one option of sbatch without spaces, such as --sbatch=--qos=high"
                )

    def of_every_job(self, output: Path) -> list[str]:
        """sbatch's options: where a job runs, and the file of its output, in which sbatch puts name and number for % and a letter."""
        named = {"partition": self.partition, "account": self.account, "output": output}
        return [f"--{name}={value}" for name, value in named.items() if value is not None] + list(
            self.options
        )

    def of_training(self) -> list[str]:
        """sbatch's options of size and time: a task for each GPU."""
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
        return options + (["--exclusive"] if exclusive else []) + self.limit()

    def limit(self) -> list[str]:
        return [f"--time={self.time}"] if self.time else []


@dataclass(frozen=True)
class Submission:
    """A command that submits, with the environment variables it needs, and where its jobs write their output."""

    command: list[str]
    variables: Mapping[str, str]
    logs: Path

    def __str__(self) -> str:
        """As a user would type it."""
        return " ".join(
            [
                *(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()),
                shlex.join(self.command),
            ]
        )

    def run(self) -> str:
        """Submits; returns what sbatch or the chain's script printed. Raises RunError with what it said where it failed."""
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
        """What `run` would submit, a line each; a chain's script is run, and prints its commands instead of running them."""
        if self.command[0] != "bash":
            return str(self)
        environment = {**os.environ, **self.variables, "MEGACONSA_DRY_RUN": "1"}
        printed = subprocess.run(
            self.command, env=environment, capture_output=True, text=True, check=True
        ).stdout
        return f"{self}\n# which submits\n{printed.strip()}"


def check_slurm() -> None:
    """Raises InputError where this machine cannot submit."""
    if shutil.which("sbatch") is None:
        raise InputError(
            "sbatch is not found; submit on a node that has Slurm, or see with --dry-run what would be submitted"
        )


def training(job: str, path: Path, overrides: Sequence[str], resources: Resources) -> Submission:
    """A run as one job. job: learn or train."""
    run = _checked(path, overrides, resources, learning=job == "learn").run.dir
    logs = run / "slurm"
    command = [
        "sbatch",
        "--parsable",
        *resources.of_every_job(logs / "%x-%j.out"),
        *resources.of_training(),
    ]
    return Submission(
        [*command, str(FILES / f"{job}.sbatch"), str(path), *overrides], _variables(), logs
    )


def evaluation(arguments: Sequence[str], resources: Resources) -> Submission:
    """`megaconsa evaluate` with these arguments as a job on one GPU."""
    resources.check()
    if not arguments:
        raise InputError(
            "give the arguments of megaconsa evaluate behind --: megaconsa submit evaluate -- --model a=FOLDER ..."
        )
    logs = Path("slurm-logs")
    cores = f"--cpus-per-task={resources.cpus_per_task}"
    options = [*resources.of_every_job(logs / "%x-%j.out"), cores, *resources.limit()]
    command = ["sbatch", "--parsable", *options]
    return Submission([*command, str(FILES / "evaluate.sbatch"), *arguments], _variables(), logs)


def chain(
    learn: Path, train: Path, out: Path, overrides: Sequence[str], resources: Resources
) -> Submission:
    """Both stages and the export in `out`, as four jobs that wait for each other."""
    _checked(learn, overrides, resources, learning=True)
    _checked(
        train,
        [*overrides, "allocation.source=file", f"allocation.file={out}/allocation.json"],
        resources,
        learning=False,
    )
    logs = out / "slurm"
    if any(letter.isspace() for letter in str(out)):
        raise InputError(
            f"--out {str(out)!r} has a space in it, which the chain's options cannot hold; choose another folder"
        )
    variables = {
        **_variables(),
        "MEGACONSA_JOB_OPTIONS": " ".join(resources.of_every_job(logs / "%x-%j.out")),
        "MEGACONSA_TRAINING_OPTIONS": " ".join(resources.of_training()),
    }
    return Submission(
        ["bash", str(FILES / "chain.sbatch"), str(learn), str(train), str(out), *overrides],
        variables,
        logs,
    )


def sweep(
    path: Path,
    out: Path,
    sparsities: Sequence[float],
    granularities: Sequence[str],
    overrides: Sequence[str],
    resources: Resources,
) -> Submission:
    """Stage 1 for every combination, in folders GRANULARITY_SPARSITY of `out`, as an array of jobs."""
    for granularity in granularities:
        for sparsity in sparsities:
            swept = [f"allocation.granularity={granularity}", f"allocation.sparsity={sparsity:g}"]
            swept += (
                ["allocation.scope=global"] if granularity == "layer" else []
            )  # as in sweep.sbatch
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
    ]
    return Submission(
        [*command, str(FILES / "sweep.sbatch"), str(path), str(out), *overrides], variables, logs
    )


def _checked(path: Path, overrides: Sequence[str], resources: Resources, learning: bool) -> Config:
    """The configuration, if it loads, is of the wanted stage and fits the GPUs; InputError otherwise."""
    resources.check()
    config = configuration.load(path, list(overrides))
    if config.learning != learning:
        source = f"allocation.source={config.allocation.source}"
        wanted = (
            "learn an allocation, set it to learn"
            if learning
            else "train on a finished allocation, set it to file or rule"
        )
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
    """A path with `~` and `$VARIABLES` replaced, as in a configuration. name: what the user calls
    it. Raises InputError for those that nobody knows."""
    try:
        return Path(configuration.expand_path(str(path)))
    except ValueError as error:
        raise InputError(f"{name} {path}: {error}") from None


def _variables() -> dict[str, str]:
    """Where the jobs find lib.sh, and this environment where they run in no container."""
    variables = {"MEGACONSA_SLURM": str(FILES)}
    chosen = ("MEGACONSA_VENV", "MEGACONSA_PYXIS_IMAGE", "MEGACONSA_APPTAINER_IMAGE")
    if sys.prefix != sys.base_prefix and not any(os.environ.get(name) for name in chosen):
        variables["MEGACONSA_VENV"] = sys.prefix
    return variables
