"""Cutting the source files into pieces, which processes read independently of each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from megaconsa.data import source_store
from megaconsa.data.documents import reading
from megaconsa.data.formats import is_compressed, open_bytes
from megaconsa.data.megatron_file import MegatronFile
from megaconsa.data.sources import SourceFile

PIECE_BYTES = 32 << 20
"""Bytes on disk that a piece has at least, unless its source ends."""


@dataclass(frozen=True)
class Piece:
    """Some files of one source, or a part of one file."""

    source: str
    files: tuple[SourceFile, ...]
    size: int
    """In bytes on disk."""

    def key(self, settings: object) -> str:
        """A name that changes with the files and with the settings that they are read with.

        settings: anything that JSON can write.
        """
        parts = []
        for file in self.files:
            parts.append([*identity(file), file.begin, file.end])
        return xxhash.xxh3_128_hexdigest(json.dumps([settings, parts]).encode())


def identity(file: SourceFile) -> list[object]:
    """Path, size and version of a file. They tell whether it was replaced.

    Those of its index follow, if it has one.
    """
    found: list[object] = []
    for path in (file.path, file.index):
        if path is not None:
            found += [str(path), *source_store.status(path)]
    return found


def cut(files: Iterable[SourceFile]) -> Iterator[Piece]:
    """Cuts files into pieces of about PIECE_BYTES, in order. Small files share a piece.

    Files of uncompressed lines, Parquet files and Megatron-LM's are divided. Others are not,
    because they can only be read from their beginning or are shards already. The pieces depend on
    the files alone, not on the machine.

    Raises InputError where a file is damaged.
    """
    held: list[SourceFile] = []
    size = 0
    for file in files:
        for part, part_size in _parts(file):
            if held and (size >= PIECE_BYTES or part.source != held[0].source):
                yield Piece(held[0].source, tuple(held), size)
                held = []
                size = 0
            held.append(part)
            size += part_size
    if held:
        yield Piece(held[0].source, tuple(held), size)


def _parts(file: SourceFile) -> Iterator[tuple[SourceFile, int]]:
    """The parts of a file, each with its bytes on disk."""
    with reading(file):
        size = source_store.status(file.path).size
        if size <= PIECE_BYTES:
            yield file, size
        elif file.format == "lines" and not is_compressed(file.path):
            for begin in range(0, size, PIECE_BYTES):
                end = min(begin + PIECE_BYTES, size)
                yield replace(file, begin=begin, end=end), end - begin
        elif file.format == "parquet":
            yield from _row_groups(file)
        elif file.format == "megatron":
            yield from _runs_of_documents(file)
        else:
            yield file, size


def _row_groups(file: SourceFile) -> Iterator[tuple[SourceFile, int]]:
    """Runs of row groups of a Parquet file, each with its bytes on disk."""
    from pyarrow import parquet

    with open_bytes(file.path) as opened:
        metadata = parquet.ParquetFile(opened).metadata
    begin = 0
    size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        is_last = group == metadata.num_row_groups - 1
        if size >= PIECE_BYTES or is_last:
            yield replace(file, begin=begin, end=group + 1), size
            begin = group + 1
            size = 0


def _runs_of_documents(file: SourceFile) -> Iterator[tuple[SourceFile, int]]:
    """Runs of documents of a Megatron-LM file, each with its bytes on disk."""
    assert file.index is not None
    before = MegatronFile(file.path, file.index).bytes_before()
    last = len(before) - 1
    begin = 0
    while begin < last:
        end = int(np.searchsorted(before, before[begin] + PIECE_BYTES))
        # A document of no bytes may stand at the beginning of a run.
        end = min(max(end, begin + 1), last)
        yield replace(file, begin=begin, end=end), int(before[end] - before[begin])
        begin = end
