"""The layers of the pipeline, compared with the whole model, without an engine.

The tests compare names, loss and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaconsa.consa.allocation import Allocation
from megaconsa.model.config import ModelConfig
from megaconsa.model.initialize import initial_weight
from megaconsa.model.loss import IGNORED, summed_cross_entropy
from megaconsa.model.qwen3 import Qwen3
from megaconsa.parallel.context_parallel import ContextParallel
from megaconsa.parallel.pipeline import canonical_name, layer_index, normalizer
from megaconsa.parallel.sharding import Sharding
from megaconsa.parallel.tensor_parallel import TensorParallel

SHAPE = ModelConfig(61, 24, 40, 11, 6, 2, head_dim=8, initializer_range=0.3)
TABLE = Allocation(4, tuple((layer % 2 == 0, layer % 3 == 0) for layer in range(11)))

tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def build_layers(
    model_config: ModelConfig, separate: bool = True
) -> tuple[nn.Module, list[Callable[[Any], Any]]]:
    """Builds and calls the layers as DeepSpeed's PipelineModule does.

    Modules are named by index. All specs of a tied key share one module. The layers are those for
    one process, which also puts full heads first.

    Returns the module that holds the layers, and the functions to call in order.
    """
    from deepspeed.pipe import TiedLayerSpec

    from megaconsa.parallel.deepspeed.pipeline_modules import layer_specs

    module = nn.Module()
    functions = []
    module.tied_modules = nn.ModuleDict()
    sharding = Sharding(model_config, TABLE)
    specs = layer_specs(sharding, TensorParallel(), ContextParallel(), TABLE, "auto", separate)
    for index, spec in enumerate(specs):
        if isinstance(spec, TiedLayerSpec):
            if spec.key not in module.tied_modules:
                module.tied_modules[spec.key] = spec.build()
            layer = module.tied_modules[spec.key]
            functions.append(layer if spec.forward_fn is None else partial(spec.forward_fn, layer))
        else:
            module.add_module(str(index), spec.build())
            functions.append(module.get_submodule(str(index)))
    return module, functions


@tied_or_not
def test_canonical_names_are_those_of_the_whole_model(tied: bool) -> None:
    """Covers models of more than nine layers."""
    shape = replace(SHAPE, tie_word_embeddings=tied)
    module, _ = build_layers(shape)
    names = {
        canonical_name(name, shape.num_hidden_layers): weight.shape
        for name, weight in module.named_parameters()
    }
    assert {layer_index(name, shape.num_hidden_layers) for name in names} == set(
        range(13 if tied else 14)
    )
    assert len(names) == len(list(module.parameters()))
    assert names == {name: weight.shape for name, weight in Qwen3(shape, TABLE).named_parameters()}


@pytest.mark.parametrize("separate", [True, False])
@tied_or_not
def test_loss_and_gradients_equal_the_whole_model(tied: bool, separate: bool) -> None:
    """A tied embedding gets gradients from both of its uses."""
    shape = replace(SHAPE, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(61, (2, 2, 16), generator=generator)
    labels[0, 3] = labels[1, 9:] = IGNORED
    documents = torch.tensor([[0] * 6 + [6] * 10, [0] * 16], dtype=torch.int32)
    sequences = torch.tensor([5, 2])
    labelled = int((labels != IGNORED).sum())

    module, functions = build_layers(shape, separate)
    whole = Qwen3(shape, TABLE, separate=separate)
    pipelined = {
        canonical_name(name, shape.num_hidden_layers): weight
        for name, weight in module.named_parameters()
    }
    sharding = Sharding(shape, TABLE)
    for name, weight in whole.named_parameters():
        weight.data.copy_(initial_weight(name, weight.shape, shape, 0))
        pipelined[name].data.copy_(sharding.split(name, weight.data))

    carry: Any = (tokens, labels, documents, sequences, normalizer(3 * labelled, 4))
    integers = carry[1:]
    for function in functions[:-1]:
        carry = function(carry)
        assert all(part is integer for part, integer in zip(carry[1:], integers, strict=True))
    loss: Tensor = functions[-1](carry)

    final: list[Tensor] = []
    whole.model.norm.register_forward_hook(lambda _module, _arguments, output: final.append(output))
    logits = whole(tokens, documents, sequences)
    chosen = labels != IGNORED
    summed = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen], reduction="sum")
    expected = summed * 4 / (3 * labelled)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    direct = summed_cross_entropy(final[0], whole.lm_head.weight, labels)
    assert direct.item() * 4 / (3 * labelled) == pytest.approx(expected.item(), rel=1e-6)

    loss.backward()
    expected.backward()
    for name, weight in whole.named_parameters():
        assert weight.grad is not None
        scale = float(weight.grad.abs().max())
        gradient = pipelined[name].grad
        assert gradient is not None
        torch.testing.assert_close(
            sharding.join(name, [gradient]), weight.grad, rtol=0, atol=1e-5 * scale
        )


def test_normalizer_carries_both_counts_as_integers() -> None:
    """A stage receives only integers beside the hidden states.

    A global batch may hold more tokens than fp32 can count.
    """
    both = normalizer(2**24 + 1, 512)
    assert both.dtype == torch.int64
    assert both.tolist() == [16_777_217, 512]
