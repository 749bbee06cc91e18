"""How a world of processes divides into pipeline, data and tensor ranks, and what the pipeline's schedule makes of it.

Arithmetic on the configuration alone: no process group is needed, so that a run is refused, or planned, before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaconsa.config import Config, PipelineSchedule
from megaconsa.errors import InputError


@dataclass(frozen=True)
class Topology:
    """Numbers of ranks on each axis; the world has tensor x pipeline x data processes."""

    tensor: int
    pipeline: int
    data: int
    accumulation: int
    """Micro-batches of each data rank in one optimizer step."""
    schedule: PipelineSchedule = "1f1b"

    @classmethod
    def of(cls, config: Config, processes: int) -> Topology:
        """The topology of a run on so many processes; raises InputError where they, or the global batch, cannot be divided."""
        parallel, training = config.parallel, config.training
        tensor, pipeline = parallel.tensor, parallel.pipeline
        if processes % (tensor * pipeline):
            raise InputError(
                f"{processes} processes are not a multiple of parallel.tensor={tensor} x parallel.pipeline={pipeline}; "
                f"start a multiple of {tensor * pipeline}, or lower one of them"
            )
        data = processes // (tensor * pipeline)
        accumulation, rest = divmod(training.global_batch, training.micro_batch * data)
        if rest:
            raise InputError(
                f"training.global_batch={training.global_batch} must be a multiple of training.micro_batch={training.micro_batch} "
                f"x data ranks={data} ({processes} processes)"
            )
        topology = cls(tensor, pipeline, data, accumulation, parallel.schedule)
        if accumulation < topology.stages:
            consequence = (
                "parallel.schedule=dualpipev cannot run"
                if parallel.schedule == "dualpipev"
                else "stages would idle"
            )
            raise InputError(
                f"training.global_batch={training.global_batch} makes {accumulation} micro-batches on each of {data} data ranks, fewer "
                f"than the {topology.stages} stages of parallel.pipeline={pipeline}: {consequence}; raise training.global_batch or lower "
                "training.micro_batch, the number of processes or parallel.pipeline"
            )
        return topology

    @property
    def stages(self) -> int:
        """Contiguous parts into which the layers are cut."""
        return self.pipeline * (2 if self.schedule == "dualpipev" else 1)

    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds: its own, with DualPipeV also the mirrored one from the end."""
        mirrored = self.stages - 1 - pipeline_rank
        return (pipeline_rank, mirrored) if self.schedule == "dualpipev" else (pipeline_rank,)

    def in_flight(self, pipeline_rank: int) -> tuple[int, ...]:
        """For each of `stages_of`: micro-batches whose activations it holds at the rank's peak, between forward and backward.

        With DualPipeV they are 2 * pipeline + 1 together, as DeepSpeed's schedule orders the passes.
        """
        if self.schedule == "dualpipev":
            return self.stages - pipeline_rank, pipeline_rank + 1
        return (min(self.pipeline - pipeline_rank, self.accumulation),)

    @property
    def bubble(self) -> float:
        """Share of a step in which a rank waits because the pipeline fills or drains, for stages of equal cost.

        With P pipeline ranks and m micro-batches 1F1B waits (P - 1) / (m + P - 1), DualPipeV (5 P - 6) / (6 m + 5 P - 6), where a
        backward pass costs two forward passes. Both are DeepSpeed's schedules played through with exchanges that wait for both sides
        (the tests do that). DualPipe's published bubble is smaller: it presupposes weight gradients put off and passes that
        overlap, which DeepSpeed's DualPipeV leaves out.
        """
        m, p = self.accumulation, self.pipeline
        if self.schedule == "dualpipev":
            return (5 * p - 6) / (6 * m + 5 * p - 6)
        return (p - 1) / (m + p - 1)
