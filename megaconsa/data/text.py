"""Where documents come from: the standard library's own sources, and text files and folders of the user's."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megaconsa.errors import InputError
from megaconsa.files import parse_json

PYTHON = "python"
"""The source that stands for the standard library."""
SUFFIXES = (
    *(".txt", ".md", ".rst", ".tex", ".html", ".jsonl"),
    *(
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".cuh",
        ".java",
        ".js",
        ".ts",
        ".go",
        ".rs",
        ".rb",
        ".sh",
        ".sql",
    ),
)
"""What is read from a folder; a file that is named itself is read whatever its suffix."""
ORDER_SEED = 0


def python_sources() -> list[Path]:
    """The standard library's .py files, in a shuffled order that is the same on every machine.

    Without third-party packages, and without the test folders, which some distributions leave out and which hold files in
    deliberately broken encodings.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [
        root / file for file in _shuffled(file for file in files if not left_out & set(file.parts))
    ]


def find_files(sources: Sequence[str]) -> list[Path]:
    """The files of all sources (`python`, files, folders), source by source, each folder's in a fixed shuffled order.

    InputError for a source that does not exist or holds no text.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if source == PYTHON:
            found = python_sources()
        elif path.is_file():
            found = [path]
        elif path.is_dir():
            inside = (
                file.relative_to(path)
                for file in path.rglob("*")
                if file.suffix in SUFFIXES and file.is_file()
            )
            found = [path / file for file in _shuffled(inside)]
        else:
            raise InputError(
                f"source {source}: no such file or folder, name text files, folders of them, or `{PYTHON}`"
            )
        if not found:
            raise InputError(
                f"source {source}: the folder holds no text files, expected one of {' '.join(SUFFIXES)}"
            )
        files += found
    return files


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents, exactly as stored: one a file, or of a .jsonl file the `text` of each line. Empty ones are passed over.

    InputError, with file and line, for what is not UTF-8 or not such JSON.
    """
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _read_lines(file)
            elif text := file.read_bytes().decode("utf-8-sig"):
                yield text
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file}: not UTF-8 at byte {error.start}, convert the file or leave it out"
            ) from error
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read ({error.strerror}), make it readable or leave it out"
            ) from error


def _read_lines(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = parse_json(line)["text"]
            except UnicodeDecodeError:
                raise
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f'{file}, line {number}: expected a JSON object with a field "text", mend the line'
                ) from error
            if not isinstance(text, str):
                raise InputError(
                    f'{file}, line {number}: field "text" is {type(text).__name__}, make it a string'
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f'{file}, line {number}: field "text" has half a surrogate pair, mend the line'
                ) from error
            if text:
                yield text


def _shuffled(files: Iterable[Path]) -> list[Path]:
    """Sorted by name first: what the file system lists in whatever order comes out in one."""
    order = sorted(files, key=Path.as_posix)
    random.Random(ORDER_SEED).shuffle(order)
    return order
