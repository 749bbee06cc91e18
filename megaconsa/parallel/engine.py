"""The DeepSpeed engine around the pipeline: a training step, an evaluation, and weights by their canonical names."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from megaconsa.config import TrainingSection
from megaconsa.consa.allocation import Allocation
from megaconsa.model.attention import HeadSelector
from megaconsa.model.config import ModelConfig
from megaconsa.model.initialize import initial_weight
from megaconsa.model.qwen3 import weight_shapes
from megaconsa.parallel.compute_clock import ComputeClock
from megaconsa.parallel.mends import mend_bf16
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.pipeline import Carry, canonical_name, layer_index, layer_specs
from megaconsa.parallel.sharding import Sharding, is_divided, sums_over_heads
from megaconsa.parallel.stages import cut, layer_costs
from megaconsa.parallel.topology import Topology
from megaconsa.parallel.weights import DistributedWeights

Accept = Callable[[float, float], bool]
"""Whether a step of this loss and gradient norm is to be applied."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's states of a parameter, by torch's names."""


class Engine:
    """Trains the model with ZeRO-1 and AdamW. Every rank of the mesh builds one and calls its methods together."""

    def __init__(
        self,
        shape: ModelConfig,
        training: TrainingSection,
        topology: Topology,
        heads: HeadSelector,
        mesh: Mesh,
        *,
        backend: str = "auto",
        separate_documents: bool = True,
    ) -> None:
        """heads: an Allocation, or a GateBank while learning."""
        import deepspeed

        from megaconsa.parallel.pipeline_module import CostCutModule, DualPipeCostCutModule

        self.shape, self.mesh = shape, mesh
        bf16 = training.in_bf16(mesh.device.type)
        self.precision = "bf16" if bf16 else "fp32"
        allocation = heads if isinstance(heads, Allocation) else None
        sharding = Sharding(shape, allocation, mesh.tensor.rank, mesh.tensor.size)
        # DeepSpeed prints its settings and the table of layers.
        with contextlib.redirect_stdout(io.StringIO()):
            module = (DualPipeCostCutModule if topology.schedule == "dualpipev" else CostCutModule)(
                layers=layer_specs(sharding, mesh.tensor, heads, backend, separate_documents),
                bounds=cut(
                    layer_costs(shape, allocation, training.sequence_length), topology.stages
                ),
                topology=mesh.topology,
                loss_fn=lambda loss, _: loss,
                activation_checkpoint_interval=int(training.activation_checkpointing),
                checkpointable_layers=["BlockLayer"],
            )
            parameters = {
                canonical_name(name, shape.num_hidden_layers): parameter
                for name, parameter in module.named_parameters()
            }
            module.tensor_sums = _mark(parameters, mesh)
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=_adamw(module, training, fused=mesh.device.type == "cuda"),
                config=_deepspeed_config(training, topology, bf16),
            )
        if bf16:
            mend_bf16(self.engine)
        self._clock = ComputeClock(self.engine, mesh.device)
        shapes = weight_shapes(shape)
        owners = {
            name: module.stage_owner(layer_index(name, shape.num_hidden_layers)) for name in shapes
        }
        self.distributed = DistributedWeights(parameters, shapes, owners, sharding, mesh)
        self._create_moments()
        self._accept: Accept = lambda loss, grad_norm: True
        self._accepted: bool | None = None
        self._ask_before_each_step()

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self.engine.get_global_grad_norm())

    def compute_seconds(self) -> float:
        """Of this rank's own forward and backward passes in the last step, which must be over on the device."""
        return self._clock.seconds()

    def train_step(
        self,
        batches: Sequence[Carry],
        learning_rate: float,
        accept: Accept = lambda loss, grad_norm: True,
    ) -> float:
        """One optimizer step; returns the global batch's loss in nats per labelled token.

        batches: this rank's micro-batches where the pipeline begins (Mesh.reads_data); not looked at elsewhere.
        accept: asked once, on all ranks, when loss and gradient norm (both global, the norm before clipping) are known and no weight
        has moved yet; it must say the same on every rank. It is not asked where the norm is not finite: then no step is applied.
        """
        self._accept, self._accepted = accept, None
        self._clock.reset()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self.engine.train_batch(self._pairs(batches))
        self.engine.module.train()
        return float(loss)

    def evaluate(self, batches: Sequence[Carry], count: int) -> float:
        """Loss of `count` held-out micro-batches, in nats per labelled token; the weights stay as they are. batches: as above."""
        # DualPipeV finds a micro-batch's second half by the engine's own count, whatever it is told here.
        training_count, self.engine.micro_batches = self.engine.micro_batches, count
        loss = self.engine.eval_batch(self._pairs(batches), num_micro_batches=count)
        self.engine.micro_batches = training_count
        # eval_batch leaves the module in evaluation mode.
        self.engine.module.train()
        return float(loss)

    def initialize(self, seed: int) -> None:
        """Fresh weights."""
        for name in self.distributed.parameters:
            self._set(name, initial_weight(name, self.distributed.shapes[name], self.shape, seed))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """fp32 master weights by canonical name, whole, each on one rank; every rank must run through it."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self.distributed.gather(safe_get_full_fp32_param)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Sets master and engine weights from whole fp32 tensors; raises KeyError or RuntimeError where names or shapes differ."""
        for name in self.distributed.parameters:
            self._set(name, weights[name])

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Adam's moments, named `exp_avg/<canonical name>`, as `weights` gives them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for moment in MOMENTS:
            for name, value in self.distributed.gather(
                partial(safe_get_full_optimizer_state, optim_state_key=moment)
            ):
                yield f"{moment}/{name}", value

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Sets Adam's moments and its count of steps."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for moment in MOMENTS:
            for name, parameter in self.distributed.parameters.items():
                safe_set_full_optimizer_state(
                    parameter, self.distributed.part(name, moments[f"{moment}/{name}"]), moment
                )
        for state in self.optimizer.optimizer.state.values():
            state["step"].fill_(steps)

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam has counted (its bias correction depends on them)."""
        return int(next(iter(self.optimizer.optimizer.state.values()))["step"])

    def _set(self, name: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        parameter, part = self.distributed.parameters[name], self.distributed.part(name, whole)
        safe_set_full_fp32_param(parameter, part)
        parameter.data.copy_(part)

    def _pairs(self, batches: Sequence[Carry]) -> Iterator[tuple[Any, Tensor]]:
        """As the pipeline engine takes micro-batches: inputs, and labels it must be given but that travel in the inputs here."""
        nothing = torch.empty(0)
        return (
            ((batch, nothing) for batch in batches)
            if self.mesh.reads_data
            else repeat(((), nothing))
        )

    def _ask_before_each_step(self) -> None:
        """Has AdamW step only where the step is accepted. DeepSpeed then goes on with weights that are the same as before."""
        inner = self.optimizer.optimizer
        step = inner.step

        def step_if_accepted(*arguments: Any, **named: Any) -> Any:
            if self._accepted is None:  # the fp32 optimizer steps once for each group of parameters
                loss = float(self.engine._aggregate_total_loss())
                self._accepted = self._accept(loss, float(self.optimizer._global_grad_norm))
            return step(*arguments, **named) if self._accepted else None

        inner.step = step_if_accepted

    def _create_moments(self) -> None:
        """Creates Adam's state, which it would create in its first step, so that a checkpoint can be loaded before that."""
        inner = self.optimizer.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:
                counter = torch.zeros((), device=flat.device if group["fused"] else "cpu")
                inner.state[flat] = {
                    "step": counter,
                    **{moment: torch.zeros_like(flat) for moment in MOMENTS},
                }
        self.optimizer._lazy_init_hp_params_optimizer_state()


def _mark(parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> list[tuple[Tensor, Any]]:
    """Tells DeepSpeed's norm which weights are parts; returns the whole ones whose gradients are, with the ranks to sum them over."""
    sums: list[tuple[Tensor, Any]] = []
    for name, parameter in parameters.items():
        if is_divided(name):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        elif mesh.tensor.size > 1 and (mesh.tensor.sequence or sums_over_heads(name)):
            # With sequence parallelism every norm has met this rank's tokens only.
            sums.append((parameter, mesh.tensor.group))
    return sums


def _adamw(module: nn.Module, training: TrainingSection, fused: bool) -> torch.optim.Optimizer:
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=training.learning_rate, betas=training.betas, eps=1e-8, fused=fused
    )


def _deepspeed_config(training: TrainingSection, topology: Topology, bf16: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": topology.accumulation,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000},
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": None,
    }
    if bf16:
        # Without the second and third, gradients accumulate in bf16 and are rounded to it when they are summed over data ranks.
        settings |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return settings
