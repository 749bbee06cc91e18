"""Wraps the parts of a step inside a DeepSpeed pipeline engine, so that a profiler names them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from megaconsa.model import kernel_use
from megaconsa.parallel.pipeline import BlockLayer, EmbeddingLayer, LMHeadLayer, NormLayer
from megaconsa.parallel.step_parts import Part, Wrap


def wrap_parts(engine: Any, wrap: Wrap) -> None:
    """Wraps the engine's instructions and the forward passes of its layers.

    engine: DeepSpeed's engine, which `Engine.engine` holds.
    """
    from deepspeed.runtime.pipe import schedule

    parts = {
        schedule.LoadMicroBatch: Part.DATA,
        schedule.ForwardPass: Part.FORWARD,
        schedule.BackwardPass: Part.BACKWARD,
        schedule.SendActivation: Part.TRANSFER,
        schedule.RecvActivation: Part.TRANSFER,
        schedule.SendGrad: Part.TRANSFER,
        schedule.RecvGrad: Part.TRANSFER,
        schedule.CommitP2P: Part.TRANSFER,
        schedule.ReduceGrads: Part.REDUCTION,
        schedule.ReduceTiedGrads: Part.REDUCTION,
        schedule.OptimizerStep: Part.OPTIMIZER,
    }
    engine._INSTRUCTION_MAP = {
        # What is not listed is a wait for a message, which the interleaved schedule has.
        kind: wrap(instruction, parts.get(kind, Part.TRANSFER))
        for kind, instruction in engine._INSTRUCTION_MAP.items()
    }
    for module in engine.module.modules():
        _wrap_layer(module, wrap)
    if kernel_use.kernels_serve_device(torch.device(engine.device)):
        _wrap_fused_block(wrap)
    # A tied head is no module of its own, but a function of the embedding.
    # DualPipeV and the interleaved schedule have two lists of layers.
    for functions in getattr(engine.module, "phase_funcs", [engine.module.forward_funcs]):
        for index, function in enumerate(functions):
            if isinstance(function, partial):
                functions[index] = wrap(function, Part.HEAD)


def _wrap_layer(module: nn.Module, wrap: Wrap) -> None:
    if isinstance(module, EmbeddingLayer):
        _wrap_forward(module, wrap, Part.EMBEDDING)
    elif isinstance(module, BlockLayer):
        _wrap_forward(module, wrap, f"{Part.BLOCK} {module.self_attn.layer}")
        _wrap_forward(module.self_attn, wrap, Part.ATTENTION)
        _wrap_forward(module.mlp, wrap, Part.MLP)
    elif isinstance(module, NormLayer):
        _wrap_forward(module, wrap, Part.FINAL_NORM)
    elif isinstance(module, LMHeadLayer):
        _wrap_forward(module, wrap, Part.HEAD)


def _wrap_fused_block(wrap: Wrap) -> None:
    """Wraps the functions of a block on a GPU, which go around its attention and MLP modules."""
    from megaconsa.model import fused_block

    parts = {
        "before_attention": Part.ATTENTION,
        "attend": Part.ATTENTION,
        "after_attention": Part.MLP,
    }
    for name, part in parts.items():
        setattr(fused_block, name, wrap(getattr(fused_block, name), part))


def _wrap_forward(module: nn.Module, wrap: Wrap, name: str) -> None:
    # The attribute of the instance hides the method of the class.
    module.forward = wrap(module.forward, name)
