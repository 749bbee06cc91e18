"""The fp32 gradients of DeepSpeed's BF16 optimizer as the buffers that the model adds to.

DeepSpeed itself takes bf16 gradients from autograd after each backward pass, and adds them with two
launches a weight. On a GPU the model's own backward passes add to the fp32 gradients instead
(`model/weight_gradients.py`). On a CPU a hook adds each gradient as soon as autograd has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megaconsa.model.weight_gradients import LISTENER, MAIN_GRAD, add_gradient

Listener = Callable[[Tensor], None]


def give_main_grads(optimizer: Any, listener: Listener | None, from_autograd: bool) -> None:
    """Gives each weight its part of the fp32 gradients.

    listener: called with a weight when a backward pass has added to its gradient.
    from_autograd: whether gradients that autograd gets are added. Otherwise a backward pass raises
        RuntimeError then, because all layers should add to the fp32 gradients themselves.
    """
    take = _add if from_autograd else _refuse
    for weights, gradients in zip(
        optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True
    ):
        for weight, gradient in zip(weights, gradients, strict=True):
            setattr(weight, MAIN_GRAD, gradient.view(weight.shape))
            if listener is not None:
                setattr(weight, LISTENER, listener)
            weight.register_post_accumulate_grad_hook(take)
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


def _add(weight: Tensor) -> None:
    if weight.grad is None:
        # torch also calls this where a backward pass returns no gradient.
        return
    add_gradient(weight, weight.grad)
    weight.grad = None


def _refuse(weight: Tensor) -> None:
    if weight.grad is None:
        return  # as above
    raise RuntimeError(
        f"a weight of shape {tuple(weight.shape)} got its gradient from autograd, where DeepSpeed "
        "does not look; its layer must add to main_grad (model/weight_gradients.py)"
    )


def _nothing(*arguments: Any, **named: Any) -> None:
    pass
