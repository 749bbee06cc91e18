"""Reading and writing safetensors files one tensor at a time.

So a model may be larger than memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor


class Sliceable(Protocol):
    """A tensor, or what returns slices of one."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor: ...


class StoredTensor:
    """A tensor in a file. Only what a slice holds is read.

    safetensors would map the file into memory. The kernel reads megabytes around each part of a
    map, which for slices adds up to whole files. Here it reads what is asked for.
    """

    def __init__(self, path: Path, dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> None:
        """begin: where the tensor begins in the file, in bytes."""
        self.shape = shape
        self._dtype = dtype
        self._begin = begin
        self._file = path.open("rb", buffering=0)
        # The kernel must not read ahead.
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        """index: a slice of rows, and perhaps one of columns. Neither has a step.

        Raises OSError if the file cannot be read.
        """
        rows, *columns = index
        height, *inner = self.shape
        first, last, _ = rows.indices(height)
        row_bytes = math.prod(inner) * self._dtype.itemsize
        begin = self._begin + first * row_bytes
        if not columns:
            found = torch.empty((last - first, *inner), dtype=self._dtype)
            self._read(begin, found)
            return found
        width, *rest = inner
        left, right, _ = columns[0].indices(width)
        found = torch.empty((last - first, right - left, *rest), dtype=self._dtype)
        if right - left == width:
            self._read(begin, found)
            return found
        column_bytes = row_bytes // width
        begin += left * column_bytes
        places = [begin + number * row_bytes for number in range(len(found))]
        # The disk gets all requests at once. One after the other, each would wait for its answer.
        size = (right - left) * column_bytes
        for place in places:
            os.posix_fadvise(self._file.fileno(), place, size, os.POSIX_FADV_WILLNEED)
        for place, row in zip(places, found, strict=True):
            self._read(place, row)
        return found

    def _read(self, begin: int, tensor: Tensor) -> None:
        """Fills a contiguous tensor with the file's bytes from `begin` on."""
        left = tensor.flatten().view(torch.uint8).numpy().data
        while left:
            count = os.preadv(self._file.fileno(), [left], begin)
            if count == 0:
                raise OSError(errno.EIO, "ends too early", self._file.name)
            left = left[count:]
            begin += count


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several files by name. Each tensor is read when it is accessed.

    So a loop over the names can process a model that is larger than memory.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = {path: safe_open(path, "pt") for path in paths}
        self._paths = {
            name: path
            for path, file in self._files.items()
            for name in file.keys()  # noqa: SIM118
        }
        self._beginnings: dict[Path, dict[str, int]] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._paths[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def stored(self, name: str) -> StoredTensor:
        """The tensor, to be read in slices.

        Raises KeyError if there is none of this name, or if its dtype is not in DTYPES.
        """
        path = self._paths[name]
        if path not in self._beginnings:
            self._beginnings[path] = _beginnings(path)
        begin = self._beginnings[path][name]
        return StoredTensor(path, DTYPES[self.dtype(name)], self.shape(name), begin)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading the tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The tensor's dtype by safetensors' name (BF16, F32, ...), without reading the tensor."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        return self._files[self._paths[name]].get_slice(name)


class MeanTensors(Mapping[str, Tensor]):
    """The mean of equally named tensors.

    Each mean is computed when it is accessed, in fp64, and returned in fp32.
    """

    def __init__(self, sources: Sequence[Mapping[str, Tensor]]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        total = self._sources[0][name].double()
        for source in self._sources[1:]:
            total = total + source[name].double()
        return (total / len(self._sources)).to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources[0])

    def __len__(self) -> int:
        return len(self._sources[0])


def _beginnings(path: Path) -> dict[str, int]:
    """Where each tensor of a file begins, in bytes. The library does not tell.

    The file must have been opened by the library, which checks it.
    The format is described at https://huggingface.co/docs/safetensors/index#format
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The dtypes of weights, by safetensors' names."""


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a safetensors file of tensors of one dtype, and reads one tensor at a time.

    The library's own writer needs all tensors at once.
    The format is described at https://huggingface.co/docs/safetensors/index#format

    shapes: shape of each tensor by name, in the order of writing.
    read: returns the tensor of a name.
    advance: called with the number of bytes after each tensor is written.
    """
    with path.open("wb") as file:
        file.write(_header(shapes, dtype, 8))
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == torch.Size(shape), name
            assert tensor.dtype == dtype, name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            advance(tensor.nbytes)


@dataclass(frozen=True)
class Rows:
    """Names some rows of a tensor that several processes write to one file, each its own rows."""

    name: str
    shape: tuple[int, ...]
    """The whole tensor's."""
    first: int
    """The first row."""


PAGE = 4096
"""Bytes that a file system keeps together. No two processes write to the same page of a file, since
clients of a network file system could overwrite each other's part of it."""


def aligned_rows(shape: Sequence[int], count: float) -> int:
    """At least `count` rows of an fp32 tensor, so many that they end where a page ends."""
    step = PAGE // math.gcd(PAGE, math.prod(shape[1:]) * torch.float32.itemsize)
    return max(math.ceil(count / step), 1) * step


def write_rows(path: Path, rows: Rows, tensor: Tensor) -> int:
    """Writes rows of an fp32 tensor to their place in a file of this tensor alone.

    The file is created if it does not exist. It is a safetensors file once all rows are written.

    Returns the size of the file with all rows, in bytes.
    """
    assert tensor.dtype == torch.float32
    header = _header({rows.name: rows.shape}, tensor.dtype, PAGE)
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    begin = len(header) + rows.first * math.prod(rows.shape[1:]) * tensor.dtype.itemsize
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        if rows.first == 0:
            _write(file, header, 0)
        _write(file, content, begin)
    return len(header) + math.prod(rows.shape) * tensor.dtype.itemsize


def _write(file: FileIO, content: bytes | memoryview, begin: int) -> None:
    left = memoryview(content)
    while left:
        count = os.pwrite(file.fileno(), left, begin)
        left = left[count:]
        begin += count


def _header(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, multiple: int) -> bytes:
    """What a safetensors file of these tensors begins with, padded to a multiple of bytes."""
    code = next(name for name, each in DTYPES.items() if each == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin = end
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % multiple)
    return len(encoded).to_bytes(8, "little") + encoded
