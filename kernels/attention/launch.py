"""Launch configurations of the Triton kernels, chosen by device and shape.

They come from launch.json and from an optional file of the user's. Both files nest architecture,
pass and shape:

    {"sm90": {"forward": {"16-bit/256":
        {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2}}}}

- An architecture is `sm` and the compute capability. `default` serves whatever is not listed, and
  fits the smallest shared memory, 99 KiB.
- A pass is `forward` or `backward`.
- A shape is the width of an element (`16-bit` or `fp32`), and head_dim rounded up to a power of
  two. The suffix `/gated` makes an entry for gated heads alone.

The shapes that the Hopper kernels serve (sm90, 16-bit/64 and /128) have no entry: see HOPPER. Where
those kernels cannot run, because a sequence has fewer queries than keys, `default` serves them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FILE_VARIABLE = "MEGACONSA_LAUNCH_FILE"
"""Environment variable that names the user's file. Its entries win over the packaged ones."""

PADDING = 128
"""Statistics are kept for this many queries or a multiple. block_m divides it in both passes."""


class Launch(NamedTuple):
    block_m: int
    """Queries per tile."""
    block_n: int
    """Keys per tile."""
    num_warps: int
    num_stages: int
    """Stages of the software pipeline that loads tiles ahead."""


Table = dict[str, dict[str, dict[str, Launch]]]
"""Launches by architecture, pass and shape."""

HOPPER = {"forward": Launch(128, 128, 8, 3), "backward": Launch(64, 128, 8, 2)}
"""Launches of the Hopper kernels, whose warps divide exactly these tiles. No file changes them."""

INTERPRETED = {"forward": Launch(64, 32, 4, 2), "backward": Launch(32, 32, 4, 1)}
"""Launches on a CPU. Warps and stages have no meaning there. The tiles are small, so that small
problems reach the edges of blocks."""

_forced: dict[str, Launch] = {}


def forward_launch(q: Tensor, *, gated: bool, hopper: bool) -> Launch:
    """The launch of the forward kernel for q (B, S, heads, D).

    hopper: whether the Hopper kernel runs.

    Raises ValueError where the user's file is missing or damaged.
    """
    forced = _forced.get("forward")
    return forced or _launch("forward", q.device, q.dtype, q.shape[-1], gated, hopper)


def backward_launch(q: Tensor, *, gated: bool, hopper: bool) -> Launch:
    """The launch of the backward kernel. Arguments and errors are those of `forward_launch`."""
    forced = _forced.get("backward")
    return forced or _launch("backward", q.device, q.dtype, q.shape[-1], gated, hopper)


@contextmanager
def forced(forward: Launch, backward: Launch) -> Iterator[None]:
    """Use these two launches for everything inside the context.

    They hold in all threads, because autograd runs backward passes in other threads.
    """
    _forced.update(forward=forward, backward=backward)
    try:
        yield
    finally:
        _forced.clear()


# Cached because it is called for every layer, and its results do not change while a process runs.
@lru_cache(maxsize=1024)
def _launch(
    step: str, device: torch.device, dtype: torch.dtype, head_dim: int, gated: bool, hopper: bool
) -> Launch:
    if hopper:
        return HOPPER[step]
    if device.type != "cuda":
        return INTERPRETED[step]
    capability = torch.cuda.get_device_capability(device)
    return find(launches(), capability, step, dtype, head_dim, gated=gated)


def on_hopper(q: Tensor, k: Tensor) -> bool:
    """Whether the Hopper kernels serve q (B, S, heads, D) and k."""
    if not q.is_cuda or q.shape[1] != k.shape[1]:
        return False
    return _on_hopper(q.device, q.dtype, q.shape[-1])


@lru_cache(maxsize=1024)
def _on_hopper(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    architecture = architecture_key(torch.cuda.get_device_capability(device))
    return is_fixed(architecture, shape_key(dtype, head_dim))


def find(
    table: Table,
    capability: tuple[int, int],
    step: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    gated: bool,
) -> Launch:
    """The table's launch for a pass of the kernels that run on every GPU.

    It is the most specific of the entries that serve the pass.

    An entry for the architecture comes before `default`, and inside each an entry for gated heads
    before one for all.

    capability: compute capability, (9, 0) for Hopper.
    step: `forward` or `backward`.

    Raises KeyError where no entry serves the pass.
    """
    architecture = architecture_key(capability)
    shape = shape_key(dtype, head_dim)
    keys = (f"{shape}/gated", shape) if gated else (shape,)
    for entries in (table.get(architecture, {}).get(step, {}), table["default"][step]):
        for key in keys:
            if key in entries:
                return entries[key]
    raise KeyError(f"no launch for {step} {shape}")


def architecture_key(capability: tuple[int, int]) -> str:
    """`sm90` for (9, 0)."""
    return f"sm{capability[0]}{capability[1]}"


def shape_key(dtype: torch.dtype, head_dim: int) -> str:
    """`16-bit/128` for bf16 or fp16 heads of 65 to 128. Kernels pad head_dim to a power of two."""
    width = "fp32" if dtype.itemsize == 4 else "16-bit"
    padded = max(16, 1 << (head_dim - 1).bit_length())
    return f"{width}/{padded}"


def is_fixed(architecture: str, shape: str) -> bool:
    """Whether the Hopper kernels serve the shape, so that its launches cannot be tuned."""
    return architecture == "sm90" and shape in ("16-bit/64", "16-bit/128")


@lru_cache(maxsize=1)
def launches() -> Table:
    """The packaged launches, overridden by those in the user's file. Both are read once.

    Raises ValueError, one sentence, for a missing or damaged file.
    """
    path = user_file()
    if path is None:
        return packaged()
    return merged(packaged(), read(path))


def user_file() -> Path | None:
    """The file that FILE_VARIABLE names, or None."""
    name = os.environ.get(FILE_VARIABLE)
    return Path(name) if name else None


def merged(table: Table, other: Table) -> Table:
    """Both tables in one. `other` wins where both have an entry."""
    result: Table = {}
    for source in (table, other):
        for architecture, steps in source.items():
            for step, entries in steps.items():
                result.setdefault(architecture, {}).setdefault(step, {}).update(entries)
    return result


def packaged() -> Table:
    """The launches in launch.json."""
    return _parse(files(__package__).joinpath("launch.json").read_text(encoding="utf-8"))


def read(path: Path) -> Table:
    """The launches in a user's file.

    Raises ValueError, one sentence, where the file cannot be read or an entry cannot be launched.
    """
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        fix = f"make it with megaconsa bench-attention --tune, or unset {FILE_VARIABLE}"
        raise ValueError(
            f"the launch file {path} cannot be read ({error.strerror}); {fix}"
        ) from None
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
        raise ValueError(
            f"the launch file {path} is damaged: {error}; correct or delete it, or unset "
            f"{FILE_VARIABLE}"
        ) from None


def to_text(table: Table) -> str:
    """The table as JSON, one launch per line."""

    def order(shape: str) -> list[str]:
        """Sorts head_dim by its value, not its digits."""
        return [part.zfill(3) for part in shape.split("/")]

    def on_one_line(launch: re.Match[str]) -> str:
        return "{" + " ".join(launch[1].split()) + "}"

    plain: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for architecture, steps in table.items():
        plain[architecture] = {}
        for step, entries in steps.items():
            shapes = sorted(entries, key=order)
            plain[architecture][step] = {shape: entries[shape]._asdict() for shape in shapes}
    innermost = r"\{([^{}]*)\}"
    return re.sub(innermost, on_one_line, json.dumps(plain, indent=1)) + "\n"


def _parse(text: str) -> Table:
    table: Table = {}
    for architecture, steps in _items(json.loads(text), r"sm\d{2,3}|default", "an architecture"):
        table[architecture] = {}
        for step, entries in _items(steps, "forward|backward", "a pass"):
            table[architecture][step] = {}
            pattern = r"(16-bit|fp32)/(16|32|64|128|256)(/gated)?"
            for shape, values in _items(entries, pattern, "a shape"):
                where = f"{architecture} {step} {shape}"
                if is_fixed(architecture, shape.removesuffix("/gated")):
                    raise ValueError(f"{where} is fixed")
                table[architecture][step][shape] = _parse_launch(values, where)
    return table


def _items(values: Any, pattern: str, kind: str) -> list[tuple[str, Any]]:
    """The items of a JSON object whose names all match the pattern. Raises ValueError otherwise."""
    if not isinstance(values, dict):
        raise ValueError(f"found {values!r}, expected an object")
    for name in values:
        if not re.fullmatch(pattern, name):
            raise ValueError(f"{name!r} is not {kind}")
    return list(values.items())


def _parse_launch(values: Any, where: str) -> Launch:
    if not isinstance(values, dict) or set(values) != set(Launch._fields):
        raise ValueError(f"{where} must have {', '.join(Launch._fields)}")
    if not all(type(value) is int and value > 0 for value in values.values()):
        raise ValueError(f"{where} must hold positive whole numbers")
    limits = (("block_m", 16, PADDING), ("block_n", 16, 1024), ("num_warps", 1, 32))
    for name, smallest, largest in limits:
        value = values[name]
        is_power_of_two = value & (value - 1) == 0
        if not is_power_of_two or not smallest <= value <= largest:
            raise ValueError(
                f"{where} has {name} {value}, not a power of two from {smallest} to {largest}"
            )
    return Launch(**values)
