"""Tensors by name that lie in several safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


class MeanTensors(Mapping[str, Tensor]):
    """The mean of equally named tensors, each computed in fp64 when it is asked for and given in fp32."""

    def __init__(self, sources: Sequence[Mapping[str, Tensor]]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        total = sum((source[name].double() for source in self._sources[1:]), self._sources[0][name].double())
        return (total / len(self._sources)).to(torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources[0])

    def __len__(self) -> int:
        return len(self._sources[0])
