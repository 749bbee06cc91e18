"""Progress in a log file and on a terminal, and refused input as one line."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from megaconsa import console as console_module
from megaconsa.console import guarded, progress, run_tool
from megaconsa.errors import InputError, RunError


class Clock:
    """Replaces the module `time` and moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_module, "time", clock)
    return clock


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Returns what is printed where there is no terminal.

    The environment of the tests does not matter.
    """
    output = io.StringIO()
    monkeypatch.setattr(
        console_module,
        "console",
        Console(file=output, force_terminal=False, highlight=False, soft_wrap=True),
    )
    return output


def lines(output: io.StringIO) -> list[str]:
    return [" ".join(line.split()) for line in output.getvalue().splitlines()]


def test_plain_lines_every_ten_seconds_and_one_at_the_end(plain: io.StringIO, clock: Clock) -> None:
    with progress("packing", 40, "documents") as task:
        for second in range(25):
            clock.now = 100.0 + second
            task.advance(note="[half] full" if second == 3 else "")
        clock.now = 126.0
    assert lines(plain) == [
        "packing: 11/40 documents 10 s, 29 s to go [half] full",
        "packing: 21/40 documents 20 s, 19 s to go [half] full",
        "packing: 25/40 documents 26 s, 16 s to go [half] full",
    ]
    assert "\x1b" not in plain.getvalue()
    assert "\r" not in plain.getvalue()


def test_plain_lines_without_a_total(plain: io.StringIO, clock: Clock) -> None:
    with progress("reading", None, "documents") as task:
        task.advance(3)
        task.advance(4)
    assert lines(plain) == ["reading: 7 documents 0 s"]


def test_what_a_resumed_run_had_done_is_not_its_speed(plain: io.StringIO, clock: Clock) -> None:
    with progress("training", 1000, "steps") as task:
        task.advance(900)
        for _ in range(2):
            clock.now += 20.0
            task.advance(1)
    assert lines(plain)[-1] == "training: 902/1000 steps 40 s, 32 min 40 s to go"


def test_bytes_are_readable(plain: io.StringIO, clock: Clock) -> None:
    with progress("exporting", 3 * 2**30, "bytes") as task:
        task.advance(2**30)
        clock.now += 10.0
        task.advance(2**30)
        task.advance(2**30)
    first, last = lines(plain)
    assert first == "exporting: 2 GiB of 3 GiB 10 s, 10 s to go"
    assert last == "exporting: 3 GiB of 3 GiB 10 s"


def test_large_counts_keep_their_digits(plain: io.StringIO, clock: Clock) -> None:
    """A corpus has millions of documents."""
    with progress("packing", 23_456_789, "documents") as task:
        task.advance(12_345_678)
    assert "12345678/23456789 documents" in lines(plain)[0].replace(",", "")


def test_a_long_line_is_not_broken(plain: io.StringIO, clock: Clock) -> None:
    with progress("a" * 300, 1) as task:
        task.advance()
    assert len(lines(plain)) == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_what_the_body_raises_comes_out(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        console_module, "console", Console(file=io.StringIO(), force_terminal=terminal)
    )
    for error in (ValueError("bad"), KeyboardInterrupt(), InputError("refused")):
        with pytest.raises(type(error)) as caught, progress("reading", 2) as task:  # noqa: PT012
            task.advance()
            raise error
        assert caught.value is error


def test_a_body_that_raises_does_not_print_the_last_line(plain: io.StringIO) -> None:
    """The last line would look like the end of the work."""
    with pytest.raises(ValueError, match="bad"), progress("reading", 2):
        raise ValueError("bad")
    assert plain.getvalue() == ""


def test_a_terminal_shows_a_bar_with_the_last_note(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(
        console_module, "console", Console(file=output, force_terminal=True, width=200)
    )
    with progress("training", 2, "steps") as task:
        task.advance(note="loss 3.14")
        task.advance()
    last = output.getvalue().rpartition("training")[2]
    assert "2/2" in last
    assert "loss 3.14" in last


def refuse() -> None:
    raise InputError("data.path=nowhere does not exist")


def test_refused_input_is_one_line_on_stderr_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        guarded(refuse)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: data.path=nowhere does not exist\n")


def test_a_failed_run_is_one_line_on_stderr_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RunError("shard 3 is damaged")

    with pytest.raises(SystemExit) as caught:
        guarded(fail)
    assert caught.value.code == 1
    assert capsys.readouterr() == ("", "error: shard 3 is damaged\n")


def test_guarded_leaves_everything_else_alone() -> None:
    guarded(lambda: None)
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)
    for code in (0, 75):
        with pytest.raises(SystemExit) as caught:
            guarded(lambda code=code: sys.exit(code))  # type: ignore[misc]
        assert caught.value.code == code


def test_a_tool_ends_with_2_for_refused_input_and_0_when_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = SimpleNamespace(count=0)

    def main(count: int) -> None:
        seen.count = count
        if count < 0:
            refuse()

    for argument, code, message in (
        ("3", 0, ""),
        ("--", 2, "Missing argument"),
        ("three", 2, "Invalid value"),
        ("-- -3", 2, "error: data.path=nowhere does not exist\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["tool", *argument.split()])
        with pytest.raises(SystemExit) as caught:
            run_tool(main)
        assert caught.value.code == code
        assert message in capsys.readouterr().err
    assert seen.count == -3
