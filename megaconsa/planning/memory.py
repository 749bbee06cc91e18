"""Memory of one GPU, from shapes alone: weights, gradients, optimizer, activations and logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaconsa.config import Config
from megaconsa.consa.allocation import Allocation
from megaconsa.model.config import ModelConfig
from megaconsa.model.flops import LOGIT_CHUNK_BYTES, block_parameters
from megaconsa.parallel.recomputation import Recomputation
from megaconsa.parallel.topology import Topology, vocabulary_rows

Stages = Sequence[tuple[int, int]]
"""Each stage of a pipeline rank: its first layer, and the layer after its last one.

Layers are numbered along the pipeline: 0 is the embedding, 1 to L are the model's layers, L + 1 is
the final norm, and L + 2 is the output head.
"""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU when it keeps the most activations, which is about the peak.

    They are the same on every tensor rank and every data rank.
    """

    weights: int
    gradients: int
    """Gradients in fp32, which add up over micro-batches.

    Every data rank holds the gradients of all its weights. With parallel.shard=gradients it holds
    its part of those of the blocks' matrices, and two buffers for whole blocks.
    """
    optimizer: int
    """fp32 master weights and Adam's two moments, sharded over data and context ranks (ZeRO-1)."""
    activations: int
    keys: int
    """Of the activations: keys and values that context ranks receive, for layers kept whole."""
    activations_kept: int
    """Activations if nothing is recomputed."""
    activations_checkpointed: int
    """Activations with checkpointing, which recomputes all layers."""
    logits: int
    """What the fused cross-entropy needs at the end of the pipeline.

    This is a chunk of logits, and the gradients of the head and of its input.
    """
    total: int


def activation_values(
    model_config: ModelConfig, learning: bool, tensor: int = 1, sequence: bool = False
) -> int:
    """Counts the values that one layer keeps of one token for the backward pass.

    The count is for each of `tensor` ranks, as blocks run on a GPU. A layer keeps:

    - the inputs of the two norms: 2 hidden,
    - q and k before their norms and after rotation, and v: 2 queries' and 3 keys' widths,
    - the attention's output: the queries' width,
    - gate and up: 2 intermediate.

    The gated kernel also keeps the difference of its two outputs, which is one queries' width.

    Tensor ranks divide all but the residual stream. With `sequence` they also divide the inputs of
    the norms. The outputs of the norms are then gathered, and kept: another 2 hidden.
    """
    queries = model_config.num_attention_heads * model_config.head_dim
    keys = model_config.num_key_value_heads * model_config.head_dim
    query_sized = 4 if learning else 3
    divided = query_sized * queries + 3 * keys + 2 * model_config.intermediate_size
    norm_inputs = 2 * residual_values(model_config, tensor, sequence)
    norm_outputs = 2 * model_config.hidden_size if tensor > 1 else 0
    return norm_inputs + norm_outputs + divided // tensor


def residual_values(model_config: ModelConfig, tensor: int = 1, sequence: bool = False) -> int:
    """Counts the values of one token's residual stream on each of `tensor` ranks.

    With `sequence` each rank holds a part of the tokens.
    """
    if not sequence:
        return model_config.hidden_size
    # Rounded up.
    return -(-model_config.hidden_size // tensor)


def received_tokens(length: int, context: int, window: int | None) -> int:
    """Counts the tokens whose keys and values a context rank receives from others, for one head.

    length: tokens of a sequence. context: context ranks.
    window: None for a head with full attention. A head whose window is longer than a chunk gathers
        as a full one.
    """
    if context == 1:
        return 0
    chunk = length // (2 * context)
    if window is None or window - 1 > chunk:
        return length - length // context
    return 2 * (window - 1)


def received_keys(
    config: Config, model_config: ModelConfig, topology: Topology, full_heads: int
) -> tuple[int, int]:
    """Counts the numbers that a context rank receives in one layer for one micro-batch: keys and
    values for heads with full attention, and for windowed heads.

    full_heads: the layer's heads with full attention, of all tensor ranks. The busiest tensor rank
        is counted.
    """
    training = config.training
    length = training.sequence_length
    windowed_heads = model_config.num_key_value_heads - full_heads
    of_full = received_tokens(length, topology.context, None)
    of_windowed = received_tokens(length, topology.context, config.attention.window)
    # Rounded up, because left-over heads go to single ranks.
    full = -(-full_heads // topology.tensor) * of_full
    windowed = windowed_heads // topology.tensor * of_windowed
    of_token = 2 * model_config.head_dim * training.micro_batch
    return of_token * full, of_token * windowed


def full_heads_by_layer(model_config: ModelConfig, allocation: Allocation | None) -> list[int]:
    """Returns the full heads of each layer. Without an allocation, as while learning, all are."""
    if allocation is None:
        return [model_config.num_key_value_heads] * model_config.num_hidden_layers
    return [sum(row) for row in allocation.full]


def rank_memory(
    config: Config,
    model_config: ModelConfig,
    topology: Topology,
    stages: Stages,
    in_flight: Sequence[int],
    recomputed: Recomputation,
    allocation: Allocation | None = None,
) -> Memory:
    """Returns the memory of the pipeline rank that holds these stages.

    in_flight: for each stage, the micro-batches whose activations are in memory at the peak.
    recomputed: what the backward pass computes again. Layers of other ranks do not matter.
    allocation: which heads receive the keys of whole sequences, with context ranks. None: all.
    """
    training = config.training
    tensor = topology.tensor
    sequence = config.parallel.sequence and tensor > 1
    value = 4 if training.precision == "fp32" else 2  # bytes
    weights = _weights(model_config, stages, tensor)
    tokens = training.micro_batch * training.sequence_length // topology.context
    of_block = value * tokens * activation_values(model_config, config.learning, tensor, sequence)
    block_input = value * tokens * residual_values(model_config, tensor, sequence)
    head_count = model_config.num_attention_heads
    if topology.context == 1:
        head_count += model_config.num_key_value_heads
    # Gathered keys are not recomputed. That would gather them again.
    block_heads = value * tokens * (head_count * model_config.head_dim // tensor)
    full_heads = full_heads_by_layer(model_config, allocation)
    # Blocks times micro-batches whose activations are in memory.
    held = 0
    held_without_heads = 0
    held_inputs = 0
    # Bytes of received keys and values: of all blocks, of those kept whole, and of the largest.
    all_keys = 0
    keys = 0
    largest_keys = 0
    for (start, stop), passes in zip(stages, in_flight, strict=True):
        blocks = range(max(start, 1), min(stop, model_config.num_hidden_layers + 1))
        held += len(blocks) * passes
        held_without_heads += passes * sum(block - 1 in recomputed.heads for block in blocks)
        held_inputs += passes * sum(block - 1 in recomputed.whole for block in blocks)
        for block in blocks:
            count = full_heads[block - 1]
            of_keys = value * sum(received_keys(config, model_config, topology, count))
            all_keys += passes * of_keys
            largest_keys = max(largest_keys, of_keys)
            if block - 1 not in recomputed.whole:
                keys += passes * of_keys
    kept = held * of_block + all_keys
    # The inputs of recomputed blocks are kept, and the rest of one block at a time is recomputed.
    checkpointed = held * block_input
    if held:
        checkpointed += of_block + largest_keys
    activations = checkpointed
    if held_inputs < held:
        # A block that recomputes q and k has freed gate and up by then.
        activations = (held - held_inputs) * of_block + held_inputs * block_input
        activations -= held_without_heads * block_heads
        activations += keys
        if held_inputs:
            # The first blocks are recomputed, and by then those after them have freed their memory.
            # A block is recomputed with q and k, so one block after it may have freed less.
            activations = max(activations, held_inputs * block_input + of_block + largest_keys)
    has_head = stages[-1][1] == model_config.num_hidden_layers + 3
    parts = {
        "weights": value * weights,
        "gradients": 4 * _gradients(model_config, stages, topology, weights),
        # Three fp32 values for each weight, rounded up.
        "optimizer": -(-12 * weights // (topology.data * topology.context)),
        "activations": activations,
        "logits": _logit_bytes(model_config, tokens, value, tensor) if has_head else 0,
    }
    return Memory(
        **parts,
        keys=keys,
        activations_kept=kept,
        activations_checkpointed=checkpointed,
        total=sum(parts.values()),
    )


def _weights(model_config: ModelConfig, stages: Stages, tensor: int) -> int:
    """Counts the weights of these stages on one tensor rank.

    A tied embedding counts once if the rank holds both the embedding and the output head.
    """
    linear, norms = block_parameters(model_config)
    embedding = vocabulary_rows(model_config.vocab_size, tensor) * model_config.hidden_size
    of_layer = [
        embedding,
        *[linear // tensor + norms] * model_config.num_hidden_layers,
        model_config.hidden_size,
        embedding,
    ]
    held = [layer for start, stop in stages for layer in range(start, stop)]
    total = sum(of_layer[layer] for layer in held)
    both = held[0] == 0 and held[-1] == len(of_layer) - 1
    if model_config.tie_word_embeddings and both:
        total -= embedding
    return total


def block_weights(model_config: ModelConfig, stages: Stages, tensor: int) -> int:
    """Counts the weights of the matrices in the blocks of these stages on one tensor rank."""
    linear, _ = block_parameters(model_config)
    last = model_config.num_hidden_layers + 1
    blocks = sum(len(range(max(start, 1), min(stop, last))) for start, stop in stages)
    return blocks * (linear // tensor)


def _gradients(model_config: ModelConfig, stages: Stages, topology: Topology, weights: int) -> int:
    """Counts the gradients that one rank holds.

    weights: of the stages, on one tensor rank.
    """
    ranks = topology.data * topology.context
    if topology.shard == "optimizer" or ranks == 1:
        return weights
    in_blocks = block_weights(model_config, stages, topology.tensor)
    linear, _ = block_parameters(model_config)
    buffers = min(2 * (linear // topology.tensor), in_blocks)
    own = -(-weights // ranks)
    return own + weights - in_blocks + buffers


def _logit_bytes(model_config: ModelConfig, tokens: int, value: int, tensor: int) -> int:
    """Returns the bytes that the fused cross-entropy needs on one tensor rank.

    They are a chunk of logits, the head's gradient of the micro-batch in fp32, and the gradient of
    the hidden states.

    tokens: tokens of a micro-batch. value: bytes of a weight.
    """
    vocabulary = vocabulary_rows(model_config.vocab_size, tensor)
    chunk_tokens = min(tokens, max(1, LOGIT_CHUNK_BYTES // (value * vocabulary)))
    chunk = value * chunk_tokens * vocabulary
    head_gradient = 4 * vocabulary * model_config.hidden_size
    hidden_gradient = value * tokens * model_config.hidden_size
    return chunk + head_gradient + hidden_gradient
