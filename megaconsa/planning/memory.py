"""Memory of one GPU, from shapes alone: weights, gradients, optimizer, activations and logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaconsa.config import Config
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
    """fp32 master weights and Adam's two moments, sharded over the data ranks (ZeRO-1)."""
    activations: int
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


def head_values(model_config: ModelConfig, tensor: int = 1) -> int:
    """Counts those values of `activation_values` that a layer does not keep if it recomputes q and
    k: both after rotation.
    """
    heads = model_config.num_attention_heads + model_config.num_key_value_heads
    return heads * model_config.head_dim // tensor


def residual_values(model_config: ModelConfig, tensor: int = 1, sequence: bool = False) -> int:
    """Counts the values of one token's residual stream on each of `tensor` ranks.

    With `sequence` each rank holds a part of the tokens.
    """
    if not sequence:
        return model_config.hidden_size
    # Rounded up.
    return -(-model_config.hidden_size // tensor)


def rank_memory(
    config: Config,
    model_config: ModelConfig,
    topology: Topology,
    stages: Stages,
    in_flight: Sequence[int],
    recomputed: Recomputation,
) -> Memory:
    """Returns the memory of the pipeline rank that holds these stages.

    in_flight: for each stage, the micro-batches whose activations are in memory at the peak.
    recomputed: what the backward pass computes again. Layers of other ranks do not matter.
    """
    training = config.training
    tensor = topology.tensor
    sequence = config.parallel.sequence and tensor > 1
    value = 4 if training.precision == "fp32" else 2  # bytes
    weights = _weights(model_config, stages, tensor)
    tokens = training.micro_batch * training.sequence_length
    of_block = value * tokens * activation_values(model_config, config.learning, tensor, sequence)
    block_input = value * tokens * residual_values(model_config, tensor, sequence)
    block_heads = value * tokens * head_values(model_config, tensor)
    # Blocks times micro-batches whose activations are in memory.
    held = 0
    held_without_heads = 0
    held_inputs = 0
    for (start, stop), passes in zip(stages, in_flight, strict=True):
        blocks = range(max(start, 1), min(stop, model_config.num_hidden_layers + 1))
        held += len(blocks) * passes
        held_without_heads += passes * sum(block - 1 in recomputed.heads for block in blocks)
        held_inputs += passes * sum(block - 1 in recomputed.whole for block in blocks)
    kept = held * of_block
    # The inputs of recomputed blocks are kept, and the rest of one block at a time is recomputed.
    checkpointed = held * block_input
    if held:
        checkpointed += of_block
    activations = checkpointed
    if held_inputs < held:
        # A block that recomputes q and k has freed gate and up by then.
        activations = (held - held_inputs) * of_block + held_inputs * block_input
        activations -= held_without_heads * block_heads
        if held_inputs:
            # The first blocks are recomputed, and by then those after them have freed their memory.
            # A block is recomputed with q and k, so one block after it may have freed less.
            activations = max(activations, held_inputs * block_input + of_block)
    has_head = stages[-1][1] == model_config.num_hidden_layers + 3
    parts = {
        "weights": value * weights,
        "gradients": 4 * _gradients(model_config, stages, topology, weights),
        # Three fp32 values for each weight, rounded up.
        "optimizer": -(-12 * weights // topology.data),
        "activations": activations,
        "logits": _logit_bytes(model_config, tokens, value, tensor) if has_head else 0,
    }
    return Memory(
        **parts,
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


def _gradients(model_config: ModelConfig, stages: Stages, topology: Topology, weights: int) -> int:
    """Counts the gradients that one rank holds.

    weights: of the stages, on one tensor rank.
    """
    ranks = topology.data * topology.context
    if topology.shard == "optimizer" or ranks == 1:
        return weights
    linear, _ = block_parameters(model_config)
    last = model_config.num_hidden_layers + 1
    blocks = sum(len(range(max(start, 1), min(stop, last))) for start, stop in stages)
    of_block = linear // topology.tensor
    whole = weights - blocks * of_block
    own = -(-weights // ranks)
    return own + whole + min(2, blocks) * of_block


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
