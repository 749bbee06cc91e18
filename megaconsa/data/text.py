"""Sources of documents: the standard library's source code, and the user's files and folders."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megaconsa.errors import InputError
from megaconsa.files import parse_json

PYTHON = "python"
"""The name of the source that is the standard library."""
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".jsonl")
_CODE_SUFFIXES = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh"),
    *(".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql"),
)
SUFFIXES = _TEXT_SUFFIXES + _CODE_SUFFIXES
"""Files with these suffixes are read from a folder. A file that is named itself is always read."""
ORDER_SEED = 0
"""Seed of the shuffled order of files."""


def python_sources() -> list[Path]:
    """The standard library's .py files, in a shuffled order that is the same on every machine.

    Third-party packages are left out. Test folders are left out too, because some distributions
    lack them, and because they hold files in deliberately broken encodings.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    # Relative paths, so that only folders inside the library can be left out.
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [file for file in files if left_out.isdisjoint(file.parts)]
    return [root / file for file in _shuffled(kept)]


def find_files(sources: Sequence[str]) -> list[Path]:
    """The files of all sources, source by source.

    sources: `python`, files or folders.

    The files of a folder come in a fixed shuffled order. Raises InputError for a source that does
    not exist or holds no text.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if source == PYTHON:
            found = python_sources()
        elif path.is_file():
            found = [path]
        elif path.is_dir():
            inside = []
            for file in path.rglob("*"):
                if file.suffix in SUFFIXES and file.is_file():
                    inside.append(file.relative_to(path))
            found = [path / file for file in _shuffled(inside)]
        else:
            raise InputError(
                f"source {source}: no such file or folder, "
                f"name text files, folders of them, or `{PYTHON}`"
            )
        if not found:
            raise InputError(
                f"source {source}: the folder holds no text files, "
                f"expected one of {' '.join(SUFFIXES)}"
            )
        files += found
    return files


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents, exactly as stored.

    A file is one document. A .jsonl file has one document per line, in the field `text`. Empty
    documents are skipped.

    Raises InputError, with file and place, where text is not UTF-8 or a line is not such JSON.
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
    """The documents of a .jsonl file."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = parse_json(line)["text"]
            except UnicodeDecodeError:
                raise  # it is a ValueError too, but `read_documents` has a message for it
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f'{file}, line {number}: expected a JSON object with a field "text", '
                    "fix the line"
                ) from error
            if not isinstance(text, str):
                raise InputError(
                    f'{file}, line {number}: field "text" is {type(text).__name__}, '
                    "make it a string"
                )
            try:
                # JSON can spell half a surrogate pair, which UTF-8 cannot hold.
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f'{file}, line {number}: field "text" has half a surrogate pair, fix the line'
                ) from error
            if text:
                yield text


def _shuffled(files: Iterable[Path]) -> list[Path]:
    """The files in a fixed shuffled order.

    They are sorted by name first, because file systems list them in different orders.
    """
    order = sorted(files, key=Path.as_posix)
    random.Random(ORDER_SEED).shuffle(order)
    return order
