"""What a run reads: looked at, and refused where it cannot work, before anything is written or built."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.config import Config, differences
from megaconsa.consa.allocation import Allocation
from megaconsa.data.shards import DatasetInfo
from megaconsa.errors import InputError
from megaconsa.kernels import Problem, choose_backend
from megaconsa.model.config import ModelConfig
from megaconsa.parallel.sharding import Sharding
from megaconsa.parallel.topology import Topology

CONFIG_NAME = "config.yaml"
FREE = {"logging", "checkpoint", "validation", "run.dir", "data.workers", "data.path", "attention.backend"}
"""Sections and fields that may change on resume: they do not change what is computed, the backend but for rounding."""
SMALLEST_SHARE_OF_VOCABULARY = 0.9
"""Qwen3 pads its embedding beyond its tokenizer by 0.2 %; a table that is larger by far belongs to another tokenizer."""


@dataclass(frozen=True)
class Inputs:
    """A run's checked inputs."""

    config: Config
    shape: ModelConfig
    data: DatasetInfo
    topology: Topology
    allocation: Allocation | None
    """None while learning."""
    resume: Checkpoint | None
    """The run's own newest checkpoint."""
    origin: Checkpoint | None
    """What model.init_from names; not read again once the run has a checkpoint of its own."""


def check_inputs(config: Config, processes: int = 1) -> Inputs:
    """Reads and checks what the configuration points to, for so many processes; raises InputError. Writes nothing."""
    shape = config.shape()
    topology = Topology.of(config, processes)
    data = DatasetInfo.load(config.data.path)
    _check_data(config, shape, data)
    allocation = config.fixed_allocation()
    if allocation is not None and allocation.window != config.attention.window:
        raise InputError(
            f"attention.window={config.attention.window}, but allocation.file={config.allocation.file} was made for a window of "
            f"{allocation.window}"
        )
    _check_backend(config, shape, allocation)
    _check_folder(config.run.dir)
    if config.logging.wandb and find_spec("wandb") is None:
        raise InputError(
            f"logging.wandb={config.logging.wandb} needs the package wandb; install it with pip install 'megaconsa[wandb]'"
        )
    resume = store.newest(config.run.dir)
    _check_existing_run(config, resume)
    if resume is not None and resume.state["data"] != describe_data(data):
        raise InputError(
            f"data.path={config.data.path} holds other data than run {config.run.dir} was trained on; give it its own run.dir"
        )
    if resume is not None and resume.allocation is not None and resume.allocation.full != (allocation and allocation.full):
        raise InputError(
            f"allocation.file={config.allocation.file} has changed since run {config.run.dir} began; choose another run.dir"
        )
    _check_precision(config, resume)
    origin = None
    if config.model.init_from is not None and resume is None:
        origin = store.resolve(config.model.init_from)
        _check_origin(config, shape, data, origin)
    return Inputs(config, shape, data, topology, allocation, resume, origin)


def _check_data(config: Config, shape: ModelConfig, data: DatasetInfo) -> None:
    if data.sequence_length != config.training.sequence_length:
        raise InputError(
            f"training.sequence_length={config.training.sequence_length}, but data {config.data.path} was packed into sequences of "
            f"{data.sequence_length}; change one of them"
        )
    if not shape.vocab_size * SMALLEST_SHARE_OF_VOCABULARY <= data.vocab_size <= shape.vocab_size:
        raise InputError(
            f"data {config.data.path} was tokenised with a vocabulary of {data.vocab_size}, but the model has {shape.vocab_size}; "
            f"prepare it with the model's tokenizer, or set model.vocab_size={data.vocab_size} to train a model of its own"
        )


def _check_backend(config: Config, shape: ModelConfig, allocation: Allocation | None) -> None:
    """Refuses an attention backend that cannot serve some layer of the run on this machine."""
    ranks = config.parallel.tensor
    window, length, kv_heads = config.attention.window, config.training.sequence_length, shape.num_key_value_heads // ranks
    if allocation is None:
        # Validation runs the binarised table, whose rows may mix windows.
        kinds = {((window,) * kv_heads, True), ((length,) + (window,) * (kv_heads - 1), False)}
    else:
        shardings = [Sharding(shape, allocation, rank, ranks) for rank in range(ranks)]
        layers = range(shape.num_hidden_layers)
        kinds = {
            (tuple(allocation.windows(layer)[head] for head in sharding.own_heads(layer)), False)
            for sharding in shardings
            for layer in layers
        }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for windows, gated in sorted(kinds):
        problem = Problem(
            device=device,
            dtype=torch.bfloat16 if config.training.in_bf16(device.type) else torch.float32,
            batch=config.training.micro_batch,
            length=length,
            heads=shape.num_attention_heads // ranks,
            kv_heads=kv_heads,
            head_dim=shape.head_dim,
            windows=windows,
            gated=gated,
            packed=config.attention.separate_documents,
            scale=shape.head_dim**-0.5,
        )
        try:
            choose_backend(config.attention.backend, problem)
        except ValueError as error:
            raise InputError(f"attention.backend={config.attention.backend}: {error}") from None


def _check_folder(run: Path) -> None:
    """Refuses a run folder that cannot be made or written."""
    nearest = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"run.dir={run} cannot be made: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"run.dir={run} cannot be written: no permission for {nearest}")


def _check_existing_run(config: Config, resume: Checkpoint | None) -> None:
    """Refuses a run folder that was made with another configuration: its checkpoint's, or its config.yaml's before there is one."""
    if resume is not None:
        old = resume.state["config"]
    else:
        try:
            old = yaml.safe_load((config.run.dir / CONFIG_NAME).read_text())
        except (OSError, yaml.YAMLError):
            return
        if not isinstance(old, dict):  # torn by a crash, and nothing was trained: it starts clean
            return
    changed = [
        line for line in differences(old, config.to_dict()) if line.split(".")[0] not in FREE and line.split(":")[0] not in FREE
    ]
    if changed:
        raise InputError(
            f"run.dir={config.run.dir} was made with another configuration ({'; '.join(changed)}); choose another run.dir"
        )


def _check_precision(config: Config, resume: Checkpoint | None) -> None:
    precision = "bf16" if config.training.in_bf16("cuda" if torch.cuda.is_available() else "cpu") else "fp32"
    if resume is not None and resume.state["precision"] != precision:
        raise InputError(
            f"run {config.run.dir} was trained in {resume.state['precision']}, but training.precision={config.training.precision} means "
            f"{precision} on this device; go on where it began, or use another run.dir"
        )


def _check_origin(config: Config, shape: ModelConfig, data: DatasetInfo, origin: Checkpoint) -> None:
    changed = differences(origin.state["shape"], asdict(shape))
    if changed:
        raise InputError(f"model.init_from={config.model.init_from} has another shape than the model ({'; '.join(changed)})")
    theirs = origin.state["data"]["tokenizer_fingerprint"]
    if theirs != data.tokenizer_fingerprint:
        raise InputError(
            f"data {config.data.path} was tokenised with another vocabulary (fingerprint {data.tokenizer_fingerprint}) than "
            f"model.init_from={config.model.init_from} was trained on ({theirs})"
        )


def describe_data(data: DatasetInfo) -> dict[str, Any]:
    """What identifies a data set in a checkpoint."""
    return data.model_dump(mode="json", exclude={"source": {"names"}})
