"""The hard concrete distribution (Louizos et al. 2018, arXiv 1712.01312).

It is a stretched, clamped relaxation of a coin:

    u ~ U(0, 1)
    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)
    z = clamp(s (zeta - gamma) + gamma, 0, 1)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Draws z in [0, 1] elementwise. The result is differentiable in log_alpha.

    uniform: uniform numbers in (0, 1), both ends excluded.
    """
    # logit(u) = log u - log(1 - u)
    soft = ((uniform.logit() + log_alpha) / BETA).sigmoid()
    stretched = soft * (ZETA - GAMMA) + GAMMA
    return stretched.clamp(0, 1)


def probability_nonzero(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta))."""
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def probability_one(log_alpha: Tensor) -> Tensor:
    """P(z = 1) = sigmoid(log_alpha - beta log((1 - gamma) / (zeta - 1)))."""
    return (log_alpha - BETA * math.log((1 - GAMMA) / (ZETA - 1))).sigmoid()
