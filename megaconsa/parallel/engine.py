"""The DeepSpeed engine around the pipeline: a training step, an evaluation, and weights by their canonical names."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaconsa.config import TrainingSection
from megaconsa.model.attention import HeadSelector
from megaconsa.model.config import ModelConfig
from megaconsa.model.initialize import initial_weight
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.pipeline import Carry, canonical_name, layer_specs

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's states of a parameter, by torch's names."""


class Engine:
    """Trains the model with ZeRO-1 and AdamW. Every rank of the mesh builds one and calls its methods together."""

    def __init__(
        self,
        shape: ModelConfig,
        training: TrainingSection,
        heads: HeadSelector,
        mesh: Mesh,
        *,
        backend: str = "auto",
        separate_documents: bool = True,
    ) -> None:
        import deepspeed
        from deepspeed.pipe import PipelineModule

        self.shape, self.mesh = shape, mesh
        bf16 = training.in_bf16(mesh.device.type)
        self.precision = "bf16" if bf16 else "fp32"
        # DeepSpeed prints its settings and the table of layers.
        with contextlib.redirect_stdout(io.StringIO()):
            module = PipelineModule(
                layers=layer_specs(shape, heads, backend, separate_documents),
                topology=mesh.topology,
                loss_fn=lambda loss, _: loss,
                partition_method="uniform",
                activation_checkpoint_interval=int(training.activation_checkpointing),
                checkpointable_layers=["BlockLayer"],
            )
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=_adamw(module, training, fused=mesh.device.type == "cuda"),
                config=_deepspeed_config(training, mesh, bf16),
            )
        self.parameters: dict[str, nn.Parameter] = {
            canonical_name(name, shape.num_hidden_layers): parameter for name, parameter in self.engine.module.named_parameters()
        }
        self._create_moments()

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm())

    @property
    def step_applied(self) -> bool:
        """Whether the last step changed the weights (DeepSpeed skips it when the gradient overflows)."""
        return bool(self.engine.was_step_applied())

    def train_step(self, batches: Sequence[Carry], learning_rate: float) -> float:
        """One optimizer step over this rank's micro-batches; returns the global batch's loss in nats per labelled token."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self.engine.train_batch(_pairs(batches))
        self.engine.module.train()
        return float(loss)

    def evaluate(self, batches: Sequence[Carry]) -> float:
        """Loss of held-out micro-batches, in nats per labelled token; the weights stay as they are."""
        loss = self.engine.eval_batch(_pairs(batches), num_micro_batches=len(batches))
        # eval_batch leaves the module in evaluation mode.
        self.engine.module.train()
        return float(loss)

    def initialize(self, seed: int) -> None:
        """Fresh weights."""
        for name, parameter in self.parameters.items():
            self._set(name, initial_weight(name, parameter.shape, self.shape, seed))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """fp32 master weights by canonical name, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.parameters.items():
            yield name, safe_get_full_fp32_param(parameter).cpu()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Sets master and engine weights from fp32 tensors; raises KeyError or RuntimeError where names or shapes differ."""
        for name in self.parameters:
            self._set(name, weights[name])

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Adam's moments on the CPU, named `exp_avg/<canonical name>`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for moment in MOMENTS:
            for name, parameter in self.parameters.items():
                yield f"{moment}/{name}", safe_get_full_optimizer_state(parameter, moment).cpu()

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Sets Adam's moments and its count of steps."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for moment in MOMENTS:
            for name, parameter in self.parameters.items():
                safe_set_full_optimizer_state(parameter, moments[f"{moment}/{name}"].to(self.mesh.device), moment)
        for state in self.optimizer.optimizer.state.values():
            state["step"].fill_(steps)

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam has counted (its bias correction depends on them)."""
        return int(next(iter(self.optimizer.optimizer.state.values()))["step"])

    def _set(self, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        parameter = self.parameters[name]
        if value.shape != parameter.shape:
            raise RuntimeError(f"{name} has shape {tuple(value.shape)}, but the model needs {tuple(parameter.shape)}")
        value = value.to(self.mesh.device, torch.float32)
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)

    def _create_moments(self) -> None:
        """Creates Adam's state, which it would create in its first step, so that a checkpoint can be loaded before that."""
        inner = self.optimizer.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:
                counter = torch.zeros((), device=flat.device if group["fused"] else "cpu")
                inner.state[flat] = {"step": counter, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        self.optimizer._lazy_init_hp_params_optimizer_state()


def _pairs(batches: Sequence[Carry]) -> Iterator[tuple[Carry, Tensor]]:
    """As the pipeline engine takes micro-batches: inputs, and labels it must be given but that travel in the inputs here."""
    return iter([(batch, batch[1]) for batch in batches])


def _adamw(module: nn.Module, training: TrainingSection, fused: bool) -> torch.optim.Optimizer:
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, eps=1e-8, fused=fused)


def _deepspeed_config(training: TrainingSection, mesh: Mesh, bf16: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.global_batch // (training.micro_batch * mesh.data_ranks),
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000},
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": None,
    }
    if bf16:
        # Without the second line gradients accumulate in bf16.
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings
