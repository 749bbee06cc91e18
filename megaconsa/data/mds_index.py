"""The index of an MDS folder that others wrote: which files hold its documents."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from megaconsa.data import source_store
from megaconsa.data.store_connections import Status
from megaconsa.errors import InputError
from megaconsa.files import parse_json

NAME = "index.json"
"""The name of every such index."""
TEXT = "str"
"""The encoding of texts."""
TOKEN_COLUMNS = ("tokens", "input_ids")
"""The usual names of a column of ids."""


def is_index(path: Path) -> bool:
    """Whether a file is the index of an MDS folder. Raises OSError where it cannot be read."""
    if path.name != NAME:
        return False
    try:
        shards = parse_json(source_store.read_bytes(path))["shards"]
        return all(shard["format"] == "mds" for shard in shards)
    except (ValueError, KeyError, TypeError):
        return False


def shard_records(index: Path) -> dict[Path, dict[str, Any]]:
    """What the index says about each shard, by the shard's file.

    The file is the compressed one, unless only the other one is there. The record is then that of a
    shard without compression. An index that merges those of several folders names their files.

    Raises InputError where a shard is missing, or where the index is damaged.
    """
    records = {}
    # One listing takes the place of a request for each shard.
    source_store.list_folder(index.parent)
    try:
        for record in parse_json(source_store.read_bytes(index))["shards"]:
            stored = _stored(index.parent, record)
            records[index.parent / (stored["zip_data"] or stored["raw_data"])["basename"]] = stored
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index}: not an index of MDS shards ({error!r}), download it again"
        ) from error
    return records


def shard_record(path: Path, index: Path) -> dict[str, Any]:
    """What the index says about the shard of that file. Raises as `shard_records` does."""
    return _records(index, source_store.status(index))[path]


@lru_cache(maxsize=8)
def _records(index: Path, status: Status) -> dict[Path, dict[str, Any]]:
    """The records of an index, which its shards share.

    status: of the index, so that another one is read again.
    """
    return shard_records(index)


def _stored(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of the file that is there. Raises InputError where none is."""
    if len(record["column_names"]) != len(record["column_encodings"]):
        raise ValueError("a shard has as many columns as encodings")
    for key in ("zip_data", "raw_data"):
        if record[key] is None:
            continue
        name = PurePosixPath(record[key]["basename"])
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"it names {str(name)!r}, which is no file of its folder")
        if source_store.is_file(folder / name):
            return (
                record if key == "zip_data" else {**record, "zip_data": None, "compression": None}
            )
    raise InputError(
        f"{folder / record['raw_data']['basename']}: shard cannot be found, "
        "download it or leave the folder out"
    )


def document_column(path: Path, record: dict[str, Any], field: str, usual: str) -> tuple[str, str]:
    """The column that holds the documents, and its encoding.

    path: names the shard in errors.
    field: the column that the user named. Where it is `usual`, which is the default, and is not
        there, a column of ids takes its place.

    Raises InputError where there is no such column, or where it holds neither texts nor ids.
    """
    encodings = dict(zip(record["column_names"], record["column_encodings"], strict=True))
    names = (field, *TOKEN_COLUMNS) if field == usual else (field,)
    for name in names:
        if name in encodings:
            kind = str(encodings[name])
            if kind.split(":")[0] not in (TEXT, "bytes", "ndarray"):
                raise InputError(
                    f'{path}: column "{name}" is stored as {kind}, '
                    "which is neither text nor ids; name another with --field"
                )
            return name, kind
    found = ", ".join(map(ascii, encodings)) or "none"
    raise InputError(f'{path}: it has no column "{field}" but {found}; name it with --field')
