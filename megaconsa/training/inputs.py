"""A run's inputs: they are read and checked before anything is written or built."""

from __future__ import annotations

import logging
import os
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import Checkpoint
from megaconsa.config import Config, differences, with_defaults
from megaconsa.config.origin_shape import EXTENSIONS
from megaconsa.consa.allocation import Allocation
from megaconsa.data.dataset_info import DatasetInfo
from megaconsa.data.fingerprint import same_tokenizer
from megaconsa.data.mixture_file import data_folders, read_info, tokenizer_folder
from megaconsa.errors import InputError
from megaconsa.model import kernel_use
from megaconsa.model.config import ModelConfig
from megaconsa.parallel.recomputation import Recomputation
from megaconsa.parallel.stages import layer_costs, stages_by_rank
from megaconsa.parallel.topology import Topology
from megaconsa.parallel.world import ALONE, World
from megaconsa.planning.recomputation import choose_recomputation
from megaconsa.reading import read_text
from megaconsa.remote_path import is_remote
from megaconsa.run_paths import relocated
from megaconsa.training import checkpoint_check
from megaconsa.training.attention_backends import check_backends
from megaconsa.training.callbacks.run_lock import refuse_if_held
from megaconsa.training.same_run import check_same_run

logger = logging.getLogger(__name__)

_DEFAULT_SHAPE = {
    field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING
}
"""Default values for checkpoints of earlier versions, whose shapes had fewer fields."""
REMOTE_SHUFFLE_SHARDS = 64
"""Default of data.shuffle_shards for data in an object store.

A window then has 4 GiB. The first step needs most of it."""
SMALLEST_SHARE_OF_VOCABULARY = 0.9
"""Smallest vocabulary that data may have, as a fraction of the rows of the model's embedding.

Qwen3 pads its embedding beyond its tokenizer by 0.2 %. A table that is much larger than the
tokenizer's vocabulary belongs to another tokenizer."""


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a run."""

    config: Config
    model_config: ModelConfig
    data: DatasetInfo
    topology: Topology
    allocation: Allocation | None
    """None while learning."""
    recomputed: Recomputation = field(default_factory=Recomputation)
    found: list[Path] = field(default_factory=list)
    """The run's own checkpoints, newest first."""
    resume: Checkpoint | None = None
    """The newest of them that is complete."""
    origin: Checkpoint | None = None
    """The checkpoint that model.init_from names. None once the run has a checkpoint itself."""
    prompts: list[list[int]] = field(default_factory=list)
    """The ids of validation.prompts."""


def check_inputs(config: Config, world: World = ALONE) -> Inputs:
    """Reads and checks everything that the configuration points to. Writes nothing.

    All ranks of the world must call it. If one of them refuses the inputs, all of them do.
    Every byte of a checkpoint is checked by one rank.
    Raises InputError if the run cannot work.
    """
    inputs = world.agreed(lambda: _check_beside_checkpoints(config, world.size), alike=True)
    world.from_main(lambda: refuse_if_held(config.run.dir))
    found, resume = checkpoint_check.newest(config.run.dir, world)
    if resume is not None:
        return world.agreed(
            lambda: replace(inputs, found=found, resume=_check_resume(inputs, resume))
        )
    world.agreed(lambda: _check_begun_run(inputs.config))
    if (init_from := config.model.init_from) is None:
        return inputs
    origin = checkpoint_check.resolve(init_from, world)
    return world.agreed(lambda: replace(inputs, origin=_check_origin(inputs, origin)))


def _check_beside_checkpoints(config: Config, processes: int) -> Inputs:
    """Checks all inputs except checkpoints.

    processes: number of ranks.
    """
    model_config = config.to_model_config()
    topology = Topology.of(config, processes)
    config = _with_shuffle(config)
    data = read_info(config.data.path, config.data.cache_settings)
    _check_data(config, model_config, data)
    allocation = _table(config)
    if allocation is not None and allocation.window != config.attention.window:
        raise InputError(
            f"attention.window={config.attention.window}, but "
            f"allocation.file={config.allocation.file} was made for a window of "
            f"{allocation.window}"
        )
    check_backends(config, model_config, allocation, _device())
    _check_shard(config)
    _check_folder(config.run.dir)
    if config.logging.wandb and find_spec("wandb") is None:
        raise InputError(
            f"logging.wandb={config.logging.wandb} needs the package wandb; "
            "install it with pip install 'megaconsa[wandb]'"
        )
    costs = layer_costs(model_config, allocation, config.training.sequence_length)
    stages = stages_by_rank(costs, topology)
    kernels = kernel_use.kernels_serve_device(_device())
    recomputed = choose_recomputation(
        config, model_config, topology, stages, kernels=kernels, allocation=allocation
    )
    prompts = _prompts(config)
    return Inputs(config, model_config, data, topology, allocation, recomputed, prompts=prompts)


def _check_shard(config: Config) -> None:
    """Raises InputError if gradients cannot be divided over data ranks."""
    if config.parallel.shard == "gradients" and not config.training.in_bf16(_device().type):
        raise InputError(
            f"parallel.shard=gradients needs bf16, but training.precision="
            f"{config.training.precision} means fp32 on this device; "
            "set training.precision=bf16, or parallel.shard=optimizer"
        )


def _with_shuffle(config: Config) -> Config:
    """The configuration with the default of data.shuffle_shards for its kind of storage.

    The run records it, because it belongs to the order of its data.
    """
    if config.data.shuffle_shards is not None:
        return config
    folders = data_folders(config.data.path, config.data.cache_settings)
    if not any(is_remote(folder) for folder in folders):
        return config
    logger.info(
        "data.shuffle_shards=%d, because data come from an object store", REMOTE_SHUFFLE_SHARDS
    )
    data = config.data.model_copy(update={"shuffle_shards": REMOTE_SHUFFLE_SHARDS})
    return config.model_copy(update={"data": data})


def _prompts(config: Config) -> list[list[int]]:
    """The ids of validation.prompts. Raises InputError for one that leaves no room to continue."""
    texts = list(config.validation.prompts)
    if not texts:
        return []
    from megaconsa.data.tokenizer import Tokenizer  # Imported late, because it takes seconds.

    tokenizer = Tokenizer.load(tokenizer_folder(config.data.path))
    length = config.training.sequence_length
    found = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, found, strict=True):
        if len(ids) >= length:
            raise InputError(
                f"validation.prompts: {text[:40]!r} has {len(ids)} tokens, which leaves no room "
                f"to continue it within training.sequence_length={length}; shorten it"
            )
    return found


def _table(config: Config) -> Allocation | None:
    """The finished allocation table. None while learning.

    If its file is gone, it is read from one of the run's own checkpoints.
    """
    file = config.allocation.file
    if file is None or file.exists():
        return config.fixed_allocation()
    for path in store.committed(config.run.dir):
        held = path / "allocation.json"
        if held.exists():
            logger.info(
                "allocation.file=%s is gone; the run continues with its own table, %s", file, held
            )
            section = config.allocation.model_copy(update={"file": held})
            return config.model_copy(update={"allocation": section}).fixed_allocation()
    return config.fixed_allocation()


def _check_data(config: Config, model_config: ModelConfig, data: DatasetInfo) -> None:
    """Raises InputError if the data does not fit the sequence length or the vocabulary."""
    if data.sequence_length != config.training.sequence_length:
        raise InputError(
            f"training.sequence_length={config.training.sequence_length}, but "
            f"data {config.data.path} was packed into sequences of "
            f"{data.sequence_length}; change one of them"
        )
    smallest = model_config.vocab_size * SMALLEST_SHARE_OF_VOCABULARY
    if not smallest <= data.vocab_size <= model_config.vocab_size:
        raise InputError(
            f"data {config.data.path} was tokenised with a vocabulary of {data.vocab_size}, "
            f"but the model has {model_config.vocab_size}; "
            "prepare it with the model's tokenizer, or set "
            f"model.vocab_size={data.vocab_size} to train a model of its own"
        )


def _device() -> torch.device:
    """Where this process will train."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_folder(run: Path) -> None:
    """Raises InputError if the run folder cannot be made or written."""
    candidates = (run.absolute(), *run.absolute().parents)
    nearest = next(path for path in candidates if path.exists())
    if not nearest.is_dir():
        raise InputError(f"run.dir={run} cannot be made: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"run.dir={run} cannot be written: no permission for {nearest}")
    checkpoints = run / run_folder.CHECKPOINTS
    if checkpoints.is_symlink() and not checkpoints.is_dir():
        raise InputError(
            f"{checkpoints} is a link to {checkpoints.readlink()}, which is no folder; "
            "make it or remove the link"
        )
    if checkpoints.exists() and not os.access(checkpoints, os.W_OK | os.X_OK):
        raise InputError(
            f"{checkpoints} cannot be written: no permission; give it or choose another run.dir"
        )


def _check_begun_run(config: Config) -> None:
    """Checks a run folder that has no checkpoint.

    Raises InputError if a run was started there with another configuration.
    """
    try:
        old = yaml.safe_load(read_text(config.run.dir / run_folder.CONFIG))
    except (OSError, ValueError, yaml.YAMLError):
        return
    # Otherwise a crash tore the file before anything was trained, and the run starts fresh.
    if isinstance(old, dict):
        check_same_run(config, relocated(old, config.run.dir))


def _check_resume(inputs: Inputs, resume: Checkpoint) -> Checkpoint:
    """Returns the run's own checkpoint to resume from.

    Raises InputError if anything has changed that would make it another run.
    """
    config = inputs.config
    allocation = inputs.allocation
    if harmless := check_same_run(config, resume.state["config"], resume.step):
        logger.info("continues with %s", "; ".join(harmless))
    if changed := differences(_DEFAULT_SHAPE | resume.state["shape"], asdict(inputs.model_config)):
        raise InputError(
            f"run {config.run.dir} was trained with another shape ({'; '.join(changed)}): "
            f"the preset {config.model.preset} has changed; "
            "give the old values in section model, or use another run.dir"
        )
    theirs = with_defaults(resume.state["data"], DatasetInfo)
    ours = with_defaults(describe_data(inputs.data), DatasetInfo)
    if not same_data(theirs, ours):
        raise InputError(
            f"data.path={config.data.path} holds other data than run {config.run.dir} "
            "was trained on; give it its own run.dir"
        )
    if resume.allocation is not None and resume.allocation.full != (allocation and allocation.full):
        raise InputError(
            f"allocation.file={config.allocation.file} has changed since run {config.run.dir} "
            "began; choose another run.dir"
        )
    precision = "bf16" if config.training.in_bf16(_device().type) else "fp32"
    if resume.state["precision"] != precision:
        raise InputError(
            f"run {config.run.dir} was trained in {resume.state['precision']}, but "
            f"training.precision={config.training.precision} means "
            f"{precision} on this device; continue where it began, or use another run.dir"
        )
    return resume


def _check_origin(inputs: Inputs, origin: Checkpoint) -> Checkpoint:
    """Returns the checkpoint that a new run starts from.

    Raises InputError if it belongs to another model or tokenizer.
    """
    config = inputs.config
    data = inputs.data
    changed = differences(_DEFAULT_SHAPE | origin.state["shape"], asdict(inputs.model_config))
    extensions = [line for line in changed if line.split(":")[0] in EXTENSIONS]
    if len(changed) > len(extensions):
        raise InputError(
            f"model.init_from={config.model.init_from} has another shape than the model "
            f"({'; '.join(changed)})"
        )
    if extensions:
        logger.info("the weights of %s continue with %s", origin.path, "; ".join(extensions))
    theirs = origin.state["data"]["tokenizer_fingerprint"]
    if theirs is None:
        logger.warning(
            "model.init_from=%s was imported without a tokenizer: "
            "nothing tells whether the data's is its own",
            origin.path,
        )
    elif not same_tokenizer(theirs, data.tokenizer_fingerprint):
        raise InputError(
            f"data {config.data.path} was tokenised with another vocabulary "
            f"(fingerprint {data.tokenizer_fingerprint}) than "
            f"model.init_from={config.model.init_from} was trained on ({theirs})"
        )
    return origin


def describe_data(data: DatasetInfo) -> dict[str, Any]:
    """The description by which a checkpoint identifies its data set."""
    return data.identity()


def same_data(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two descriptions are of the same data set.

    Tokenizer fingerprints are compared separately, because one may come from an earlier version.
    """
    tokenizer = "tokenizer_fingerprint"
    if not same_tokenizer(one[tokenizer], other[tokenizer]):
        return False
    return one | {tokenizer: ""} == other | {tokenizer: ""}
