"""The files of the user's sources: which of them hold documents, and which are passed over."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megaconsa.data import source_store
from megaconsa.data.dataset_info import INFO
from megaconsa.data.formats import INDEXED, Format, recognise
from megaconsa.data.mds_index import shard_records
from megaconsa.errors import InputError

PYTHON = "python"
"""The name of the source that is the standard library."""
ORDER_SEED = 0
"""Seed of the shuffled order of files."""
CARDS = ("readme", "license", "licence", "notice", "copying", "changelog", "citation")
"""Names, without suffix, of text files that describe a folder of data and do not belong to it."""


@dataclass(frozen=True)
class SourceFile:
    """A file that holds documents, or a part of such a file."""

    path: Path
    """A RemotePath if the file is in an object store."""
    format: Format
    source: str = ""
    """The source that it belongs to, as the user named it."""
    begin: int = 0
    """First byte of a file of lines, first row group of a Parquet file, or first document of a
    Megatron-LM file."""
    end: int | None = None
    """End of the part, not included. None: the end of the file.

    A line belongs to the part in which it begins.
    """
    index: Path | None = None
    """The file that says where the documents are, in formats that have one."""


@dataclass(frozen=True)
class SkippedFile:
    """A file of a folder that is not read."""

    path: Path
    reason: str


@dataclass
class SourceFiles:
    """The files of all sources, source by source."""

    files: list[SourceFile] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)


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


def find_files(sources: Sequence[str]) -> SourceFiles:
    """Finds the files of all sources.

    sources: `python`, files or folders, on a disk or in an object store.

    A file that is named itself is always read, as text where its format is not recognised. The
    files of a folder come in a fixed shuffled order. Links are followed. Hidden files and folders
    are not looked at.

    Raises InputError for a source that does not exist or holds no documents. Raises
    UnreachableError for a store that stays away.
    """
    source_store.forget()
    found = SourceFiles()
    for source in sources:
        path = source_store.path_of(source)
        before = len(found.files)
        if source == PYTHON:
            found.files += [SourceFile(file, "text", source) for file in python_sources()]
        elif source_store.is_file(path):
            found.files += _named(path, source)
        elif source_store.is_folder(path):
            _add_folder(found, path, source)
        else:
            raise InputError(
                f"source {source}: no such file or folder, "
                f"name files, folders of them, or `{PYTHON}`"
            )
        if len(found.files) == before:
            raise InputError(
                f"source {source}: the folder holds no files of documents "
                "(text, source code, JSON lines, Parquet, Arrow, Megatron-LM or MDS)"
            )
    return found


def _named(path: Path, source: str) -> list[SourceFile]:
    """The files of documents that a file named by the user stands for."""
    index = path.with_suffix(".idx")
    if path.suffix == ".bin" and source_store.is_file(index) and _recognised(index) == "megatron":
        path = index
    known = _recognised(path)
    if known in INDEXED:
        return [SourceFile(data, known, source, index=path) for data in _indexed(path, known)]
    if known is None and path.suffix.lower() == ".json":
        raise InputError(f"{path}: expected one JSON object a line, it is one JSON value or none")
    return [SourceFile(path, known or "text", source)]


def _indexed(index: Path, known: Format) -> list[Path]:
    """The files that an index describes. Raises InputError where one is missing."""
    if known == "mds":
        if source_store.is_file(index.parent.parent / INFO):
            raise InputError(
                f"{index}: it belongs to a data folder of megaconsa, which is prepared already; "
                "give its sources, or name it in a mixture"
            )
        return list(shard_records(index))
    data = index.with_suffix(".bin")
    if not source_store.is_file(data):
        raise InputError(f"{data}: the file of {index.name} cannot be found, download it")
    return [data]


def _recognised(path: Path) -> Format | None:
    """The format of a file. Raises InputError where the file cannot be read."""
    try:
        return recognise(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}), make it readable or leave it out"
        ) from error


def _add_folder(found: SourceFiles, folder: Path, source: str) -> None:
    """Adds the files below a folder."""
    formats: dict[Path, Format] = {}
    indices: dict[Path, Path] = {}
    described: dict[Path, Format] = {}
    unknown: list[Path] = []
    for file in source_store.visible_files(folder):
        known = _recognised(folder / file)
        if known is None:
            unknown.append(file)
        elif known in INDEXED:
            for data in _indexed(folder / file, known):
                inner = Path(*data.relative_to(folder).parts)
                indices[inner] = folder / file
                described[inner] = known
        else:
            formats[file] = known
    # The bytes of such a file may look like any format.
    formats.update(described)
    for file in unknown:
        if file not in described:
            found.skipped.append(SkippedFile(folder / file, "its format is not known"))
    if set(formats.values()) - {"text"}:
        for file in [file for file in formats if formats[file] == "text" and _is_card(file)]:
            del formats[file]
            found.skipped.append(SkippedFile(folder / file, "it describes the data beside it"))
    for file in _shuffled(formats):
        index = indices.get(file)
        found.files.append(SourceFile(folder / file, formats[file], source, index=index))


def _is_card(file: Path) -> bool:
    return file.name.split(".")[0].lower() in CARDS


def _shuffled(files: Iterable[Path]) -> list[Path]:
    """The files in a fixed shuffled order.

    They are sorted by name first, because file systems list them in different orders.
    """
    order = sorted(files, key=Path.as_posix)
    random.Random(ORDER_SEED).shuffle(order)
    return order
