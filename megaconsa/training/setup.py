"""From checked inputs to a trainer."""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from itertools import repeat

import torch
import yaml

from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.consa.gates import GateBank
from megaconsa.data.stream import Batch
from megaconsa.errors import UnreachableError
from megaconsa.files import replace_text
from megaconsa.parallel.deepspeed.engine import Engine
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.world import World
from megaconsa.run_paths import absolute
from megaconsa.training.bad_steps import BadSteps
from megaconsa.training.callback_list import build_callbacks
from megaconsa.training.callbacks.checkpointing import Checkpointing
from megaconsa.training.callbacks.provenance import machine
from megaconsa.training.callbacks.rewinds import rewound
from megaconsa.training.callbacks.run_lock import RunLock
from megaconsa.training.callbacks.stop_requests import job_end
from megaconsa.training.inputs import Inputs, describe_data, same_data
from megaconsa.training.run_data import describe_passes, open_training, open_validation
from megaconsa.training.trainer import Progress, Trainer

logger = logging.getLogger(__name__)

NOTHING: list[Batch] = []
"""Batches of a rank where the pipeline does not begin."""


def build_trainer(inputs: Inputs, mesh: Mesh) -> Trainer:
    """Builds the run on every rank.

    Weights come from the run's newest checkpoint, from `model.init_from`, or are fresh.

    Raises InputError on all ranks together if data cannot be opened or the run folder is in use.
    """
    config, model_config = inputs.config, inputs.model_config
    training, topology = config.training, inputs.topology
    stream = mesh.world.agreed(lambda: open_training(config, mesh), alike=True)
    validation = mesh.world.agreed(lambda: open_validation(config, topology, mesh))
    lock = mesh.world.agreed(lambda: _lock(inputs) if mesh.is_main else None)
    # Our code draws nothing from torch's own generators in a step. A library might.
    torch.manual_seed(config.run.seed)
    gates = GateBank(config.gate_settings(), mesh.device) if config.learning else None
    heads = gates or inputs.allocation
    assert heads is not None
    engine = Engine(
        model_config,
        training,
        topology,
        heads,
        mesh,
        backend=config.attention.backend,
        separate_documents=config.attention.separate_documents,
        recomputed=inputs.recomputed,
    )
    progress = _restore(inputs, engine, gates, mesh.world)
    place, rewinds = mesh.world.from_main(
        lambda: rewound(config.run.dir, progress.step, progress.sequences)
    )
    if place > progress.sequences:
        logger.warning(
            "passes over %s sequences, up to the last spike", f"{place - progress.sequences:,}"
        )
        progress.sequences = place
    recorded = absolute(config.to_dict())
    if mesh.is_main:
        replace_text(config.run.dir / run_folder.CONFIG, yaml.safe_dump(recorded, sort_keys=False))
        if inputs.allocation is not None:
            inputs.allocation.save(config.run.dir / run_folder.ALLOCATION)
        if (budget := config.allocation.budget()) is not None:
            logger.info("sparsity %g from %s", config.allocation.sparsity, budget)
        for line in describe_passes(config, inputs.data):
            logger.info("%s", line)
        if training.memory_gib is not None:
            logger.info(
                "recomputes %s, to keep training.memory_gib=%g",
                inputs.recomputed.describe(model_config.num_hidden_layers),
                training.memory_gib,
            )
    description = {
        "learning": config.learning,
        "config": recorded,
        "shape": asdict(model_config),
        "precision": engine.precision,
        "data": describe_data(inputs.data),
    }
    end = mesh.world.agreed(job_end)
    checkpointing = Checkpointing(config.run.dir, config.checkpoint, mesh.world, description)
    samples = None
    if inputs.prompts:
        # Imported late, because it imports transformers.
        from megaconsa.training.callbacks.samples import Samples

        samples = Samples(config, inputs.prompts, validation, topology, is_main=mesh.is_main)
    machines = mesh.world.exchange(machine(mesh.device))
    callbacks = build_callbacks(
        config, mesh, lock, stream, validation, samples, checkpointing, end, machines
    )
    steps = stream.steps(progress.sequences) if mesh.reads_data else repeat(NOTHING)
    return Trainer(
        training,
        config.bad_steps,
        mesh,
        engine,
        steps,
        gates,
        inputs.allocation,
        progress,
        callbacks,
        rewinds,
    )


def _lock(inputs: Inputs) -> RunLock:
    run = inputs.config.run.dir
    lock = RunLock(run)
    if store.committed(run) != inputs.found:
        lock.release()
        raise UnreachableError(
            f"another process trained in run.dir={run} a moment ago; run the command again"
        )
    if inputs.resume is not None:
        for damaged in inputs.found[: inputs.found.index(inputs.resume.path)]:
            # A damaged checkpoint must not count among the checkpoints to keep, and must never be
            # resumed from.
            aside = damaged.with_name(f"{damaged.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
            logger.warning("checkpoint %s is put aside as %s", damaged, aside.name)
    return lock


def _restore(inputs: Inputs, engine: Engine, gates: GateBank | None, world: World) -> Progress:
    """Loads weights, moments, gates and random states. Returns the run's progress."""
    source = inputs.resume or inputs.origin
    if source is None:
        engine.initialize(inputs.config.run.seed)
        return Progress()
    with ExitStack() as reading:
        world.agreed(lambda: reading.enter_context(source.in_use()), alike=True)
        engine.load_weights(source.weights())
        takes_moments = inputs.resume is not None or not (
            inputs.config.training.reset_optimizer or source.imported
        )
        if takes_moments:
            engine.load_moments(source.moments(), source.state["optimizer_steps"])
        if inputs.resume is not None:
            return _resume(source, gates, world)
    if source.imported:
        logger.info(
            "weights from %s, imported from %s; optimizer and data order start anew",
            source.path,
            source.imported["folder"],
        )
        return Progress()
    recorded = source.state["config"]
    continues = (
        same_data(source.state["data"], describe_data(inputs.data))
        and recorded["run"]["seed"] == inputs.config.run.seed
        # null means the same as 0, as in same_run.
        and (recorded["data"].get("shuffle_shards") or 0)
        == (inputs.config.data.shuffle_shards or 0)
    )
    logger.log(
        logging.INFO if continues else logging.WARNING,
        "weights%s from %s; the data order %s",
        " and optimizer" if takes_moments else "",
        source.path,
        "continues" if continues else "starts anew (other data, seed or shuffle)",
    )
    return Progress(sequences=source.state["sequences"] if continues else 0)


def _resume(source: Checkpoint, gates: GateBank | None, world: World) -> Progress:
    if gates is not None:
        state = source.gates()
        assert state is not None
        gates.load_state(state)
    random = source.random_states()
    # A run on another number of ranks has no random states to restore.
    if {name.partition("/")[0] for name in random} == {str(rank) for rank in range(world.size)}:
        torch.set_rng_state(random[f"{world.rank}/cpu"])
        if world.device.type == "cuda" and f"{world.rank}/cuda" in random:
            torch.cuda.set_rng_state(random[f"{world.rank}/cuda"], world.device)
    logger.info("resumes at step %d from %s", source.step, source.path)
    bad_steps = BadSteps(**source.state.get("bad_steps", {}))
    return Progress(source.step, source.state["tokens"], source.state["sequences"], bad_steps)
