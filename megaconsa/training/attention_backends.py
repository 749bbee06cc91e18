"""Which attention backends a run's layers need: checked before the run, and named in its log."""

from __future__ import annotations

import torch

from megaconsa.config import Config
from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.kernels import Problem, choose_backend, find_backend
from megaconsa.model.config import ModelConfig
from megaconsa.parallel.sharding import Sharding


def check_backends(
    config: Config, model_config: ModelConfig, allocation: Allocation | None, device: torch.device
) -> None:
    """Raises InputError if the attention backend cannot run some layer on this machine.

    allocation: None while learning.
    """
    for problem in _problems(config, model_config, allocation, device):
        try:
            find_backend(config.attention.backend, problem)
        except ValueError as error:
            raise InputError(f"attention.backend={config.attention.backend}: {error}") from None


def log_backends(
    config: Config, model_config: ModelConfig, allocation: Allocation | None, device: torch.device
) -> None:
    """Logs what attention.backend=auto takes. The arguments are those of `check_backends`."""
    for problem in _problems(config, model_config, allocation, device):
        choose_backend(config.attention.backend, problem)


def _problems(
    config: Config, model_config: ModelConfig, allocation: Allocation | None, device: torch.device
) -> list[Problem]:
    """One problem for each kind of layer of this run. Gated layers come first."""
    ranks = config.parallel.tensor
    window = config.attention.window
    length = config.training.sequence_length
    kv_heads = model_config.num_key_value_heads // ranks
    # Each kind of layer is the windows of its KV heads on one rank, and whether it is gated.
    kinds: set[tuple[tuple[int, ...], bool]] = set()
    if allocation is None:
        # Training runs gated layers. Validation runs the binarised table, whose rows may mix
        # windows.
        kinds.add(((window,) * kv_heads, True))
        kinds.add(((length,) + (window,) * (kv_heads - 1), False))
    else:
        for rank in range(ranks):
            sharding = Sharding(model_config, allocation, rank, ranks)
            for layer in range(model_config.num_hidden_layers):
                windows = allocation.windows(layer)
                own = tuple(windows[head] for head in sharding.own_heads(layer))
                kinds.add((own, False))
    precision = torch.bfloat16 if config.training.in_bf16(device.type) else torch.float32
    return [
        Problem(
            device=device,
            dtype=precision,
            batch=config.training.micro_batch,
            length=length,
            heads=model_config.num_attention_heads // ranks,
            kv_heads=kv_heads,
            head_dim=model_config.head_dim,
            windows=windows,
            gated=gated,
            packed=config.attention.separate_documents,
            scale=model_config.head_dim**-0.5,
        )
        for windows, gated in sorted(kinds, key=lambda kind: (not kind[1], kind[0]))
    ]
