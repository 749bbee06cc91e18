"""The shape of a model, and the presets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Field names are those of transformers' Qwen3Config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    tie_word_embeddings: bool = True
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 40_960

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads


QWEN3_VOCABULARY = 151_936

PRESETS: dict[str, ModelConfig] = {
    # Used by tests and the quickstart. A run takes seconds on a CPU.
    "tiny": ModelConfig(4096, 128, 352, 4, 8, 4, head_dim=32, max_position_embeddings=4096),
    # Fits a single GPU. It has enough layers and heads for an allocation to have a shape.
    "small": ModelConfig(8192, 512, 1408, 12, 16, 8, head_dim=64, max_position_embeddings=32_768),
    "qwen3-0.6b": ModelConfig(QWEN3_VOCABULARY, 1024, 3072, 28, 16, 8),
    "qwen3-1.7b": ModelConfig(QWEN3_VOCABULARY, 2048, 6144, 28, 16, 8),
    "qwen3-4b": ModelConfig(QWEN3_VOCABULARY, 2560, 9728, 36, 32, 8),
    "qwen3-8b": ModelConfig(QWEN3_VOCABULARY, 4096, 12_288, 36, 32, 8, tie_word_embeddings=False),
    "qwen3-14b": ModelConfig(QWEN3_VOCABULARY, 5120, 17_408, 40, 40, 8, tie_word_embeddings=False),
    "qwen3-32b": ModelConfig(QWEN3_VOCABULARY, 5120, 25_600, 64, 64, 8, tie_word_embeddings=False),
}
