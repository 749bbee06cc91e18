"""The backends of hybrid attention: what each serves, and which one serves a call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megaconsa.kernels.attention import flash, flash_library, reference, sdpa
from megaconsa.kernels.attention.head_pattern import HeadPattern
from megaconsa.kernels.attention.problem import Problem

logger = logging.getLogger(__name__)

GATED_FLASH_LENGTH = 4096
"""Tokens of a sequence from which gated heads go to FlashAttention, if documents are not packed."""
CLOSED_FLASH_LENGTH = 32768
"""The same where more than a quarter of the gates are closed."""

Attention = Callable[[Tensor, Tensor, Tensor, HeadPattern, Tensor | None, float], Tensor]
"""(q, k, v, heads, documents, scale) -> out, as `reference.attention`"""


@dataclass(frozen=True)
class Backend:
    name: str
    refusal: Callable[[Problem], str | None]
    """Why it cannot serve a problem, as `cause; fix` in one sentence, or None."""
    attention: Attention
    allocated: str
    """How it computes a finished allocation, for the log."""
    gated: str
    """How it computes gated heads, for the log."""


def _refuse_triton(problem: Problem) -> str | None:
    if not _triton_is_installed():
        return "triton is not installed; install the package triton (Linux only) or take sdpa"
    from megaconsa.kernels.attention.triton import operators

    return operators.refusal(problem)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: HeadPattern,
    documents: Tensor | None,
    scale: float,
) -> Tensor:
    # Imported here, so that machines without triton can use the other backends.
    from megaconsa.kernels.attention.triton import operators

    return operators.attention(q, k, v, heads, documents, scale)


REFERENCE = Backend(
    "reference", reference.refusal, reference.attention, "explicit masks", "explicit masks"
)
SDPA = Backend(
    "sdpa",
    sdpa.refusal,
    sdpa.attention,
    "a call for each kind of head",
    "two calls for gated heads",
)
TRITON = Backend(
    "triton", _refuse_triton, _triton, "a window for each head in one pass", "gates in one pass"
)
FLASH = Backend(
    "flash",
    flash.refusal,
    flash.attention,
    "a call for each run of heads of a kind",
    "two calls for gated heads, where possible one for the window and one for the keys before it",
)

BACKENDS = {backend.name: backend for backend in (REFERENCE, SDPA, TRITON, FLASH)}


def choose_backend(name: str, problem: Problem) -> Backend:
    """The backend that runs the problem.

    name: a backend, or `auto` for the fastest by measurement that serves the problem. The log
        says what `auto` took and why, once for each backend and reason.

    Raises ValueError for an unknown name. Raises ValueError, with the refusal, for a backend that
    cannot serve the problem.
    """
    if torch.compiler.is_compiling():
        # Dynamo traces the choice. It has no use for a cache, and cannot hash a symbolic length.
        return _choose(name, problem)
    return _choose_once(name, problem)


def find_backend(name: str, problem: Problem) -> Backend:
    """As `choose_backend`, but logs nothing, for checks before a run."""
    return _find(name, problem)[0]


def _choose(name: str, problem: Problem) -> Backend:
    backend, because = _find(name, problem)
    if name == "auto":
        _say_once(backend.name, backend.gated if problem.gated else backend.allocated, because)
    return backend


_choose_once = lru_cache(maxsize=1024)(_choose)


def _find(name: str, problem: Problem) -> tuple[Backend, str]:
    """The backend, and for `auto` why it takes no faster one, as `, because ...` or nothing."""
    if name == "auto":
        return _automatic(problem)
    if name not in BACKENDS:
        raise ValueError(f"backend {name} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    refusal = BACKENDS[name].refusal(problem)
    if refusal is not None:
        raise ValueError(refusal)
    return BACKENDS[name], ""


def _automatic(problem: Problem) -> tuple[Backend, str]:
    """The first of the preferred backends that serves the problem. Reference serves everything."""
    causes: list[str] = []
    for backend in _preferred(problem):
        # Checked here and not left to the refusal: Triton's interpreter accepts a CPU, but is slow.
        on_gpu_only = backend is TRITON or backend is FLASH
        if on_gpu_only and problem.device.type != "cuda":
            refusal: str | None = f"{backend.name} needs a CUDA GPU"
        else:
            refusal = backend.refusal(problem)
        if refusal is None:
            because = f", because {' and '.join(causes)}" if causes else ""
            return backend, because
        causes.append(refusal.split(";")[0])
    return REFERENCE, ""


def _preferred(problem: Problem) -> tuple[Backend, ...]:
    """The backends by their measured speed on Hopper, fastest first.

    A finished allocation is faster as calls of FlashAttention, where that is installed and serves
    the problem, than as one launch of our kernel. So are gated heads in long sequences: the longer,
    the more heads may be closed, for which our kernel skips more work.

    Packed documents stay with our kernel. A run with flash-attn-4 4.0.0b36 was 4 % faster, but its
    loss after 9 steps lay 0.4 % above ours and torchtitan's, which agreed to 0.02 %.
    """
    if problem.packed:
        flash_is_faster = False
    elif problem.gated:
        mostly_open = problem.closed <= problem.kv_heads // 4
        least = GATED_FLASH_LENGTH if mostly_open else CLOSED_FLASH_LENGTH
        is_long = problem.length >= least
        flash_is_faster = is_long and flash_library.gates_were_measured(problem.device)
    else:
        flash_is_faster = True
    if flash_is_faster:
        return FLASH, TRITON, SDPA, REFERENCE
    return TRITON, FLASH, SDPA, REFERENCE


# Dynamo calls the next two functions while it traces instead of tracing into them, because they
# query the system and log.
@torch.compiler.assume_constant_result
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _say_once(name: str, manner: str, because: str) -> None:
    """Logs the choice of `auto`.

    Gated and finished heads that take one backend for one reason are one choice.
    """
    if (name, because) not in _said:
        _said.add((name, because))
        logger.info("attention.backend=auto takes %s: %s%s", name, manner, because)


_said: set[tuple[str, str]] = set()
