"""Slices of stored tensors are the tensors' own, and reading them reads nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaconsa.tensor_files import Rows, TensorFiles, aligned_rows, write_rows

LIMIT = 1.2
"""Bytes that may be read, as a multiple of those that are kept."""


def save(folder: Path, **tensors: Tensor) -> TensorFiles:
    """Writes each tensor to a file of its own, beside others."""
    paths = []
    for name, tensor in tensors.items():
        paths.append(folder / f"{name}.safetensors")
        save_file({"before": torch.ones(3), name: tensor}, paths[-1], {"format": "pt"})
    return TensorFiles(paths)


def bytes_read() -> tuple[int, int]:
    """Bytes that this process has read by system calls, and bytes that its reads took from disks.

    The second number includes what the kernel reads ahead. A file system in memory leaves it at 0.
    """
    lines = Path("/proc/self/io").read_text().splitlines()
    values = dict(line.split(": ") for line in lines)
    return int(values["rchar"]), int(values["read_bytes"])


def forget(path: Path) -> None:
    """Drops a file from the kernel's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = torch.randn(7, 12).to(dtype)
    vector = torch.randn(9).to(dtype)
    cube = torch.randn(4, 5, 6).to(dtype)
    files = save(tmp_path, matrix=matrix, vector=vector, cube=cube)
    stored = files.stored("matrix")
    assert stored.shape == (7, 12)
    for rows in (slice(0, 7), slice(2, 5), slice(6, 7), slice(3, 3)):
        assert torch.equal(stored[(rows,)], matrix[rows])
        for columns in (slice(0, 12), slice(0, 4), slice(5, 11), slice(4, 4)):
            assert torch.equal(stored[rows, columns], matrix[rows, columns])
    assert torch.equal(files.stored("vector")[(slice(2, 9),)], vector[2:])
    assert torch.equal(files.stored("cube")[slice(1, 3), slice(2, 4)], cube[1:3, 2:4])


def test_reads_the_slice_alone(tmp_path: Path) -> None:
    """The rows of the second tensor rank of four, and the columns.

    With readahead, a disk would deliver the whole file.
    """
    files = save(tmp_path, matrix=torch.randn(1024, 4096))
    stored = files.stored("matrix")
    for index in ((slice(256, 512),), (slice(256, 512), slice(1024, 2048))):
        forget(tmp_path / "matrix.safetensors")
        called, delivered = bytes_read()
        kept = stored[index].nbytes
        called = bytes_read()[0] - called
        delivered = bytes_read()[1] - delivered
        assert kept <= called < LIMIT * kept
        # Each row's columns begin and end within a page of 4096 bytes.
        pages = 4096 * 256 if len(index) == 2 else 2 * 4096
        assert delivered <= kept + pages


def test_a_file_that_has_become_shorter(tmp_path: Path) -> None:
    stored = save(tmp_path, matrix=torch.randn(64, 64)).stored("matrix")
    os.truncate(tmp_path / "matrix.safetensors", 1000)
    with pytest.raises(OSError, match=r"ends too early.*matrix\.safetensors"):
        stored[(slice(32, 64),)]


@pytest.mark.parametrize("shape", [(300, 100), (64, 1024), (5,)])
def test_rows_make_a_file(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Blocks of rows are written in any order, each to pages of its own."""
    whole = torch.randn(shape)
    path = tmp_path / "whole.safetensors"
    step = aligned_rows(shape, 3)
    assert step * whole[0].numel() * 4 % 4096 == 0
    size = 0
    for first in reversed(range(0, len(whole), step)):
        part = whole[first : first + step]
        size = write_rows(path, Rows("exp_avg/whole", shape, first), part)
    assert path.stat().st_size == size
    assert (size - whole.nbytes) % 4096 == 0
    assert torch.equal(load_file(path)["exp_avg/whole"], whole)
