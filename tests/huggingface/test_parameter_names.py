"""Names, shapes and settings of our model are those of transformers."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megaconsa.huggingface.parameter_names import parameter_shapes, qwen3_config_fields
from megaconsa.model.config import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_those_of_transformers(preset: str) -> None:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**qwen3_config_fields(PRESETS[preset])))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(parameter_shapes(PRESETS[preset]).items()) == list(theirs.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_rope_and_norm_follow_the_configuration(preset: str) -> None:
    model = PRESETS[preset]
    fields = qwen3_config_fields(model) | {
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
    }
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**fields))
    exponents = torch.arange(0, model.head_dim, 2) / model.head_dim
    torch.testing.assert_close(qwen3.model.rotary_emb.inv_freq, model.rope_theta**-exponents)
    assert qwen3.model.norm.variance_epsilon == model.rms_norm_eps
