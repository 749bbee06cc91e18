"""Parameter names and configuration fields. All of megaconsa uses those of transformers' Qwen3."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from megaconsa.model.config import ModelConfig


def parameter_shapes(model_config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns canonical name -> unsharded shape of every parameter, in the order of the model.

    Linear weights are (out, in). With tied embeddings there is no `lm_head.weight`, and the output
    layer is `model.embed_tokens.weight`.
    """
    hidden = model_config.hidden_size
    intermediate = model_config.intermediate_size
    head_dim = model_config.head_dim
    queries = model_config.num_attention_heads * head_dim
    keys = model_config.num_key_value_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (model_config.vocab_size, hidden)
    }
    for index in range(model_config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not model_config.tie_word_embeddings:
        shapes["lm_head.weight"] = (model_config.vocab_size, hidden)
    return shapes


def name_difference(names: Set[str], model_config: ModelConfig) -> str | None:
    """Says what is wrong with the names of a model's weights.

    Returns "lack NAME and 3 more" or "have the unknown NAME", or None if nothing is wrong.
    """
    expected = parameter_shapes(model_config).keys()
    missing = expected - names
    unknown = names - expected
    for problem, wrong in (("lack", missing), ("have the unknown", unknown)):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return f"{problem} {min(wrong)}{more}"
    return None


def qwen3_config_fields(model_config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a dense Qwen3 `config.json`, without the model type.

    `Qwen3Config(**fields)` takes them as they are.
    """
    return {
        "vocab_size": model_config.vocab_size,
        "hidden_size": model_config.hidden_size,
        "intermediate_size": model_config.intermediate_size,
        "num_hidden_layers": model_config.num_hidden_layers,
        "num_attention_heads": model_config.num_attention_heads,
        "num_key_value_heads": model_config.num_key_value_heads,
        "head_dim": model_config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model_config.max_position_embeddings,
        "initializer_range": model_config.initializer_range,
        "rms_norm_eps": model_config.rms_norm_eps,
        "use_cache": True,
        "tie_word_embeddings": model_config.tie_word_embeddings,
        "rope_theta": model_config.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": model_config.num_hidden_layers,
    }
