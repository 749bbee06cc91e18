"""The formats of source files: how a file is recognised and how its bytes are read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal, cast

from megaconsa.data import source_store
from megaconsa.data.mds_index import is_index
from megaconsa.data.megatron_file import MAGIC
from megaconsa.files import parse_json
from megaconsa.remote_path import RemotePath

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Format = Literal["text", "lines", "parquet", "arrow", "megatron", "mds"]
"""text: one document a file. lines: one JSON object a line. parquet, arrow: one document a row.

megatron: ids, with an index beside them. mds: a shard of an MDS folder, which has an index too.
"""
INDEXED: tuple[Format, ...] = ("megatron", "mds")
"""Formats whose documents are found through an index. The index is what is recognised."""
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html")
_CODE_SUFFIXES = (
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh"),
    *(".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql"),
)
_FORMATS: dict[str, Format] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    **dict.fromkeys(_TEXT_SUFFIXES + _CODE_SUFFIXES, "text"),
}
_COMPRESSIONS: dict[str, tuple[bytes, Callable[[Any], Any]]] = {
    ".gz": (b"\x1f\x8b", gzip.open),
    ".zst": (b"\x28\xb5\x2f\xfd", zstd.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\x00", lzma.open),
}
"""The first bytes and the opener of each compression. Truncated files raise EOFError."""
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
"""Exceptions of damaged compressed files. gzip and bz2 may also raise an OSError without errno."""
_LOOK_BYTES = 1 << 20
"""How much of a file is read to recognise its format."""


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file for reading and decompresses it. The compression shows in its first bytes.

    Reading raises one of DAMAGE where the file is damaged.
    """
    file = source_store.open_file(path)
    opener = _opener(file)
    if opener is None:
        return file
    if isinstance(path, RemotePath):
        # It would stay open behind the decompressed one, but holds nothing of the system.
        return cast(IO[bytes], opener(file))
    file.close()
    return cast(IO[bytes], opener(path))


def is_compressed(path: Path) -> bool:
    """Whether `open_bytes` decompresses the file."""
    with source_store.open_file(path) as file:
        return _opener(file) is not None


def _opener(file: IO[bytes]) -> Callable[[Any], Any] | None:
    """What decompresses the file, or None if it is not compressed. The file is at its beginning."""
    start = file.read(8)
    file.seek(0)
    for magic, opener in _COMPRESSIONS.values():
        if start.startswith(magic):
            return opener
    return None


def recognise(path: Path) -> Format | None:
    """The format of a file, or None for one that is none of them.

    The suffix decides where it is a known one, in upper or lower case and behind the suffix of a
    compression. Otherwise the content decides. It never decides for text, because any file could
    pass for text.

    Raises OSError where the file cannot be read.
    """
    name = path.name.lower()
    for suffix in _COMPRESSIONS:
        name = name.removesuffix(suffix)
    known = _FORMATS.get(Path(name).suffix)
    if known is not None:
        return known
    if is_index(path):
        return "mds"
    try:
        with open_bytes(path) as file:
            start = file.read(_LOOK_BYTES)
    except DAMAGE:
        return None
    except OSError as error:
        if error.errno is None:
            return None
        raise
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"ARROW1"):
        return "arrow"
    if start.startswith(MAGIC):
        return "megatron"
    return "lines" if _begins_with_an_object(start) else None


def _begins_with_an_object(start: bytes) -> bool:
    """Whether the first line that is not blank is a JSON object.

    start: the beginning of a file. A first line that is longer counts if it begins as an object.
    """
    line, *others = start.lstrip().split(b"\n", 1)
    if not line.startswith(b"{"):
        return False
    if not others and len(start) == _LOOK_BYTES:
        return True
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False
