"""Terminal output that all commands share.

Refused input is one line. Progress is readable in a log file too.
"""

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
from megaconsa.files import binary_size, duration

console = Console(highlight=False, soft_wrap=True)
PLAIN_INTERVAL = 10.0
"""Seconds between two lines of progress if there is no terminal."""


@contextmanager
def messages_on_stderr(wanted: bool) -> Iterator[None]:
    """Prints messages and progress to stderr if `wanted`, to leave stdout to other programs."""
    before = console.stderr
    console.stderr = wanted or before
    try:
        yield
    finally:
        console.stderr = before


class Task(Protocol):
    """A piece of work that is in progress, as `progress` yields it."""

    def advance(self, amount: float = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: float | None, unit: str = "") -> Iterator[Task]:
    """Shows progress as a bar on a terminal.

    Elsewhere it prints a plain line every ten seconds and one at the end.

    total: amount of work in `unit`. None if it is unknown.
    """
    if console.is_terminal:
        is_percentage = total is None or total > 1e5
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn() if is_percentage else MofNCompleteColumn(),
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
        self.bar = bar
        self.task = task
        self.note = ""

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.note = note or self.note
        self.bar.update(self.task, advance=amount, note=self.note)


class _PlainTask:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.note = ""
        self.started = time.monotonic()
        self.first: tuple[float, float] | None = None
        """Seconds and work after the first advance. A resumed run begins with one large advance."""
        self.printed = self.started
        """When the last line was printed."""
        self.printed_done = -1.0
        """The value of `done` in the last line. -1 before the first line."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        if self.first is None:
            self.first = (time.monotonic(), self.done)
        if time.monotonic() - self.printed >= PLAIN_INTERVAL:
            self._print()

    def finish(self) -> None:
        if self.done != self.printed_done:
            self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        self.printed_done = self.done
        seconds = self.printed - self.started
        note = f"  {self.note}" if self.note else ""
        console.print(
            f"{self.description}: {self._amount()}  {seconds:.0f} s{self._remaining()}{note}",
            markup=False,
        )

    def _amount(self) -> str:
        """The work that is done, and all of it if that is known."""
        if self.unit == "bytes":
            done = binary_size(self.done)
            return done if self.total is None else f"{done} of {binary_size(self.total)}"
        of = f"/{self.total:.0f}" if self.total is not None else ""
        return f"{self.done:.0f}{of} {self.unit}"

    def _remaining(self) -> str:
        """The remaining time at the speed since the first advance. Nothing if it is not known."""
        if self.total is None or self.first is None or self.done >= self.total:
            return ""
        began, already_done = self.first
        done = self.done - already_done
        if done <= 0:
            return ""
        seconds = (self.printed - began) / done * (self.total - self.done)
        return f", {duration(seconds)} to go"


def check_out(path: Path) -> None:
    """Raises InputError if `path` is a folder, or lies below something that is not a folder.

    A file cannot be written there.
    """
    if path.is_dir():
        raise InputError(f"out={path} is a folder; name a file in it")
    _check_parents(path)


def check_new_folder(path: Path) -> None:
    """Raises InputError if `path` exists, or lies below something that is not a folder."""
    if path.exists():
        raise InputError(f"out={path} exists; choose another folder or remove it")
    _check_parents(path)


def _check_parents(path: Path) -> None:
    for parent in path.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise InputError(f"out={path} cannot be written: {parent} is not a folder")


def end_on(faults: list[str]) -> None:
    """Prints the faults that a check has found to stderr, one per line.

    Ends the command with exit code 1 if there are any.
    """
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise typer.Exit(1)


def guarded(function: Callable[[], Any]) -> None:
    """Runs a command.

    An error that is meant for the user ends the command with one sentence on stderr. The exit code
    is REFUSED for a refused input, LOST for something unreachable, and FAILED for other errors.
    """
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
    """Entry point of `python tools/NAME.py`. It runs the same command as `megaconsa NAME`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command()(main)
    guarded(app)
