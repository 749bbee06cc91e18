"""Checks across fields of a configuration: what is known to fail before a run touches anything."""

from __future__ import annotations

from math import lcm

from megaconsa.config.nearest import nearest_divisors, nearest_multiples
from megaconsa.config.run_config import Config
from megaconsa.config.sections import ParallelSection
from megaconsa.consa import rules
from megaconsa.errors import InputError
from megaconsa.model.config import PRESETS, ModelConfig


def check(config: Config) -> None:
    """Raises InputError for all that must fail, as far as it shows without data, files or devices.

    The allocation is checked by `resolve_budget` and `check_allocation`.
    """
    if config.model.preset not in PRESETS:
        raise InputError(
            f"model.preset={config.model.preset} is unknown; choose one of {', '.join(PRESETS)}"
        )
    model_config = config.to_model_config()
    training = config.training
    heads = model_config.num_attention_heads
    kv_heads = model_config.num_key_value_heads
    if heads % kv_heads:
        raise InputError(
            f"model.num_attention_heads={heads} must be a multiple of "
            f"model.num_key_value_heads={kv_heads}"
        )
    if model_config.head_dim % 2:
        raise InputError(
            f"model.head_dim={model_config.head_dim} must be even: rotary embeddings turn pairs"
        )
    if not 1 <= config.attention.window <= training.sequence_length:
        raise InputError(
            f"attention.window={config.attention.window} must lie between 1 and "
            f"training.sequence_length={training.sequence_length}"
        )
    if training.sequence_length > model_config.max_position_embeddings:
        raise InputError(
            f"training.sequence_length={training.sequence_length} exceeds "
            f"model.max_position_embeddings={model_config.max_position_embeddings}; "
            "lower the first or raise the second"
        )
    _check_parallel(config.parallel, model_config, training.sequence_length)
    if training.global_batch % training.micro_batch:
        raise InputError(
            f"training.global_batch={training.global_batch} must be a multiple of "
            f"training.micro_batch={training.micro_batch}; "
            f"use {nearest_multiples(training.global_batch, training.micro_batch)}"
        )
    if training.warmup_steps + training.decay_steps > training.steps:
        raise InputError(
            f"training.warmup_steps={training.warmup_steps} and "
            f"training.decay_steps={training.decay_steps} "
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
            f"training.min_learning_rate={training.min_learning_rate:g} exceeds "
            f"training.learning_rate={training.learning_rate:g}"
        )
    if not all(0 <= beta < 1 for beta in training.betas):
        raise InputError(f"training.betas={list(training.betas)} must lie in [0, 1)")


def _check_parallel(
    parallel: ParallelSection, model_config: ModelConfig, sequence_length: int
) -> None:
    """Raises InputError if the model cannot be sharded over tensor and pipeline ranks this way."""
    tensor = parallel.tensor
    pipeline = parallel.pipeline
    kv_heads = model_config.num_key_value_heads
    if tensor > kv_heads:
        raise InputError(
            f"parallel.tensor={tensor} exceeds the model's {kv_heads} KV heads, "
            f"which are not split further; use {kv_heads} or less"
        )
    sizes = {"num_key_value_heads": kv_heads, "intermediate_size": model_config.intermediate_size}
    for name, size in sizes.items():
        if size % tensor:
            raise InputError(
                f"parallel.tensor={tensor} does not divide model.{name}={size}; "
                f"use {nearest_divisors(tensor, *sizes.values())}"
            )
    context = parallel.context
    unit = tensor if parallel.sequence else 1
    if context > 1:
        unit = lcm(2 * context, context * unit)
    if context > 1 and sequence_length % (2 * context):
        raise InputError(
            f"training.sequence_length={sequence_length} must be a multiple of {2 * context}, "
            f"two chunks for each rank of parallel.context={context}; "
            f"use {nearest_multiples(sequence_length, unit)}"
        )
    if parallel.sequence and sequence_length // context % tensor:
        of_each = f", the {sequence_length // context} tokens of a context rank," * (context > 1)
        raise InputError(
            f"training.sequence_length={sequence_length}{of_each} must be a multiple of "
            f"parallel.tensor={tensor} to be divided over its ranks; "
            f"use {nearest_multiples(sequence_length, unit)}, "
            "or set parallel.sequence=false"
        )
    if parallel.schedule != "1f1b" and pipeline == 1:
        raise InputError(
            f"parallel.schedule={parallel.schedule} has nothing to schedule with "
            "parallel.pipeline=1; use 1f1b"
        )
    stages_per_rank = 1 if parallel.schedule == "1f1b" else 2
    stages = stages_per_rank * pipeline
    # The embedding stays with the first layer, and the final norm stays with the output head.
    pieces = model_config.num_hidden_layers + 1
    if stages > pieces:
        raise InputError(
            f"parallel.pipeline={pipeline} with parallel.schedule={parallel.schedule} needs "
            f"{stages} stages, but "
            f"{model_config.num_hidden_layers} layers and the output head make at most {pieces}; "
            f"use {pieces // stages_per_rank} or less"
        )


def resolve_budget(config: Config) -> Config:
    """The configuration with allocation.sparsity set so that the allocation meets the budget.

    Without a budget the configuration is returned as it is.
    Raises InputError if the budget cannot be met, or contradicts other fields.
    """
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
    # The default sparsity may be impossible for this model. Sparsity 0 never is.
    dense = _with_sparsity(config, 0.0)
    sparsity = budget.lowest_sparsity(
        config.to_model_config(), config.attention.window, dense.constraint()
    )
    # A run's config.yaml holds both the budget and the sparsity, and must load again.
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


def check_allocation(config: Config) -> None:
    """Raises InputError if learning cannot reach its target, or if source and file disagree."""
    allocation = config.allocation
    if config.learning:
        # Raises InputError for a target that cannot be met, or that the gates cannot reach.
        config.gate_settings()
    if allocation.source == "file" and allocation.file is None:
        raise InputError(
            "allocation.source=file needs allocation.file; "
            "make one with finalize-masks or rule-masks"
        )
    if allocation.source != "file" and allocation.file is not None:
        raise InputError(
            f"allocation.file={allocation.file} is given, "
            f"but allocation.source is {allocation.source}; set it to file"
        )
