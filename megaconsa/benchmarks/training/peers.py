"""The peers of `bench-training`: other trainers, on the same model shape and the same batches.

Each has a module that builds its model. The module peer_rank trains it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from megaconsa.config import Config
from megaconsa.data.stream import Batch
from megaconsa.errors import InputError

TITLES: dict[str, str] = {"liger": "transformers + Liger", "torchtitan": "torchtitan"}
# torchtitan's modules move between releases.
REQUIREMENTS: dict[str, str] = {"liger": "liger-kernel", "torchtitan": "torchtitan==0.2.2"}


@dataclass(frozen=True)
class PeerModel:
    """A peer's model on its device, ready to train."""

    model: nn.Module
    loss: Callable[[Batch, int], Tensor]
    """Takes a micro-batch on the model's device, and the labelled tokens of the global batch.

    Returns the micro-batch's summed cross-entropy, divided by that number.
    """


def installed_version(name: str) -> str:
    """The version of a peer's package.

    Raises InputError for an unknown peer, or if its package is missing or has a version that does
    not fit.
    """
    if name not in REQUIREMENTS:
        raise InputError(f"--peer {name} is not known; use {' or '.join(REQUIREMENTS)}")
    package, _, wanted = REQUIREMENTS[name].partition("==")
    remedy = f"install it with pip install {REQUIREMENTS[name]}"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise InputError(
            f"--peer {name} needs the package {package}, which is not installed; {remedy}"
        ) from None
    if wanted not in ("", found):
        raise InputError(
            f"--peer {name} needs {package} {wanted}, but {found} is installed; {remedy}"
        )
    return found


def obstacle(name: str, config: Config) -> str | None:
    """Why a peer cannot train a configuration on this machine. None if it can."""
    has_gpu = torch.cuda.is_available()
    separate = config.attention.separate_documents
    if config.model.init_from is not None:
        # Our trainer would go on in the data order of that run.
        return "it starts from random weights and the first batch; set model.init_from=null"
    if config.training.memory_gib is not None:
        return "it cannot recompute some layers only; set training.memory_gib=null"
    if name == "liger" and not has_gpu:
        return "its kernels need a GPU"
    if name == "liger" and separate:
        return (
            "without FlashAttention 2, transformers cannot hide packed documents from each other "
            "at a useful speed; set attention.separate_documents=false"
        )
    if name == "torchtitan" and separate and not has_gpu:
        return (
            "it hides packed documents from each other with FlexAttention, which trains on a GPU "
            "only; set attention.separate_documents=false"
        )
    return None
