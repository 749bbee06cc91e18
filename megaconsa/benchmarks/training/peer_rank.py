"""The process of `megaconsa bench-training` that trains with a peer.

The tool starts it as

    python -m megaconsa.benchmarks.training.peer_rank CONFIG OUT PEER [section.field=value ...]

It writes what the module rank writes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaconsa import config as configuration
from megaconsa.benchmarks.training.peers import PeerModel
from megaconsa.console import guarded
from megaconsa.data.stream import Batch, BatchStream
from megaconsa.files import replace_text
from megaconsa.model.flops import peak_flops, training_flops
from megaconsa.model.initialize import initial_weight
from megaconsa.model.loss import IGNORED
from megaconsa.model.qwen3 import weight_shapes
from megaconsa.parallel.deepspeed.optimizer import EPSILON, parameter_groups
from megaconsa.training.batches import document_lengths
from megaconsa.training.inputs import Inputs, check_inputs
from megaconsa.training.learning_rate import learning_rate
from megaconsa.training.trainer import peak_memory_gib


def main(config_path: Path, out: Path, name: str, overrides: list[str]) -> None:
    inputs = check_inputs(configuration.load(config_path, overrides))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(inputs.config.run.seed)
    # Only the packages of this peer need to be installed.
    module = import_module(f"megaconsa.benchmarks.training.{name}_peer")
    peer = module.build(inputs, starting_weights(inputs), device)
    rows = list(train(inputs, peer, device))
    result = {"rows": rows, "memory_gib": peak_memory_gib(device), "device": device.type}
    replace_text(out, json.dumps(result))


def starting_weights(inputs: Inputs) -> dict[str, Tensor]:
    """The weights that our own trainer starts from: canonical name -> fp32 tensor."""
    shape = inputs.model_config
    seed = inputs.config.run.seed
    return {
        name: initial_weight(name, size, shape, seed) for name, size in weight_shapes(shape).items()
    }


def train(inputs: Inputs, peer: PeerModel, device: torch.device) -> Iterator[dict[str, Any]]:
    """Trains the configuration's steps. Yields a row of metrics for each, named as the trainer's.

    Batches, learning rate, weight decay and clipping are those of our own trainer.
    """
    training = inputs.config.training
    parameters = list(peer.model.parameters())
    optimizer = torch.optim.AdamW(
        parameter_groups(peer.model, training), betas=training.betas, eps=EPSILON, fused=True
    )
    batches = _stream(inputs).steps()
    for step in range(training.steps):
        began = time.perf_counter()
        micro_batches = next(batches)
        labelled = sum(int((batch.labels != IGNORED).sum()) for batch in micro_batches)
        losses = []
        for batch in micro_batches:
            loss = peer.loss(_on(device, batch), labelled)
            loss.backward()
            losses.append(loss.detach())
        if training.gradient_clipping:
            nn.utils.clip_grad_norm_(parameters, training.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        optimizer.step()
        optimizer.zero_grad()
        # Reading the loss waits for the whole step, because the sum is queued behind it.
        total = float(torch.stack(losses).sum())
        seconds = time.perf_counter() - began
        yield {
            "step": step + 1,
            "tokens": (step + 1) * training.global_batch * training.sequence_length,
            "loss": total,
            "step_seconds": seconds,
            "mfu": _mfu(inputs, micro_batches, seconds, device),
        }


def _stream(inputs: Inputs) -> BatchStream:
    """The batches of our own trainer in one process."""
    config = inputs.config
    return BatchStream(
        config.data.path,
        seed=config.run.seed,
        global_batch=config.training.global_batch,
        micro_batch=config.training.micro_batch,
        workers=config.data.workers,
        separate_documents=config.attention.separate_documents,
        shuffle_shards=config.data.shuffle_shards or 0,
        cache=config.data.cache_settings,
    )


def _on(device: torch.device, batch: Batch) -> Batch:
    """The batch with what a model reads on its device."""
    return replace(batch, tokens=batch.tokens.to(device), labels=batch.labels.to(device))


def _mfu(
    inputs: Inputs, batches: list[Batch], seconds: float, device: torch.device
) -> float | None:
    """Share of the GPU's peak. A peer computes full attention in every head."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    lengths = document_lengths(batches)
    flops = training_flops(inputs.model_config, None, int(lengths.sum()), lengths)
    return flops / seconds / peak


if __name__ == "__main__":
    guarded(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
