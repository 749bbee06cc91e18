"""From a configuration to a trainer: everything a run needs is looked at, and refused, before anything is written or built."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import yaml

from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.config import Config, differences
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.gates import GateBank, GateSettings
from megaconsa.data.shards import DatasetInfo
from megaconsa.data.stream import Batch, BatchStream
from megaconsa.errors import InputError
from megaconsa.files import replace_text
from megaconsa.kernels import Problem, choose_backend
from megaconsa.model.config import ModelConfig
from megaconsa.parallel.engine import Engine
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.sharding import Sharding
from megaconsa.parallel.topology import Topology
from megaconsa.training.callbacks.base import Callback
from megaconsa.training.callbacks.checkpointing import Checkpointing
from megaconsa.training.callbacks.metrics_file import MetricsFile
from megaconsa.training.callbacks.run_lock import RunLock
from megaconsa.training.callbacks.stop_signals import StopSignals
from megaconsa.training.callbacks.validation import Validation
from megaconsa.training.trainer import Progress, Trainer

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
FREE = {"logging", "checkpoint", "validation", "run.dir", "data.workers", "data.path", "attention.backend"}
"""Sections and fields that may change on resume: they do not change what is computed, the backend but for rounding."""
NOTHING: list[Batch] = []
"""Batches of a rank where the pipeline does not begin."""
SMALLEST_SHARE_OF_VOCABULARY = 0.9
"""Qwen3 pads its embedding beyond its tokenizer by 0.2 %; a table that is larger by far belongs to another tokenizer."""


@dataclass(frozen=True)
class Inputs:
    """A run's checked inputs."""

    config: Config
    shape: ModelConfig
    data: DatasetInfo
    allocation: Allocation | None
    """None while learning."""
    resume: Checkpoint | None
    """The run's own newest checkpoint."""
    origin: Checkpoint | None
    """What model.init_from names; not read again once the run has a checkpoint of its own."""


def check_inputs(config: Config) -> Inputs:
    """Reads and checks what the configuration points to; raises InputError. Writes nothing."""
    shape = config.shape()
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
    if resume is not None and resume.state["data"] != _describe_data(data):
        raise InputError(
            f"data.path={config.data.path} holds other data than run {config.run.dir} was trained on; give it its own run.dir"
        )
    if resume is not None and resume.allocation is not None and resume.allocation.full != (allocation and allocation.full):
        raise InputError(
            f"allocation.file={config.allocation.file} has changed since run {config.run.dir} began; choose another run.dir"
        )
    origin = None
    if config.model.init_from is not None and resume is None:
        origin = store.resolve(config.model.init_from)
        _check_origin(config, shape, data, origin)
    return Inputs(config, shape, data, allocation, resume, origin)


def build_trainer(inputs: Inputs, mesh: Mesh) -> Trainer:
    """Builds the run on every rank, from its newest checkpoint, the one it is initialised from, or fresh weights."""
    config, shape = inputs.config, inputs.shape
    training = config.training
    topology = Topology.of(config, mesh.world_size)
    stream, held_out = _streams(config, mesh)
    validation = _validation(config, topology, mesh, held_out)
    gates = GateBank(_gate_settings(config, shape), mesh.device) if config.learning else None
    if gates and gates.settings.warmup_steps < gates.settings.shortest_warmup:
        logger.warning(
            "gates.warmup_steps=%d is short: at gates.learning_rate=%g the gates need about %.0f steps to the target and will lag, then "
            "overshoot it",
            gates.settings.warmup_steps,
            gates.settings.learning_rate,
            gates.settings.shortest_warmup,
        )
    heads = gates or inputs.allocation
    assert heads is not None
    engine = Engine(
        shape,
        training,
        topology,
        heads,
        mesh,
        backend=config.attention.backend,
        separate_documents=config.attention.separate_documents,
    )
    progress = _restore(inputs, engine, gates)
    lock = [RunLock(config.run.dir)] if mesh.is_main else []
    if mesh.is_main:
        replace_text(config.run.dir / CONFIG_NAME, yaml.safe_dump(config.to_dict(), sort_keys=False))
        if inputs.allocation is not None:
            inputs.allocation.save(config.run.dir / "allocation.json")
        sequences = inputs.data.splits["train"].sequences
        logger.info(
            "%s sequences of data, %.2f epochs in this run", f"{sequences:,}", training.steps * training.global_batch / sequences
        )
    description = {
        "learning": config.learning,
        "config": config.to_dict(),
        "shape": asdict(shape),
        "precision": engine.precision,
        "data": _describe_data(inputs.data),
    }
    callbacks: list[Callback] = [
        *lock,
        StopSignals(),
        validation,
        *(_reporters(config) if mesh.is_main else []),
        Checkpointing(config.run.dir, config.checkpoint.every, config.checkpoint.keep, description),
    ]
    steps = stream.steps(progress.sequences) if mesh.reads_data else repeat(NOTHING)
    return Trainer(training, mesh, engine, steps, gates, inputs.allocation, progress, callbacks)


def _validation(config: Config, topology: Topology, mesh: Mesh, held_out: BatchStream) -> Validation:
    wanted = config.validation.sequences
    # DualPipeV runs no fewer micro-batches than it has stages.
    least = topology.stages if topology.schedule == "dualpipev" else 1
    batches = held_out.fixed_batches(wanted, least) if mesh.reads_data else NOTHING
    return Validation(batches, held_out.fixed_count(wanted, least), config.validation.every)


def _reporters(config: Config) -> list[Callback]:
    """What the main rank writes and prints."""
    from megaconsa.training.callbacks.terminal import Terminal

    found: list[Callback] = [MetricsFile(config.run.dir)]
    if config.logging.tensorboard:
        from megaconsa.training.callbacks.tensorboard import TensorBoard

        found.append(TensorBoard(config.run.dir))
    if config.logging.wandb:
        from megaconsa.training.callbacks.wandb import WandB

        found.append(WandB(config.logging.wandb, str(config.run.dir), config.to_dict()))
    return [*found, Terminal("learn" if config.learning else "train")]


def _streams(config: Config, mesh: Mesh) -> tuple[BatchStream, BatchStream]:
    """Training and held-out batches of this data rank."""
    training = config.training

    def stream(split: str, workers: int) -> BatchStream:
        return BatchStream(
            config.data.path,
            split,
            seed=config.run.seed,
            global_batch=training.global_batch,
            micro_batch=training.micro_batch,
            data_rank=mesh.data_rank,
            data_ranks=mesh.data_ranks,
            workers=workers,
            separate_documents=config.attention.separate_documents,
        )

    return stream("train", config.data.workers), stream("validation", 0)


def _gate_settings(config: Config, shape: ModelConfig) -> GateSettings:
    return GateSettings(
        num_layers=shape.num_hidden_layers,
        num_kv_heads=shape.num_key_value_heads,
        window=config.attention.window,
        sparsity=config.allocation.sparsity,
        granularity=config.allocation.granularity,
        scope=config.allocation.scope,
        learning_rate=config.gates.learning_rate,
        initial=config.gates.initial,
        warmup_steps=config.gates.warmup_steps,
        controller=config.gates.controller,
        seed=config.run.seed,
        global_batch=config.training.global_batch,
        steps=config.training.steps,
    )


def _restore(inputs: Inputs, engine: Engine, gates: GateBank | None) -> Progress:
    """Loads weights, moments and gates; returns where the run stands."""
    if inputs.resume is not None and inputs.resume.state["precision"] != engine.precision:
        raise InputError(
            f"run {inputs.config.run.dir} was trained in {inputs.resume.state['precision']}, but training.precision="
            f"{inputs.config.training.precision} means {engine.precision} on this device; go on where it began, or use another run.dir"
        )
    source = inputs.resume or inputs.origin
    if source is None:
        engine.initialize(inputs.config.run.seed)
        return Progress()
    engine.load_weights(source.weights())
    if inputs.resume is not None or not inputs.config.training.reset_optimizer:
        engine.load_moments(source.moments(), source.state["optimizer_steps"])
    if inputs.resume is None:
        continues = source.state["data"] == _describe_data(inputs.data) and (
            source.state["config"]["run"]["seed"] == inputs.config.run.seed
        )
        logger.log(
            logging.INFO if continues else logging.WARNING,
            "weights%s from %s; the data order %s",
            "" if inputs.config.training.reset_optimizer else " and optimizer",
            source.path,
            "continues" if continues else "starts anew (other data or seed)",
        )
        return Progress(sequences=source.state["sequences"] if continues else 0)
    if gates is not None:
        state = source.gates()
        assert state is not None
        gates.load_state(state)
    logger.info("resumes at step %d from %s", source.step, source.path)
    return Progress(source.step, source.state["tokens"], source.state["sequences"])


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


def _describe_data(data: DatasetInfo) -> dict[str, Any]:
    """What identifies a data set in a checkpoint."""
    return data.model_dump(mode="json", exclude={"source": {"names"}})
