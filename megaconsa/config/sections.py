"""The sections of a run configuration: their fields, defaults and ranges."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from megaconsa.consa import rules
from megaconsa.consa.constraint import Granularity, Scope
from megaconsa.consa.gate_settings import ControllerName
from megaconsa.data.cache_settings import CACHE_GIB, CacheSettings
from megaconsa.errors import InputError
from megaconsa.model.budget import QUANTITIES, Budget
from megaconsa.remote_path import with_address

PipelineSchedule = Literal["1f1b", "interleaved", "dualpipev"]
Shard = Literal["optimizer", "gradients"]
"""Order of the pipeline's forward and backward passes."""


def expand_path(value: str) -> str:
    """Replaces `~` and `$VARIABLES` in a path.

    Raises ValueError for an unknown variable or user.
    """
    expanded = os.path.expanduser(os.path.expandvars(value))
    if unknown := re.search(r"\$\{?\w+\}?", expanded):
        raise ValueError(f"the environment has no variable {unknown[0]}")
    if expanded.startswith("~"):
        raise ValueError(f"there is no user {expanded.partition('/')[0]}")
    return expanded


class Section(BaseModel):
    """Base class of all sections: immutable, and closed to unknown fields, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a boolean for a field of another type: pydantic would read true as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("a boolean does not fit")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_spelled_null(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses `None` for an optional field: YAML reads it as a string, not as null."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value == "None" and type(None) in get_args(annotation):
            raise ValueError("write null where nothing is meant")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _expand_paths(cls, value: Any, info: ValidationInfo) -> Any:
        """Replaces `~` and `$VARIABLES`. No shell does so in a file or after an equals sign."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        is_path = annotation is Path or Path in get_args(annotation)
        if is_path and isinstance(value, str):
            return expand_path(value)
        return value


class RunSection(Section):
    dir: Path
    """Run folder: configuration, metrics, checkpoints and what tools add."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the initial weights, the data order and the gates' samples."""


class ModelSection(Section):
    preset: str = "tiny"
    """A name in megaconsa.model.config.PRESETS. The fields below override single values of it."""
    init_from: Path | None = None
    """A run folder, a checkpoint or an import that provides the initial weights.

    It also provides the fields below that are not given. null draws random weights."""
    vocab_size: int | None = Field(None, ge=2)
    hidden_size: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=1)
    num_hidden_layers: int | None = Field(None, ge=1)
    num_attention_heads: int | None = Field(None, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=2)
    tie_word_embeddings: bool | None = None
    rope_theta: float | None = Field(None, gt=0)
    rms_norm_eps: float | None = Field(None, gt=0)
    initializer_range: float | None = Field(None, gt=0)
    max_position_embeddings: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _null_is_no_preset(cls, data: Any) -> Any:
        """Lets an override remove a file's preset, for weights of another shape."""
        if isinstance(data, dict) and data.get("preset", "tiny") is None:
            return {name: value for name, value in data.items() if name != "preset"}
        return data


class AttentionSection(Section):
    window: int
    """Keys that a sliding-window head sees, including the query's own position."""
    backend: Literal["auto", "reference", "sdpa", "triton", "flash"] = "auto"
    separate_documents: bool = True
    """Whether documents packed into one sequence are hidden from each other."""


class AllocationSection(Section):
    source: Literal["learn", "file", "rule"]
    """Where the allocation comes from.

    learn: stage 1, the gates are trained.
    file: a finished allocation.json.
    rule: the rule that the field `rule` names."""
    sparsity: float = Field(0.5, ge=0, le=1)
    """Fraction of units that use the sliding window. With a budget: the fraction that meets it."""
    cache_bytes: int | None = Field(None, ge=1)
    """Budget instead of a sparsity: bytes per token of the bf16 KV cache at `context` tokens."""
    cache_share: float | None = Field(None, gt=0)
    """Budget: the KV cache at `context` tokens as a fraction of the dense model's."""
    attention_share: float | None = Field(None, gt=0)
    """Budget: visible (query, key) pairs at `context` tokens as a fraction of the dense model's."""
    context: int | None = Field(None, ge=1)
    """Sequence length in tokens at which the budget applies."""
    granularity: Granularity = "kv_head"
    scope: Scope = "global"
    floor: int = Field(0, ge=0)
    """Minimum number of full KV heads in every layer, with scope=global."""
    file: Path | None = None
    rule: rules.Rule = "dense"
    ratio: int = Field(3, ge=1)
    """Sliding-window layers per full layer in the interleaved rule."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Seed of the rule random, and of head-share if given.

    null: run.seed for random, the first heads for head-share."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_no_sparsity(cls, data: Any) -> Any:
        """Lets an override remove a file's sparsity, so that a budget can replace it."""
        if isinstance(data, dict) and data.get("sparsity", 0.5) is None:
            return {name: value for name, value in data.items() if name != "sparsity"}
        return data

    @property
    def targeted(self) -> bool:
        """Whether the allocation aims at a sparsity: while learning, and with some rules."""
        if self.source == "rule":
            return self.rule in rules.WITH_SPARSITY
        return self.source == "learn"

    def budget(self) -> Budget | None:
        """The budget that replaces the sparsity, or None.

        Raises InputError for several budgets, for a budget without its context, and for a context
        without a budget.
        """
        given = [name for name in QUANTITIES if getattr(self, name) is not None]
        if len(given) > 1:
            both = f"allocation.{given[0]} and allocation.{given[1]}"
            raise InputError(f"{both} are both given; keep one of them")
        if not given:
            if self.context is not None:
                raise InputError(
                    f"allocation.context={self.context} belongs to a budget, but there is none; "
                    "leave it out, or give allocation.cache_bytes, cache_share or attention_share"
                )
            return None
        quantity = given[0]
        limit = getattr(self, quantity)
        if self.context is None:
            raise InputError(
                f"allocation.{quantity}={limit} needs allocation.context, "
                "the number of tokens in the sequence for which the budget holds"
            )
        return Budget(quantity, limit, self.context)


class GatesSection(Section):
    controller: ControllerName = "evidence"
    """How the gates are trained.

    evidence: measures every unit under equal conditions, then decides, the clearest units first.
    paper: hard concrete samples, and Adam on log_alpha and on both multipliers."""
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the target rises from 0 to allocation.sparsity."""
    learning_rate: float = Field(0.1, gt=0)
    """Adam's learning rate for log_alpha, with controller=paper."""
    initial: float = 2.5
    """Initial value of every log_alpha, with controller=paper. 2.5 starts with gates 98 % open."""


class ParallelSection(Section):
    tensor: int = Field(1, ge=1)
    """Ranks that share the heads, the MLP and the vocabulary."""
    context: int = Field(1, ge=1)
    """Ranks that share the tokens of each sequence."""
    pipeline: int = Field(1, ge=1)
    """Ranks that share the layers."""
    sequence: bool = True
    """Whether norms and the residual stream are sharded along the sequence if tensor > 1."""
    schedule: PipelineSchedule = "1f1b"
    """1f1b: one stage per rank. interleaved: two, one from each half of the model. dualpipev: two,
    one from each end of the model."""
    shard: Shard = "optimizer"
    """What is divided over data and context ranks, in bf16.

    optimizer: master weights and Adam's moments (ZeRO-1).
    gradients: the gradients of the blocks' matrices too (ZeRO-2). Less memory, more traffic."""


class TrainingSection(Section):
    steps: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    """Sequences per forward pass and data rank."""
    global_batch: int = Field(ge=1)
    """Sequences per optimizer step."""
    sequence_length: int = Field(ge=2)
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(0.0, ge=0)
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: warm-up, then a cosine to the end.
    wsd: warm-up, constant, then a linear decay over decay_steps."""
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clipping: float = Field(1.0, ge=0)
    """Maximum global gradient norm. 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory of a GPU in GiB, by `plan`'s estimate, that the run may take.

    To keep it, q and k of as few layers as possible are recomputed. If that is not enough, so are
    as few whole layers as possible. null: activation_checkpointing decides."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    reset_optimizer: bool = False
    """With model.init_from: load the weights only, not the optimizer's moments."""

    @model_validator(mode="after")
    def _one_way_to_recompute(self) -> TrainingSection:
        if self.memory_gib is not None and self.activation_checkpointing:
            raise ValueError(
                f"memory_gib={self.memory_gib:g} chooses the layers that are recomputed, but "
                "activation_checkpointing=true recomputes all; leave one of them out"
            )
        return self

    def in_bf16(self, device_type: str) -> bool:
        """Whether the model computes in bf16 on a device of this type (cuda or cpu)."""
        return self.precision == "bf16" or (self.precision == "auto" and device_type == "cuda")


class DataSection(Section):
    path: Path
    """A folder made by prepare-data, on a disk or in an object store, or a mixture file."""
    workers: int = Field(0, ge=0)
    """Processes that prefetch data."""
    shuffle_shards: int | None = Field(None, ge=0)
    """Number of shards whose sequences are mixed with each other. 0 mixes all.

    null: 0, or 64 for data in an object store."""
    cache: Path | None = None
    """Folder on each node for data from an object store. null: in the temporary folder."""
    cache_gib: float = Field(CACHE_GIB, gt=0)
    """Limit of that folder in GiB."""

    @field_validator("path")
    @classmethod
    def _keep_address(cls, value: Path) -> Path:
        """Keeps the address of a folder in an object store, whose slashes a path would join."""
        return with_address(value)

    @property
    def cache_settings(self) -> CacheSettings:
        """The cache of this node."""
        return CacheSettings(self.cache, self.cache_gib)


class ValidationSection(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations on held-out data. 0 evaluates only at the end."""
    sequences: int = Field(64, ge=1)
    """Held-out sequences. They are the same in every evaluation."""
    prompts: tuple[str, ...] = ()
    """Texts that are continued greedily at each evaluation."""

    @field_validator("prompts")
    @classmethod
    def _no_empty_prompt(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty prompt has nothing to continue")
        return value


class CheckpointSection(Section):
    every: int = Field(0, ge=0)
    """Steps between checkpoints. 0 turns saving by steps off."""
    minutes: float = Field(30.0, ge=0)
    """Minutes from the last checkpoint to the next, in addition to those by steps.

    0 turns saving by time off."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of this step are kept forever. 0 keeps none this way."""
    upload: str | None = None
    """Folder in an object store, such as s3://bucket/runs/one, for copies of checkpoints."""


class BadStepsSection(Section):
    limit: int = Field(3, ge=1)
    """The run ends after this many steps in a row that are not applied.

    It also ends after this many rewinds to the same checkpoint."""
    spikes: Literal["keep", "skip", "rewind"] = "keep"
    """What to do with steps whose loss or gradient norm jumps.

    Steps that are not finite are never applied.
    skip: such steps are not applied either.
    rewind: the run also returns to its newest checkpoint and skips the batches since then."""
    deviations: float = Field(6.0, gt=0)
    """Threshold for a jump, in robust standard deviations.

    They are counted above the median of the last 128 applied steps."""


class WatchdogSection(Section):
    factor: float = Field(10.0, ge=0)
    """A step is given up after this multiple of the usual step time. 0 turns the watchdog off."""
    minimum_seconds: float = Field(120.0, gt=0)
    """No step is given up sooner."""
    pause_seconds: float = Field(1800.0, gt=0)
    """Limit for start-up with the first step, and for validation and saves."""
    data_seconds: float = Field(540.0, gt=0)
    """Limit for a rank's wait for its own data.

    Reads are retried for five minutes, so a lower limit may give up too early. NCCL aborts the
    other ranks, which wait for this one, after ten minutes."""


class LoggingSection(Section):
    tensorboard: bool = True
    wandb: str | None = None
    """Project name at Weights & Biases. null does not log there."""
