"""A gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from megaconsa.parallel.deepspeed.engine import Engine


@contextmanager
def nan_in_a_gradient(engine: Engine) -> Iterator[None]:
    """Spoils the gradient of one norm.

    On a CPU, autograd has the gradients of norms. It has not those of the output head.
    """
    norm = next(weight for weight in engine.engine.module.parameters() if weight.dim() == 1)
    hook = norm.register_hook(lambda gradient: gradient * math.nan)
    try:
        yield
    finally:
        hook.remove()
