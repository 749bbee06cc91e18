"""Runs commands as a user types them, and notes what each step took."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import ROOT

REFUSED = 2
STEP_SECONDS = 600.0
"""Time limit of a command. Only a hang reaches it."""
SIDE_BY_SIDE = 2
"""Refusals write nothing, so that they can run beside each other."""
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Step:
    """What a finished command took."""

    text: str
    code: int
    seconds: float


class Walk:
    """A user in their own folder, with the commands of a fresh copy of the repository."""

    def __init__(self, folder: Path) -> None:
        """folder: new or empty. The copy goes into `repository`, the user's files into `home`."""
        self.repository = folder / "repository"
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        copy_tracked_files(self.repository)
        self.steps: list[Step] = []
        self.environment = os.environ | {
            "PYTHONPATH": str(self.repository),
            "PYTHONWARNINGS": "",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "80",
        }

    def does(self, *words: object, code: int = 0, **environment: str) -> Outcome:
        """Runs `megaconsa WORDS`, which must end with this exit code and without a traceback."""
        started = time.monotonic()
        ended = subprocess.run(
            self._command(words),
            cwd=self.home,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STEP_SECONDS,
            check=False,
        )
        outcome = Outcome(ended.returncode, ended.stdout, ended.stderr)
        self._note(words, outcome, started)
        assert outcome.code == code, self._told(words, outcome)
        assert TRACEBACK not in outcome.out + outcome.err, self._told(words, outcome)
        return outcome

    def refused(self, expected: str, *words: object) -> None:
        """Runs a command that must be refused, in one line that holds `expected`."""
        outcome = self.does(*words, code=REFUSED)
        assert outcome.err.startswith("error: "), self._told(words, outcome)
        assert outcome.err.count("\n") == 1, self._told(words, outcome)
        assert expected in outcome.err, self._told(words, outcome)

    def all_refused(self, *cases: tuple[object, ...]) -> None:
        """Runs refusals side by side. Each is (expected, *words). None may write a file."""
        before = self.files()
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            list(pool.map(lambda case: self.refused(*map(str, case)), cases))
        assert self.files() == before

    def interrupted(self, until: Callable[[str], bool], *words: object) -> Outcome:
        """Runs a command and presses Ctrl-C once `until` holds for what it has printed."""
        started = time.monotonic()
        printed = self.home / "printed.txt"
        with printed.open("w") as file:
            process = subprocess.Popen(
                self._command(words),
                cwd=self.home,
                # Without this variable Python would hold the lines back.
                env=self.environment | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # A terminal sends Ctrl-C to the whole group of processes.
                start_new_session=True,
                # A shell lets its background jobs ignore Ctrl-C, and they pass that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            while process.poll() is None and not until(printed.read_text()):
                assert time.monotonic() - started < STEP_SECONDS, printed.read_text()
                time.sleep(0.05)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            code = process.wait(timeout=STEP_SECONDS)
        outcome = Outcome(code, printed.read_text(), "")
        printed.unlink()
        self._note((*words, "(Ctrl-C)"), outcome, started)
        assert TRACEBACK not in outcome.out, self._told(words, outcome)
        return outcome

    def runs_python(self, script: str, name: str) -> str:
        """Runs a script in the user's folder, without megaconsa. Returns what it prints."""
        started = time.monotonic()
        environment = self.environment | {"PYTHONPATH": ""}
        ended = subprocess.run(
            [sys.executable, "-c", script],
            cwd=self.home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=STEP_SECONDS,
            check=False,
        )
        outcome = Outcome(ended.returncode, ended.stdout, ended.stderr)
        self.steps.append(Step(name, outcome.code, time.monotonic() - started))
        assert outcome.code == 0, f"{name}\n{outcome.err}"
        return outcome.out

    def reads_json(self, path: str) -> Any:
        return json.loads((self.home / path).read_text())

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The metrics of a run."""
        lines = (self.home / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def files(self) -> set[Path]:
        return {path for path in self.home.rglob("*") if path.is_file()}

    def commands(self) -> set[str]:
        """The names of the commands that were run."""
        return {step.text.split()[1] for step in self.steps if step.text.startswith("megaconsa ")}

    def listing(self) -> str:
        """The steps with their exit codes and seconds, one per line."""
        lines = [f"{step.seconds:6.1f} s  {step.code:3}  {step.text}" for step in self.steps]
        total = sum(step.seconds for step in self.steps)
        return "\n".join([*lines, f"{total:6.1f} s  {len(self.steps)} steps"])

    def _command(self, words: tuple[object, ...]) -> list[str]:
        command = Path(sys.executable).with_name("megaconsa")
        return [str(command), *map(str, words)]

    def _note(self, words: tuple[object, ...], outcome: Outcome, started: float) -> None:
        text = " ".join(["megaconsa", *map(str, words)])
        self.steps.append(Step(text, outcome.code, time.monotonic() - started))

    def _told(self, words: tuple[object, ...], outcome: Outcome) -> str:
        command = " ".join(map(str, words))
        return f"$ megaconsa {command}\nexit code {outcome.code}\n{outcome.out}{outcome.err}"


def copy_tracked_files(folder: Path) -> None:
    """Copies what a clone would hold: the tracked files, as they are in the work tree now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_symlink() or source.exists():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
