"""DeepSpeed's pipeline engine with the interleaved 1F1B schedule.

Two chunks of layers on each rank run as in DeepSpeed's DualPipeV engine, on which this one builds.
What is its own: the order of passes (`parallel/interleaved.py`), and how ranks exchange tensors.
Everything that goes from one pass to the next is one message. It is sent as soon as it exists, and
nobody waits for its delivery. Its receiver has posted the receive one pass ahead.

This file imports DeepSpeed at its head, so import it only after the mesh exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from deepspeed.pipe import DualPipeVModule, PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import _INIT, DualPipeVEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch import distributed as dist

from megaconsa.parallel.deepspeed.messages import Layout, pack, unpack
from megaconsa.parallel.deepspeed.pipeline_modules import CostCutModule
from megaconsa.parallel.interleaved import CHUNKS, Pass, passes
from megaconsa.parallel.mesh import Mesh
from megaconsa.parallel.process_groups import create


class InterleavedModule(DualPipeVModule, CostCutModule):
    """Stages r and P + r of 2 P on pipeline rank r of P."""

    def _partition_layers(self, method: str = "") -> None:
        super()._partition_layers(method)
        second = self.num_stages // CHUNKS + self.stage_id
        self.phase_bounds[1] = (self.parts[second], self.parts[second + 1])

    def stage_owner(self, layer_idx: int) -> int:
        """The pipeline rank that holds a layer."""
        stage: int = PipelineModule.stage_owner(self, layer_idx)
        return stage % (self.num_stages // CHUNKS)


class WaitForMessage(schedule.BufferOpInstruction):
    """Waits for what a pass needs. It is no part of the pass, whose time is this rank's own."""


class InterleavedSchedule(schedule.PipeSchedule):
    """The instructions of one rank.

    Buffer `chunk * micro_batches + micro_batch` holds what belongs to a micro-batch in a chunk.
    """

    def __init__(
        self, micro_batches: int, stages: int, stage_id: int, forward_only: bool = False
    ) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.passes = passes(stages, stage_id, micro_batches, forward_only)
        self.forward_only = forward_only

    def num_pipe_buffers(self) -> int:
        count: int = CHUNKS * self.micro_batches
        return count

    def steps(self) -> Iterator[list[Any]]:
        yield self._receive(self.passes[0])
        for number, each in enumerate(self.passes):
            commands = self._load(each)
            if number + 1 < len(self.passes):
                # The receive of the next pass is posted while this one runs.
                commands += self._receive(self.passes[number + 1])
            yield [*commands, *self._wait(each), self._run(each), *self._send(each)]
        end: list[Any] = [schedule.CommitP2P()]
        if not self.forward_only:
            end += [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]
        yield end

    def _buffer(self, each: Pass) -> int:
        buffer: int = each.chunk * self.micro_batches + each.micro_batch
        return buffer

    def _begins(self, each: Pass) -> bool:
        """Whether the pass is the model's first one for the micro-batch in its direction."""
        if each.is_forward:
            return self.stage_id == 0 and each.chunk == 0
        return self.stage_id == self.stages - 1 and each.chunk == CHUNKS - 1

    def _ends(self, each: Pass) -> bool:
        """Whether it is the last one."""
        if each.is_forward:
            return self.stage_id == self.stages - 1 and each.chunk == CHUNKS - 1
        return self.stage_id == 0 and each.chunk == 0

    def _load(self, each: Pass) -> list[Any]:
        # DeepSpeed loads labels where the loss is computed.
        if each.is_forward and (self._begins(each) or self._ends(each)):
            return [schedule.LoadMicroBatch(self._buffer(each))]
        return []

    def _receive(self, each: Pass) -> list[Any]:
        if self._begins(each):
            return []
        kind = schedule.RecvActivation if each.is_forward else schedule.RecvGrad
        return [kind(self._buffer(each), phase=each.chunk)]

    def _wait(self, each: Pass) -> list[Any]:
        if self._begins(each):
            return []
        return [WaitForMessage(self._buffer(each), phase=each.chunk, is_forward=each.is_forward)]

    def _run(self, each: Pass) -> Any:
        kind = schedule.ForwardPass if each.is_forward else schedule.BackwardPass
        return kind(self._buffer(each), phase=each.chunk)

    def _send(self, each: Pass) -> list[Any]:
        if self._ends(each):
            return []
        kind = schedule.SendActivation if each.is_forward else schedule.SendGrad
        return [kind(self._buffer(each), phase=each.chunk)]


@dataclass(frozen=True)
class NeighbourGroups:
    """A rank's process groups with its neighbours in the ring of a pipeline.

    Each direction between two neighbours has a group of its own. NCCL runs what two ranks exchange
    in a group in the order in which it was posted, and the orders of the two directions differ.
    """

    activations_before: Any
    """With the rank before, from which activations come."""
    activations_following: Any
    gradients_before: Any
    gradients_following: Any

    @classmethod
    def of(cls, mesh: Mesh) -> NeighbourGroups:
        """Creates the groups. All ranks must call this together."""
        rings = mesh.grid.get_axis_comm_lists("pipe")
        own: list[dict[int, Any]] = []
        for _ in ("activations", "gradients"):
            by_edge: dict[int, Any] = {}
            for edges in _disjoint_edges(mesh.pp_size):
                group = create(_pairs(rings, edges), mesh.world.rank)
                by_edge |= dict.fromkeys(edges, group)
            own.append(by_edge)
        before = (mesh.pp_rank - 1) % mesh.pp_size
        return cls(own[0][before], own[0][mesh.pp_rank], own[1][before], own[1][mesh.pp_rank])


def _disjoint_edges(size: int) -> list[list[int]]:
    """Divides the edges of a ring so that those of one list share no rank.

    Edge i joins the ranks at places i and i + 1.
    """
    lists = [list(range(0, size - 1, 2)), list(range(1, size - 1, 2))]
    if size % 2:
        lists.append([size - 1])
    else:
        lists[1].append(size - 1)
    return [edges for edges in lists if edges]


def _pairs(rings: Sequence[Sequence[int]], edges: Sequence[int]) -> list[list[int]]:
    """The two ranks of each edge, in each ring. Other ranks are alone."""
    found = []
    for ring in rings:
        pairs = [sorted((ring[edge], ring[(edge + 1) % len(ring)])) for edge in edges]
        paired = {rank for pair in pairs for rank in pair}
        found += pairs + [[rank] for rank in ring if rank not in paired]
    return found


class InterleavedEngine(DualPipeVEngine):
    """Runs an InterleavedModule."""

    def __init__(
        self,
        module: InterleavedModule,
        optimizer: Any,
        settings: Mapping[str, Any],
        groups: NeighbourGroups,
    ) -> None:
        mpu = module.mpu()
        self._active_phase = _INIT
        # DualPipeV's own constructor demands more micro-batches than this schedule needs.
        PipelineEngine.__init__(
            self,
            args=None,
            model=module,
            optimizer=optimizer,
            mpu=mpu,
            config=dict(settings),
            config_class=DeepSpeedConfig(dict(settings), mpu),
        )
        self._active_phase = None
        self._before = (self.stage_id - 1) % self.num_stages
        self._following = (self.stage_id + 1) % self.num_stages
        self.pipe_buffers["grads"] = []
        self.pipe_buffers["losses"] = []
        self._layout = Layout((), ())
        """Of the tensors between chunks. Empty as long as it is not known."""
        # The first rank knows the layout from what it sends itself.
        self._announces_layout = self.stage_id != self.num_stages - 1
        self._receiving: dict[int, tuple[Any, Tensor]] = {}
        """Receives that are posted, by the buffer: the handle and the message."""
        self._sending: list[tuple[Any, Tensor]] = []
        """Sends, with the messages that must stay in memory until they are delivered."""
        self._groups = groups
        self._configure_python_gc()

    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss, or, in a pass, whether the pass does."""
        is_last: bool = self.stage_id == self.num_stages - 1
        return is_last and (self._active_phase is _INIT or self._active_phase != 0)

    def reset_activation_shape(self) -> None:
        self._layout = Layout((), ())

    def _is_loss_stage(self, phase: int) -> bool:
        is_loss: bool = self.stage_id == self.num_stages - 1 and phase == CHUNKS - 1
        return is_loss

    def _is_last_rank(self) -> bool:
        # DualPipeV turns around on its last rank. Here nothing turns around.
        return False

    def _loss_stage_global_rank(self) -> int:
        rank: int = self.grid.stage_to_global(self.num_stages - 1)
        return rank

    def _train_schedule(self) -> InterleavedSchedule:
        return InterleavedSchedule(self.micro_batches, self.num_stages, self.stage_id)

    def _inference_schedule(self, micro_batches: int) -> InterleavedSchedule:
        return InterleavedSchedule(micro_batches, self.num_stages, self.stage_id, forward_only=True)

    def _run_load(self, buffer_id: int) -> None:
        PipelineEngine._exec_load_micro_batch(self, buffer_id)

    def _wait_for_message(self, buffer_id: int, phase: int, is_forward: bool) -> None:
        if buffer_id not in self._receiving:
            # The first rank posts its first receives here. See _receive_activations.
            self._receive_activations(buffer_id, phase)
        handle, message = self._receiving.pop(buffer_id)
        handle.wait()
        if is_forward:
            inputs = unpack(message, self._layout)
            self.pipe_buffers["inputs"][buffer_id] = tuple(
                x.requires_grad_(x.is_floating_point()) for x in inputs
            )
        else:
            self.pipe_buffers["grads"][buffer_id] = unpack(message, self._layout.floating())

    def _send_activations(self, buffer_id: int, phase: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if self.stage_id == 0:
            self._layout = Layout.of(outputs)
        if self._announces_layout:
            self._announces_layout = False
            self._send_tensor_meta(outputs, self._following)
        self._send(pack(outputs), self._following, self._groups.activations_following)
        if not torch.is_grad_enabled():
            self.pipe_buffers["outputs"][buffer_id] = None

    def _send_gradients(self, buffer_id: int, phase: int) -> None:
        inputs: Sequence[Tensor] = self.pipe_buffers["inputs"][buffer_id]
        gradients = [x.grad for x in inputs if x.grad is not None]
        self.pipe_buffers["inputs"][buffer_id] = None
        self._send(pack(gradients), self._before, self._groups.gradients_before)

    def _receive_activations(self, buffer_id: int, phase: int) -> None:
        if not self._layout.shapes:
            if self.stage_id == 0:
                return  # It has not sent anything yet, so it does not know the layout.
            self._layout = Layout.of(self._recv_tensor_meta(self._before))
            # DeepSpeed would keep the tensors that it made for the layout.
            self._grad_layer_buf: list[Tensor] = []
        self._post(buffer_id, self._layout, self._before, self._groups.activations_before)

    def _receive_gradients(self, buffer_id: int, phase: int) -> None:
        self._post(
            buffer_id, self._layout.floating(), self._following, self._groups.gradients_following
        )

    def _finish_sends(self) -> None:
        for handle, _ in self._sending:
            handle.wait()
        self._sending = []

    def _send(self, message: Tensor, stage: int, group: Any) -> None:
        handle = dist.isend(message, self.grid.stage_to_global(stage), group=group)
        self._sending = [send for send in self._sending if not send[0].is_completed()]
        self._sending.append((handle, message))

    def _post(self, buffer_id: int, layout: Layout, stage: int, group: Any) -> None:
        message = torch.empty(layout.bytes, dtype=torch.uint8, device=self.device)
        handle = dist.irecv(message, self.grid.stage_to_global(stage), group=group)
        self._receiving[buffer_id] = handle, message

    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        **DualPipeVEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _run_load,
        WaitForMessage: _wait_for_message,
        schedule.SendActivation: _send_activations,
        schedule.RecvActivation: _receive_activations,
        schedule.SendGrad: _send_gradients,
        schedule.RecvGrad: _receive_gradients,
        schedule.CommitP2P: _finish_sends,
    }
