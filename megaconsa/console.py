"""What the commands share on the terminal: refused input as one line, and progress that is readable in a log file too."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megaconsa.errors import InputError, RunError, UnreachableError
from megaconsa.exit_codes import FAILED, LOST, REFUSED

console = Console(highlight=False, soft_wrap=True)
PLAIN_INTERVAL = 10.0
"""Seconds between two lines of progress where there is no terminal."""


class Task(Protocol):
    """One running piece of work, as `progress` yields it."""

    def advance(self, amount: float = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: float | None, unit: str = "") -> Iterator[Task]:
    """A progress bar on a terminal; elsewhere a plain line every ten seconds and one at the end."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn() if total is None or total > 1e5 else MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
            yield _RichTask(bar, bar.add_task(description, total=total, note=""))
    else:
        task = _PlainTask(description, total, unit)
        yield task
        task.finish()


class _RichTask:
    def __init__(self, bar: Progress, task: Any) -> None:
        self.bar, self.task, self.note = bar, task, ""

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.note = note or self.note
        self.bar.update(self.task, advance=amount, note=self.note)


class _PlainTask:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note, self.started = 0.0, "", time.monotonic()
        self.printed, self.printed_done = self.started, -1.0

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        if time.monotonic() - self.printed >= PLAIN_INTERVAL:
            self._print()

    def finish(self) -> None:
        if self.done != self.printed_done:
            self._print()

    def _print(self) -> None:
        self.printed, self.printed_done = time.monotonic(), self.done
        of = f"/{self.total:.12g}" if self.total is not None else ""
        note = f"  {self.note}" if self.note else ""
        console.print(
            f"{self.description}: {self.done:.12g}{of} {self.unit}  {self.printed - self.started:.0f} s{note}",
            markup=False,
        )


def check_out(path: Path) -> None:
    """Raises InputError where a file cannot be written at `path`: it is a folder, or lies below something that is none."""
    if path.is_dir():
        raise InputError(f"out={path} is a folder; name a file in it")
    for parent in path.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise InputError(f"out={path} cannot be written: {parent} is not a folder")


def end_on(faults: list[str]) -> None:
    """Prints what a check has found, a line each to stderr, and ends the command with exit code 1 if that is anything."""
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise typer.Exit(1)


def guarded(function: Callable[[], Any]) -> None:
    """Runs a command; an error meant for the user ends it with its sentence on stderr, and exit code 2 if the input was refused."""
    try:
        function()
    except InputError as error:
        _end(error, REFUSED)
    except UnreachableError as error:
        _end(error, LOST)
    except RunError as error:
        _end(error, FAILED)


def _end(error: Exception, code: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def run_tool(main: Callable[..., Any]) -> None:
    """Entry of `python tools/NAME.py`: the same command that `megaconsa NAME` runs."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(main)
    guarded(app)
