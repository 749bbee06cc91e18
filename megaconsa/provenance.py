"""What produced a run: code, command, machine, libraries and dates.

`provenance.json` in a run folder holds one entry for each start.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megaconsa import __version__, run_folder
from megaconsa.errors import InputError
from megaconsa.files import parse_json, replace_text

LIBRARIES = (
    *("torch", "triton", "deepspeed", "transformers", "tokenizers", "safetensors"),
    *("mosaicml-streaming", "numpy", "flash-attn"),
)
"""Libraries that can change what a run computes or writes. Those that are absent are left out."""
GIT_SECONDS = 10.0
"""Time limit for a call of git, which may wait for a file system."""


@dataclass(frozen=True)
class Start:
    """One start of a run, on the main rank."""

    started: str
    """When it began: ISO 8601 in UTC, to the second."""
    first_step: int
    """Steps that were done before this start."""
    command: str
    """What was typed, as a line for a shell."""
    version: str
    """Version of megaconsa."""
    commit: str | None
    """Commit of megaconsa's source, if it is known."""
    modified: bool | None
    """Whether tracked files of the source differed from the commit. None if it is not known."""
    python: str
    libraries: dict[str, str]
    """Library -> version."""
    system: str
    hosts: list[str]
    devices: dict[str, int]
    """Name of a GPU or CPU -> number of ranks on devices of this name."""
    job: str | None = None
    """ID of the Slurm job."""
    ended: str | None = None
    """When it ended, in the form of `started`. None while it runs, or if it was killed."""
    last_step: int | None = None
    """Steps that were done when it ended."""


def describe_start(first_step: int, machines: Sequence[tuple[str, str]]) -> Start:
    """Describes the present process.

    machines: host and device of each rank.
    """
    commit, modified = source_commit(Path(__file__).parent)
    return Start(
        started=_now(),
        first_step=first_step,
        command=command_line(sys.argv, sys.orig_argv),
        version=__version__,
        commit=commit,
        modified=modified,
        python=platform.python_version(),
        libraries=library_versions(),
        system=platform.platform(),
        hosts=sorted({host for host, _ in machines}),
        devices=dict(Counter(device for _, device in machines)),
        job=os.environ.get("SLURM_JOB_ID"),
    )


def load_starts(run: Path) -> list[Start]:
    """Returns the starts of a run, the oldest first. Empty if the run folder has no such file.

    Raises InputError if the file cannot be read.
    """
    path = run / run_folder.PROVENANCE
    if not path.is_file():
        return []
    try:
        return [Start(**entry) for entry in parse_json(path.read_text())["starts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}; remove it") from None


def save_starts(run: Path, starts: list[Start]) -> None:
    """Writes the file. Raises OSError if the disk refuses."""
    content = {"starts": [asdict(start) for start in starts]}
    replace_text(run / run_folder.PROVENANCE, json.dumps(content, indent=1) + "\n")


def ended(start: Start, last_step: int) -> Start:
    """Returns the start with the present time as its end."""
    return replace(start, ended=_now(), last_step=last_step)


def library_versions() -> dict[str, str]:
    """Returns the versions of the installed `LIBRARIES`."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line(arguments: list[str], original: list[str]) -> str:
    """Returns what was typed, with the program's name instead of its path.

    arguments: sys.argv.
    original: sys.orig_argv, which still has `-m MODULE`.
    """
    program = Path(arguments[0]).name
    if "-m" in original[:-1]:
        module = original[original.index("-m") + 1]
        return shlex.join(["python", "-m", module, *arguments[1:]])
    if program.endswith(".py"):
        return shlex.join(["python", arguments[0], *arguments[1:]])
    return shlex.join([program, *arguments[1:]])


def source_commit(package: Path) -> tuple[str | None, bool | None]:
    """Returns the commit of the source in `package`, and whether tracked files differ from it.

    Both are None if neither git nor pip knows the commit.
    """
    # A package installed inside somebody else's checkout is not a tracked file there.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return _installed_commit(), None
    commit = _git(package, "rev-parse", "HEAD")
    if not commit:
        return None, None
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _installed_commit() -> str | None:
    """Returns the commit that pip installed from, if it installed from a repository."""
    try:
        text = metadata.distribution("megaconsa").read_text("direct_url.json")
        source: dict[str, Any] = parse_json(text) if text else {}
        commit = source["vcs_info"]["commit_id"]
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
    return str(commit)


def _git(folder: Path, *words: str) -> str | None:
    """Returns the output of a git command, or None if it failed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
