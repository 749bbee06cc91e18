"""The run configuration: typed fields, YAML, dotted overrides, and the checks that refuse what cannot work.

`load(path, overrides)` is the way in. Every refusal is an InputError that names the field, its value and the mend.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import to_jsonable_python

from megaconsa.consa import rules
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.constraint import Constraint, Granularity, Scope
from megaconsa.consa.gates import ControllerName, GateSettings
from megaconsa.errors import InputError
from megaconsa.model.budget import QUANTITIES, Budget
from megaconsa.model.config import PRESETS, ModelConfig
from megaconsa.reading import read_text
from megaconsa.run_paths import has_moved_to, relocated

logger = logging.getLogger(__name__)

PipelineSchedule = Literal["1f1b", "dualpipev"]
"""Order of the pipeline's forward and backward passes."""


def expand_path(value: str) -> str:
    """A path with `~` and `$VARIABLES` replaced. Raises ValueError for those that nobody knows."""
    expanded = os.path.expanduser(os.path.expandvars(value))
    if unknown := re.search(r"\$\{?\w+\}?", expanded):
        raise ValueError(f"the environment has no variable {unknown[0]}")
    if expanded.startswith("~"):
        raise ValueError(f"there is no user {expanded.partition('/')[0]}")
    return expanded


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("a boolean does not fit")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_spelled_null(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value == "None" and type(None) in get_args(annotation):
            raise ValueError("write null where nothing is meant")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _expand_paths(cls, value: Any, info: ValidationInfo) -> Any:
        """`~` and `$VARIABLES`, which no shell has replaced in a file or behind an equals sign."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if not isinstance(value, str) or (
            annotation is not Path and Path not in get_args(annotation)
        ):
            return value
        return expand_path(value)


class RunSection(Section):
    dir: Path
    """Run folder: config, metrics, checkpoints and what tools add."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the initial weights, the data order and the gates' samples."""


class ModelSection(Section):
    preset: str = "tiny"
    """A name in megaconsa.model.config.PRESETS; the fields below override single values of it."""
    init_from: Path | None = None
    """A run folder or a checkpoint whose weights training starts from; null draws fresh ones."""
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


class AttentionSection(Section):
    window: int
    """Keys that a sliding-window head sees, itself included."""
    backend: Literal["auto", "reference", "sdpa", "triton", "flash"] = "auto"
    separate_documents: bool = True
    """Documents packed in one sequence do not see each other."""


class AllocationSection(Section):
    source: Literal["learn", "file", "rule"]
    """learn: stage 1, gates are trained; file: a finished allocation.json; rule: one of the rules below."""
    sparsity: float = Field(0.5, ge=0, le=1)
    """Fraction of units that use the sliding window. With a budget, the fraction that keeps it."""
    cache_bytes: int | None = Field(None, ge=1)
    """Budget in place of the sparsity: bytes of the bf16 KV cache a token, at `context` tokens."""
    cache_share: float | None = Field(None, gt=0)
    """Budget: the KV cache at `context` tokens as a share of the dense model's."""
    attention_share: float | None = Field(None, gt=0)
    """Budget: visible (query, key) pairs of `context` tokens as a share of the dense model's."""
    context: int | None = Field(None, ge=1)
    """Tokens of the sequence for which the budget holds."""
    granularity: Granularity = "kv_head"
    scope: Scope = "global"
    floor: int = Field(0, ge=0)
    """Full KV heads that every layer keeps at least; with scope=global."""
    file: Path | None = None
    rule: rules.Rule = "dense"
    ratio: int = Field(3, ge=1)
    """Sliding-window layers for each full one in the interleaved rule."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Seed of rule random, and of head-share where given.

    null: run.seed for random, the first heads for head-share."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_no_sparsity(cls, data: Any) -> Any:
        """Lets an override take back a file's sparsity, so that a budget can replace it."""
        if isinstance(data, dict) and data.get("sparsity", 0.5) is None:
            return {name: value for name, value in data.items() if name != "sparsity"}
        return data

    @property
    def targeted(self) -> bool:
        """Whether a sparsity is aimed at: while learning, and with some rules."""
        if self.source == "rule":
            return self.rule in rules.WITH_SPARSITY
        return self.source == "learn"

    def budget(self) -> Budget | None:
        """The budget in place of the sparsity, if there is one.

        Raises InputError for several budgets, and for one without its context.
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
    """evidence: measure every unit under equal conditions, then decide, the clearest first. paper: hard concrete samples,
    Adam on log_alpha and on both multipliers."""
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the target rises from 0 to allocation.sparsity."""
    learning_rate: float = Field(0.1, gt=0)
    """Adam's learning rate for log_alpha, of paper."""
    initial: float = 2.5
    """First value of every log_alpha, of paper; 2.5 starts at 98 % open."""


class ParallelSection(Section):
    tensor: int = Field(1, ge=1)
    """Ranks over which heads, MLP and vocabulary are divided."""
    pipeline: int = Field(1, ge=1)
    """Ranks over which the layers are divided."""
    sequence: bool = True
    """Divide norms and residual stream along the sequence where tensor > 1."""
    schedule: PipelineSchedule = "1f1b"
    """1f1b: one stage a rank; dualpipev: two, one from each end of the model."""


class TrainingSection(Section):
    steps: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    """Sequences per forward pass and data rank."""
    global_batch: int = Field(ge=1)
    """Sequences per optimizer step."""
    sequence_length: int = Field(ge=2)
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(0.0, ge=0)
    """Where the schedule ends."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: warm-up, then cosine to the end; wsd: warm-up, constant, then linear over decay_steps."""
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    reset_optimizer: bool = False
    """With model.init_from: take the weights only, not the optimizer's moments."""

    def in_bf16(self, device_type: str) -> bool:
        """Whether the model computes in bf16 on a device of this type (cuda or cpu)."""
        return self.precision == "bf16" or (self.precision == "auto" and device_type == "cuda")


class DataSection(Section):
    path: Path
    """A folder made by prepare-data."""
    workers: int = Field(0, ge=0)
    """Processes that read ahead."""


class ValidationSection(Section):
    every: int = Field(0, ge=0)
    """Steps between two evaluations on held-out data; 0 evaluates only at the end."""
    sequences: int = Field(64, ge=1)
    """Held-out sequences, always the same ones."""


class CheckpointSection(Section):
    every: int = Field(0, ge=0)
    """Steps between two checkpoints; 0 does not count steps."""
    minutes: float = Field(30.0, ge=0)
    """Minutes after the last checkpoint at which the next one is saved, beside those by steps; 0 does not look at the clock."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints whose step is a multiple of this are kept for ever; 0 keeps none for that."""


class BadStepsSection(Section):
    limit: int = Field(3, ge=1)
    """So many steps in a row that are not applied, or returns to the same checkpoint, end the run."""
    spikes: Literal["keep", "skip", "rewind"] = "keep"
    """skip: steps whose loss or gradient norm jumps are not applied; those that are not finite never are. rewind: after such a jump the run
    goes back to its newest checkpoint too, and passes over the batches since."""
    deviations: float = Field(6.0, gt=0)
    """What counts as a jump: robust standard deviations above the median of the last 128 applied steps."""


class WatchdogSection(Section):
    factor: float = Field(10.0, ge=0)
    """A step that takes so many times the usual is given up; 0 turns the watchdog off."""
    minimum_seconds: float = Field(120.0, gt=0)
    """No step is given up sooner."""
    pause_seconds: float = Field(1800.0, gt=0)
    """Limit for start-up with the first step, for waiting for data, and for validation and saves."""


class LoggingSection(Section):
    tensorboard: bool = True
    wandb: str | None = None
    """Project name at Weights & Biases; null does not log there."""


class Config(Section):
    run: RunSection
    model: ModelSection = ModelSection()
    attention: AttentionSection
    allocation: AllocationSection
    gates: GatesSection = GatesSection()
    parallel: ParallelSection = ParallelSection()
    training: TrainingSection
    data: DataSection
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    bad_steps: BadStepsSection = BadStepsSection()
    watchdog: WatchdogSection = WatchdogSection()
    logging: LoggingSection = LoggingSection()

    @property
    def learning(self) -> bool:
        """Whether this run learns its allocation (stage 1)."""
        return self.allocation.source == "learn"

    def shape(self) -> ModelConfig:
        """The preset with the section's overrides applied."""
        overrides = {
            field.name: getattr(self.model, field.name) for field in dataclass_fields(ModelConfig)
        }
        return replace(
            PRESETS[self.model.preset],
            **{name: value for name, value in overrides.items() if value is not None},
        )

    def constraint(self) -> Constraint:
        """The target of learning, or of a rule that takes a sparsity.

        Raises InputError where it cannot be met.
        """
        section = self.allocation
        shape = self.shape()
        granularity = section.granularity
        scope = section.scope
        floor = section.floor
        if section.source == "rule" and section.rule in rules.OWN_UNITS:
            granularity, scope = rules.OWN_UNITS[section.rule]
            floor = 0
        return Constraint(
            num_layers=shape.num_hidden_layers,
            num_kv_heads=shape.num_key_value_heads,
            sparsity=section.sparsity,
            granularity=granularity,
            scope=scope,
            floor=floor,
        )

    def fixed_allocation(self) -> Allocation | None:
        """The finished table that the configuration names, its shape checked; None while learning. Raises InputError."""
        section = self.allocation
        if section.source == "learn":
            return None
        shape = self.shape()
        layers = shape.num_hidden_layers
        kv_heads = shape.num_key_value_heads
        if section.source == "rule":
            seed = section.seed
            if seed is None and section.rule == "random":
                seed = self.run.seed
            return rules.build(
                section.rule,
                layers,
                kv_heads,
                self.attention.window,
                sparsity=section.sparsity,
                granularity=section.granularity,
                scope=section.scope,
                floor=section.floor,
                ratio=section.ratio,
                seed=seed,
            )
        assert section.file is not None
        allocation = Allocation.load(section.file)
        allocation.check_shape(layers, kv_heads, f"allocation.file={section.file}")
        return allocation

    def gate_settings(self) -> GateSettings:
        """What the bank of gates is built from. Raises InputError where the target cannot be met."""
        return GateSettings(
            constraint=self.constraint(),
            window=self.attention.window,
            controller=self.gates.controller,
            warmup_steps=self.gates.warmup_steps,
            learning_rate=self.gates.learning_rate,
            initial=self.gates.initial,
            seed=self.run.seed,
            global_batch=self.training.global_batch,
            steps=self.training.steps,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to a run's config.yaml."""
        return self.model_dump(mode="json")


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses what YAML's own loader takes for something else in silence: a key that is given twice, numbers of YAML 1.1."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice")
        return super().construct_mapping(node, deep)

    def construct_plain_int(self, node: yaml.ScalarNode) -> int:
        """Decimal digits only: YAML 1.1 reads 010 as 8 and 1:30 as 90."""
        text = str(self.construct_scalar(node))
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):
            raise yaml.YAMLError(
                f"{text} is not a plain decimal number, and YAML would read it as {self.construct_yaml_int(node)}"
            )
        return int(text)


UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", UniqueKeyLoader.construct_plain_int)


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies `section.field=value` overrides (values are YAML) and checks the whole.

    The config.yaml of a run that was moved means the run where it is now.
    """
    data = read_yaml(path, "configuration", "sections")
    if has_moved_to(path.parent, data):
        logger.warning("%s was moved here from %s", path.parent.absolute(), data["run"]["dir"])
        data = relocated(data, path.parent)
    for override in overrides or []:
        _apply(data, override)
    return build(data)


def read_yaml(path: Path, kind: str, content: str) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises InputError, which calls the file `kind` and what it maps `content`."""
    try:
        data = yaml.load(read_text(path), UniqueKeyLoader)
    except FileNotFoundError:
        raise InputError(f"{kind} {path} does not exist") from None
    except RecursionError:
        raise InputError(f"{kind} {path} cannot be read: it nests too deep") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{kind} {path} cannot be read: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{kind} {path} is not a mapping of {content}")
    return data


def build(data: dict[str, Any]) -> Config:
    """Checks plain values and returns the typed configuration."""
    try:
        # A section whose fields are all commented out reads as null.
        config = Config.model_validate(
            {name: value for name, value in data.items() if value is not None}
        )
    except ValidationError as error:
        raise InputError(_describe(error)) from None
    check(config)
    config = _keep_budget(config)
    _check_allocation(config)
    return config


def with_defaults(values: dict[str, Any], model: type[BaseModel] = Config) -> dict[str, Any]:
    """Plain values of a configuration, with the default of each field that they lack.

    For what an earlier version wrote, before it had the field.
    """
    full = dict(values)
    for name, field in model.model_fields.items():
        kind = field.annotation
        if name not in full and not field.is_required():
            full[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif (
            isinstance(kind, type)
            and issubclass(kind, BaseModel)
            and isinstance(full.get(name), dict)
        ):
            full[name] = with_defaults(full[name], kind)
    return full


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two configurations differ, as `field: old -> new`."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def check(config: Config) -> None:
    """Everything that can be known to fail without touching data, files or devices."""
    if config.model.preset not in PRESETS:
        raise InputError(
            f"model.preset={config.model.preset} is unknown; choose one of {', '.join(PRESETS)}"
        )
    shape, training = config.shape(), config.training
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    if heads % kv_heads:
        raise InputError(
            f"model.num_attention_heads={heads} must be a multiple of model.num_key_value_heads={kv_heads}"
        )
    if shape.head_dim % 2:
        raise InputError(
            f"model.head_dim={shape.head_dim} must be even: rotary embeddings turn pairs"
        )
    if not 1 <= config.attention.window <= training.sequence_length:
        raise InputError(
            f"attention.window={config.attention.window} must lie between 1 and training.sequence_length={training.sequence_length}"
        )
    if training.sequence_length > shape.max_position_embeddings:
        raise InputError(
            f"training.sequence_length={training.sequence_length} exceeds model.max_position_embeddings={shape.max_position_embeddings}"
        )
    _check_parallel(config.parallel, shape, training.sequence_length)
    if training.global_batch % training.micro_batch:
        raise InputError(
            f"training.global_batch={training.global_batch} must be a multiple of training.micro_batch={training.micro_batch}"
        )
    if training.warmup_steps + training.decay_steps > training.steps:
        raise InputError(
            f"training.warmup_steps={training.warmup_steps} and training.decay_steps={training.decay_steps} "
            f"do not fit into training.steps={training.steps}"
        )
    if training.schedule == "wsd" and training.decay_steps == 0:
        raise InputError("training.schedule=wsd needs training.decay_steps of at least 1")
    if training.schedule == "cosine" and training.decay_steps:
        raise InputError(
            f"training.decay_steps={training.decay_steps} belongs to training.schedule=wsd; "
            "the cosine falls from the end of the warm-up to the last step"
        )
    if training.min_learning_rate > training.learning_rate:
        raise InputError(
            f"training.min_learning_rate={training.min_learning_rate:g} exceeds training.learning_rate={training.learning_rate:g}"
        )
    if not all(0 <= beta < 1 for beta in training.betas):
        raise InputError(f"training.betas={list(training.betas)} must lie in [0, 1)")


def _check_parallel(parallel: ParallelSection, shape: ModelConfig, sequence_length: int) -> None:
    tensor, pipeline, kv_heads = parallel.tensor, parallel.pipeline, shape.num_key_value_heads
    if tensor > kv_heads:
        raise InputError(
            f"parallel.tensor={tensor} exceeds the model's {kv_heads} KV heads, which are not split further; use {kv_heads} or less"
        )
    for name, size in (
        ("num_key_value_heads", kv_heads),
        ("intermediate_size", shape.intermediate_size),
    ):
        if size % tensor:
            raise InputError(
                f"parallel.tensor={tensor} does not divide model.{name}={size}; use a number that does"
            )
    if parallel.sequence and sequence_length % tensor:
        raise InputError(
            f"training.sequence_length={sequence_length} must be a multiple of parallel.tensor={tensor} to be divided over its ranks; "
            "or set parallel.sequence=false"
        )
    if parallel.schedule == "dualpipev" and pipeline == 1:
        raise InputError(
            "parallel.schedule=dualpipev has nothing to schedule with parallel.pipeline=1; use 1f1b"
        )
    # Embedding and first layer stay together, and so do final norm and output head.
    stages_of_a_rank, pieces = (
        2 if parallel.schedule == "dualpipev" else 1,
        shape.num_hidden_layers + 1,
    )
    if stages_of_a_rank * pipeline > pieces:
        raise InputError(
            f"parallel.pipeline={pipeline} with parallel.schedule={parallel.schedule} needs {stages_of_a_rank * pipeline} stages, but "
            f"{shape.num_hidden_layers} layers and the output head make at most {pieces}; use {pieces // stages_of_a_rank} or less"
        )


def _keep_budget(config: Config) -> Config:
    """Puts the sparsity that keeps the budget in its field; without a budget nothing changes."""
    section = config.allocation
    budget = section.budget()
    if budget is None:
        return config
    if not section.targeted:
        chosen = f"rule={section.rule}" if section.source == "rule" else f"source={section.source}"
        raise InputError(
            f"{budget} is a target of learning and of the rules {', '.join(rules.WITH_SPARSITY)}; "
            f"with allocation.{chosen} leave it and allocation.context out"
        )
    # This model may not be able to have the default sparsity. It can always be dense.
    dense = _with_sparsity(config, 0.0)
    sparsity = budget.lowest_sparsity(config.shape(), config.attention.window, dense.constraint())
    # The config.yaml of a run holds both, and must load again.
    explicit = "sparsity" in section.model_fields_set
    if explicit and abs(section.sparsity - sparsity) > 1e-6:
        raise InputError(
            f"allocation.sparsity={section.sparsity:g} is given, but {budget} makes it "
            f"{sparsity:g}; leave out one of the two, for example by allocation.sparsity=null"
        )
    return _with_sparsity(config, sparsity)


def _with_sparsity(config: Config, sparsity: float) -> Config:
    allocation = config.allocation.model_copy(update={"sparsity": sparsity})
    return config.model_copy(update={"allocation": allocation})


def _check_allocation(config: Config) -> None:
    allocation = config.allocation
    if config.learning:
        config.gate_settings()  # refuses a target that cannot be met, or not be reached by the gates
    if allocation.source == "file" and allocation.file is None:
        raise InputError(
            "allocation.source=file needs allocation.file; make one with finalize-masks or rule-masks"
        )
    if allocation.source != "file" and allocation.file is not None:
        raise InputError(
            f"allocation.file={allocation.file} is given, but allocation.source is {allocation.source}; set it to file"
        )


def _apply(data: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.split(".")
    if not separator or len(keys) != 2 or not all(keys):
        raise InputError(f"override {override!r} is not of the form section.field=value")
    section = data.setdefault(keys[0], {})
    if not isinstance(section, dict):
        raise InputError(f"section {keys[0]} of the configuration is not a mapping")
    try:
        section[keys[1]] = yaml.load(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise InputError(
            f"override {override!r}: the value is not YAML ({_one_line(error)})"
        ) from None


def _describe(error: ValidationError) -> str:
    """The first fault pydantic found, as one sentence; for an unknown field with the nearest known name."""
    fault = error.errors()[0]
    place = [str(part) for part in fault["loc"]]
    name = ".".join(place)
    if fault["type"] == "extra_forbidden":
        section = Config if len(place) == 1 else Config.model_fields[place[0]].annotation
        known = list(section.model_fields)  # type: ignore[union-attr]
        near = difflib.get_close_matches(place[-1], known, 1, 0.6)
        where = ".".join(place[:-1])
        hint = (
            f"did you mean {'.'.join([*place[:-1], near[0]])}?"
            if near
            else f"known are {', '.join(known)}"
        )
        return f"unknown field {name}{f' in section {where}' if where else ''}; {hint}"
    if fault["type"] == "missing":
        override = f" or as {name}=VALUE" if len(place) == 2 else ""
        return f"field {name} is missing; give it in the file{override}"
    return f"{name}={fault['input']!r} is refused: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
