"""The DeepSpeed engine: a training step, an evaluation, and weights by their canonical names."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from megaconsa.config import TrainingSection
from megaconsa.consa.allocation import Allocation
from megaconsa.consa.head_selector import HeadSelector
from megaconsa.model import kernel_use
from megaconsa.model.config import ModelConfig
from megaconsa.model.initialize import InitialWeight, without_defaults
from megaconsa.model.qwen3 import weight_shapes
from megaconsa.parallel.deepspeed.compute_clock import ComputeClock
from megaconsa.parallel.deepspeed.main_grads import expect_gradients, give_main_grads
from megaconsa.parallel.deepspeed.optimizer import (
    MOMENTS,
    CheckedAdamW,
    build_optimizer,
    create_moments,
)
from megaconsa.parallel.deepspeed.patches import patch_bf16
from megaconsa.parallel.deepspeed.processes import existing_groups
from megaconsa.parallel.deepspeed.settings import deepspeed_settings
from megaconsa.parallel.deepspeed.weight_gathering import WeightGathering
from megaconsa.parallel.gathered_weights import DistributedWeights
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.next_tokens import NextTokens
from megaconsa.parallel.pipeline import (
    Carry,
    RecomputedBlockLayer,
    canonical_name,
    layer_index,
)
from megaconsa.parallel.recomputation import Recomputation
from megaconsa.parallel.sharding import Sharding, is_divided, sums_over_heads
from megaconsa.parallel.stages import cut, layer_costs
from megaconsa.parallel.step_result import Check, Fault, StepResult, apply_always
from megaconsa.parallel.topology import Topology
from megaconsa.tensor_files import Rows, TensorFiles
from megaconsa.upload import upload


class Engine:
    """Trains the model with AdamW, whose state is sharded over data ranks.

    Every rank of the mesh builds an engine, and all ranks call its methods together.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        training: TrainingSection,
        topology: Topology,
        heads: HeadSelector,
        mesh: Mesh,
        *,
        backend: str = "auto",
        separate_documents: bool = True,
        recomputed: Recomputation = Recomputation(),
    ) -> None:
        """heads: an Allocation, or a GateBank while learning."""
        from megaconsa.parallel.deepspeed.pipeline_engines import MODULES, build_engine
        from megaconsa.parallel.deepspeed.pipeline_modules import layer_specs

        self.model_config = model_config
        self.mesh = mesh
        bf16 = training.in_bf16(mesh.device.type)
        self.precision = "bf16" if bf16 else "fp32"
        self._next_tokens = NextTokens()
        allocation = heads if isinstance(heads, Allocation) else None
        sharding = Sharding(model_config, allocation, mesh.tp.rank, mesh.tp.size)
        if model_config.tie_word_embeddings:
            # DeepSpeed will ask for the groups that sum the gradients of the tied weight.
            mesh.groups.divide(_ends(mesh, topology.schedule == "dualpipev"))
        # DeepSpeed prints its settings and the table of layers.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            without_defaults(),
            existing_groups(mesh.groups),
        ):
            module = MODULES[topology.schedule](
                layers=layer_specs(
                    sharding,
                    mesh.tp,
                    mesh.cp,
                    heads,
                    backend,
                    separate_documents,
                    recomputed,
                    self._next_tokens,
                ),
                bounds=cut(
                    layer_costs(model_config, allocation, training.sequence_length), topology.stages
                ),
                topology=mesh.grid,
                loss_fn=lambda loss, _: loss,
                activation_checkpoint_interval=int(bool(recomputed.whole)),
                checkpointable_layers=[RecomputedBlockLayer.__name__],
            )
            parameters = {
                canonical_name(name, model_config.num_hidden_layers): parameter
                for name, parameter in module.named_parameters()
            }
            module.tensor_sums = _mark(parameters, mesh)
            self.engine = build_engine(
                module,
                build_optimizer(module, training, fused=mesh.device.type == "cuda"),
                deepspeed_settings(training, topology, bf16),
                mesh,
            )
        self.optimizer = self.engine.optimizer
        self._total_loss: Tensor | None = None
        self._aggregate_loss = self.engine._aggregate_total_loss
        self.engine._aggregate_total_loss = self._aggregate_once
        self._clock = ComputeClock(self.engine, mesh.device)
        self._reduction = None
        self._gathering = None
        if bf16:
            self._reduction = patch_bf16(self.engine, topology.shard, self._clock.paused)
            has_kernels = kernel_use.kernels_serve_device(mesh.device)
            listener = self._reduction.added if self._reduction else None
            give_main_grads(self.optimizer, listener, from_autograd=not has_kernels)
        if self._reduction is not None:
            self._gathering = WeightGathering(self.optimizer, module, self._clock.paused)
            self.optimizer.update_lp_params = self._gathering.start
        shapes = weight_shapes(model_config)
        owners = {
            name: module.stage_owner(layer_index(name, model_config.num_hidden_layers))
            for name in shapes
        }
        prefixes = ("", *(f"{moment}/" for moment in MOMENTS))
        self.distributed = DistributedWeights(parameters, shapes, owners, sharding, mesh, prefixes)
        create_moments(self.optimizer)
        if mesh.device.type == "cuda":
            # Until here there was memory that training does not need, such as whole gradients.
            torch.cuda.reset_peak_memory_stats(mesh.device)

    @property
    def adamw(self) -> CheckedAdamW:
        """The optimizer inside DeepSpeed's."""
        inner: CheckedAdamW = self.optimizer.optimizer
        return inner

    def compute_seconds(self) -> float:
        """Seconds of this rank's own forward and backward passes in the last step."""
        return self._clock.seconds()

    def train_step(
        self, batches: Sequence[Carry], learning_rate: float, check: Check = apply_always
    ) -> StepResult:
        """One optimizer step.

        batches: this rank's micro-batches if the pipeline begins here (Mesh.reads_data). Other
            ranks' batches are not used.
        check: called once on every rank, before any weight changes, with the loss of the global
            batch and its gradient norm before clipping. All ranks must decide alike. It is not
            called if the gradient norm is not finite: such a step is never applied.

        On a GPU, this returns while AdamW still runs there. The passes have finished. With several
        data ranks, the updated weights may still be on their way.
        """
        from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER

        measured: tuple[float, float] | None = None

        def check_step() -> Fault | None:
            nonlocal measured
            measured = self._loss_and_norm()
            return check(*measured)

        self.adamw.begin(check_step)
        if self.precision == "bf16":
            expect_gradients(self.optimizer)
        if self._reduction is not None:
            self._reduction.begin()
        self._total_loss = None
        self._clock.reset()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self.engine.train_batch(self._pairs(batches))
        self.engine.module.train()
        # It keeps two events of every step otherwise.
        self.engine.timers(TRAIN_BATCH_TIMER).reset()
        if measured is None:
            # DeepSpeed has read the norm itself, and launched no AdamW that a read would wait for.
            measured = float(loss), float(self.engine.get_global_grad_norm())
        return StepResult(*measured, self.adamw.fault)

    def evaluate(self, batches: Sequence[Carry], count: int) -> float:
        """Loss of `count` held-out micro-batches, in nats per labelled token.

        batches: as in `train_step`.
        """
        # DualPipeV and the interleaved schedule read the engine's own count.
        training_count = self.engine.micro_batches
        self.engine.micro_batches = count
        loss = self.engine.eval_batch(self._pairs(batches), num_micro_batches=count)
        self.engine.micro_batches = training_count
        # eval_batch leaves the module in evaluation mode.
        self.engine.module.train()
        return float(loss)

    def finish(self) -> None:
        """Waits for weights that the last step has sent. Call it before the ranks part."""
        if self._gathering is not None:
            self._gathering.finish()

    def next_tokens(self, batches: Sequence[Carry], count: int, texts: int) -> list[int]:
        """The most probable next token of each text, on every rank.

        batches: as in `evaluate`, with labels and sequences as NextTokens takes them. All data
            ranks have the same ones.
        count: number of micro-batches.
        texts: number of texts.
        """
        with self._next_tokens.collected(texts, self.mesh.device) as found:
            self.evaluate(batches, count)
            # Only the ranks that hold the head and the position know a token.
            tokens: list[int] = self.mesh.largest(found).tolist()
        return tokens

    def initialize(self, seed: int) -> None:
        """Fresh weights."""
        for name, held, elements in self._fragments():
            shape = self.distributed.shapes[name]
            whole = InitialWeight(name, shape, self.model_config, seed)
            held.copy_(self.distributed.fragment(name, whole, elements))
        self._spread_weights()

    def weights(self) -> Iterator[tuple[str | Rows, Tensor]]:
        """Yields whole fp32 master weights by canonical name, each on one rank.

        With many ranks, a large weight comes in Rows, each on one rank. Every rank must exhaust the
        iterator.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        return self.distributed.gather(safe_get_full_fp32_param, "")

    def load_weights(self, weights: TensorFiles) -> None:
        """Sets master and engine weights.

        Raises KeyError if a name is missing, RuntimeError if a shape differs.
        """
        self._load(weights)
        self._spread_weights()

    def moments(self) -> Iterator[tuple[str | Rows, Tensor]]:
        """Yields Adam's moments as `weights` does, named `exp_avg/<canonical name>`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for moment in MOMENTS:
            read = partial(safe_get_full_optimizer_state, optim_state_key=moment)
            yield from self.distributed.gather(read, f"{moment}/")

    def load_moments(self, moments: TensorFiles, steps: int) -> None:
        """Sets Adam's moments and its step count. Raises as `load_weights`."""
        for moment in MOMENTS:
            self._load(moments, moment)
        for state in self.adamw.state.values():
            state["step"].fill_(steps)

    @property
    def optimizer_steps(self) -> int:
        """Adam's step count, which its bias correction depends on."""
        return int(next(iter(self.adamw.state.values()))["step"])

    def _load(self, files: TensorFiles, moment: str | None = None) -> None:
        """Sets the fragments of master weights, or of a moment, that ZeRO-1 keeps on this rank."""
        prefix = f"{moment}/" if moment else ""
        for name in self.distributed.parameters:
            self.distributed.check_shape(name, files.shape(prefix + name))
        for name, held, elements in self._fragments(moment):
            held.copy_(self.distributed.fragment(name, files.stored(prefix + name), elements))

    def _fragments(self, moment: str | None = None) -> Iterator[tuple[str, Tensor, range]]:
        """The fragments of weights that ZeRO-1 keeps on this rank, in fp32.

        Each comes with the weight's name, and with its place in this rank's flattened part of the
        weight. A fragment of a moment has the same place.
        """
        for name, parameter in self.distributed.parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            place = mapping.lp_fragment_address
            elements = range(place.start, place.start + place.numel)
            yield name, mapping.get_hp_fragment(moment).detach(), elements

    def _spread_weights(self) -> None:
        """Sets the engine weights. Each data rank rounds its fragments, and all gather them."""
        self.optimizer.update_lp_params()
        self.finish()

    def _aggregate_once(self) -> Tensor:
        """The loss of the global batch.

        The check of a step needs it before the weights change, and DeepSpeed asks again after the
        step. By then the weights are on their way over the data ranks, and a second all-reduce
        there would wait for them.
        """
        if self._total_loss is None:
            self._total_loss = self._aggregate_loss()
        return self._total_loss

    def _loss_and_norm(self) -> tuple[float, float]:
        """Loss and gradient norm of a step that is about to be applied, in one read."""
        values = [self.engine._aggregate_total_loss(), self.optimizer._global_grad_norm]
        loss, norm = torch.stack(values).tolist()
        return loss, norm

    def _pairs(self, batches: Sequence[Carry]) -> Iterator[tuple[Any, Tensor]]:
        """Micro-batches as DeepSpeed takes them: inputs and labels."""
        # DeepSpeed insists on labels. Ours travel with the inputs, so it gets a dummy.
        no_labels = torch.empty(0)
        if not self.mesh.reads_data:
            return repeat(((), no_labels))
        # All at once: DeepSpeed's own copy of each micro-batch would wait for the one before.
        device = self.mesh.device
        uploaded = [tuple(upload(x, device) for x in batch) for batch in batches]
        return iter([(batch, no_labels) for batch in uploaded])


def _mark(parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> list[tuple[Tensor, Any]]:
    """Marks weights that are divided over tensor ranks, for DeepSpeed's gradient norm.

    Returns the weights that are whole but whose gradients must be summed, with the group to sum
    over.
    """
    sums: list[tuple[Tensor, Any]] = []
    for name, parameter in parameters.items():
        if is_divided(name):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        elif mesh.tp.size > 1 and (mesh.tp.sequence or sums_over_heads(name)):
            # With sequence parallelism a norm's gradient comes from this rank's tokens only.
            sums.append((parameter, mesh.tp.group))
    return sums


def _ends(mesh: Mesh, is_dualpipe: bool) -> list[list[int]]:
    """Divides each pipeline into the ranks that hold a tied embedding and the others.

    With DualPipeV the first rank has both the first and the last stage.
    """
    divided = []
    for ranks in mesh.grid.get_axis_comm_lists("pipe"):
        holders = ranks[:1] if is_dualpipe or len(ranks) == 1 else [ranks[0], ranks[-1]]
        others = [rank for rank in ranks if rank not in holders]
        divided += [part for part in (holders, others) if part]
    return divided
