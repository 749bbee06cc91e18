"""Tensors by name in safetensors files: read and written one at a time, so that a model may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class TensorFiles(Mapping[str, Tensor]):
    """Reads a tensor when it is asked for, so that a model larger than memory can be gone through name by name."""

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

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._places[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it, without reading the tensor: BF16, F32 and so on."""
        return str(self._places[name].get_slice(name).get_dtype())


class MeanTensors(Mapping[str, Tensor]):
    """The mean of equally named tensors, each computed in fp64 when it is asked for and given in fp32."""

    def __init__(self, sources: Sequence[Mapping[str, Tensor]]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        total = sum(
            (source[name].double() for source in self._sources[1:]), self._sources[0][name].double()
        )
        return (total / len(self._sources)).to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources[0])

    def __len__(self) -> int:
        return len(self._sources[0])


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Those that weights have, by safetensors' names."""


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a safetensors file of tensors of one precision, each read when its turn comes; the library's writer wants all at once.

    shapes: name -> shape, in the order they are written. advance is told of bytes as they are written.
    The format: https://huggingface.co/docs/safetensors/index#format
    """
    code = next(name for name, each in DTYPES.items() if each == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == torch.Size(shape), name
            assert tensor.dtype == dtype, name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            advance(tensor.nbytes)
