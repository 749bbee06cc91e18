"""The fp32 gradients of DeepSpeed's BF16 optimizer as the buffers that the model adds to.

DeepSpeed itself takes bf16 gradients from autograd, and adds them with two launches a weight. On a
GPU the model's own backward passes add to the fp32 gradients instead (`model/weight_gradients.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megaconsa.model.weight_gradients import LISTENER, MAIN_GRAD
from megaconsa.parallel.deepspeed.gradient_reduction import GradientReduction


def give_main_grads(optimizer: Any, reduction: GradientReduction | None) -> None:
    """Gives each weight its part of the flat fp32 gradients.

    reduction: hears of each gradient that is added.

    A backward pass raises RuntimeError if autograd gets a gradient of a weight all the same.
    """
    for weights, gradients in zip(
        optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True
    ):
        for weight, gradient in zip(weights, gradients, strict=True):
            setattr(weight, MAIN_GRAD, gradient.view(weight.shape))
            if reduction is not None:
                setattr(weight, LISTENER, reduction.added)
            weight.register_post_accumulate_grad_hook(_refuse)
            # By this name DeepSpeed finds the gradients that it sums over tied weights.
            weight._hp_grad = gradient
    # Autograd keeps no gradients, so there are none to add or to clear after each micro-batch.
    optimizer.update_hp_grads = _nothing
    optimizer.clear_lp_grads = _nothing
    # Its step has set the fp32 gradients to 0 already.
    optimizer.zero_grad = _nothing


def expect_gradients(optimizer: Any) -> None:
    """Tells the optimizer before a step that each weight will have a gradient.

    It only knows of gradients that it has added itself, and leaves the others out of the norm.
    """
    for known in optimizer.fp32_groups_has_gradients:
        known[:] = [True] * len(known)


def _refuse(weight: Tensor) -> None:
    if weight.grad is None:
        # torch also calls this where a backward pass returns no gradient.
        return
    raise RuntimeError(
        f"a weight of shape {tuple(weight.shape)} got its gradient from autograd, where DeepSpeed "
        "does not look; its layer must add to main_grad (model/weight_gradients.py)"
    )


def _nothing(*arguments: Any, **named: Any) -> None:
    pass
