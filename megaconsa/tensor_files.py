"""Reading and writing safetensors files one tensor at a time.

So a model may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Only what a slice holds is read."""

    shape: tuple[int, ...]
    _slices: Any
    """What safetensors returns for slicing."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        found: Tensor = self._slices[index]
        return found


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several files by name. Each tensor is read when it is accessed.

    So a loop over the names can process a model that is larger than memory.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [safe_open(path, "pt") for path in paths]
        self._places = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def stored(self, name: str) -> StoredTensor:
        """The tensor, to be read in slices."""
        return StoredTensor(self.shape(name), self._places[name].get_slice(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading the tensor."""
        return tuple(self._places[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The tensor's dtype by safetensors' name (BF16, F32, ...), without reading the tensor."""
        return str(self._places[name].get_slice(name).get_dtype())


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
    code = next(name for name, each in DTYPES.items() if each == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin = end
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # Pad the header to a multiple of 8 bytes.
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == torch.Size(shape), name
            assert tensor.dtype == dtype, name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            advance(tensor.nbytes)
