"""How processes divide into ranks of each axis, and what the pipeline schedule costs.

This is arithmetic on the configuration. It needs no process group, so that a run can be refused or
planned before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaconsa.config import Config, PipelineSchedule, Shard
from megaconsa.config.nearest import nearest_multiples
from megaconsa.errors import InputError
from megaconsa.parallel import interleaved


def vocabulary_rows(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding on each of `tensor` ranks. The last rank's may be padding."""
    return -(-vocab_size // tensor)


@dataclass(frozen=True)
class Topology:
    """Number of ranks on each axis. Their product is the number of processes."""

    tensor: int
    pipeline: int
    data: int
    accumulation: int
    """Micro-batches of each data rank in one optimizer step."""
    schedule: PipelineSchedule = "1f1b"
    context: int = 1
    shard: Shard = "optimizer"

    @classmethod
    def of(cls, config: Config, processes: int) -> Topology:
        """The topology of a run on n processes.

        Raises InputError if the processes or the global batch cannot be divided.
        """
        parallel = config.parallel
        training = config.training
        tensor = parallel.tensor
        pipeline = parallel.pipeline
        context = parallel.context
        of_a_replica = tensor * context * pipeline
        if processes % of_a_replica:
            by_context = f"parallel.context={context} x " if context > 1 else ""
            raise InputError(
                f"{processes} processes are not a multiple of parallel.tensor={tensor} x "
                f"{by_context}parallel.pipeline={pipeline}; start "
                f"{nearest_multiples(processes, of_a_replica)}, or lower one of them"
            )
        data = processes // of_a_replica
        accumulation, rest = divmod(training.global_batch, training.micro_batch * data)
        if rest:
            raise InputError(
                f"training.global_batch={training.global_batch} must be a multiple of "
                f"training.micro_batch={training.micro_batch} x data ranks={data} "
                f"({processes} processes); "
                f"use {nearest_multiples(training.global_batch, training.micro_batch * data)}"
            )
        topology = cls(
            tensor, pipeline, data, accumulation, parallel.schedule, context, parallel.shard
        )
        least = pipeline if parallel.schedule == "interleaved" else topology.stages
        if accumulation < least:
            consequence = (
                "parallel.schedule=dualpipev cannot run"
                if parallel.schedule == "dualpipev"
                else "stages would idle"
            )
            raise InputError(
                f"training.global_batch={training.global_batch} makes {accumulation} "
                f"micro-batches on each of {data} data ranks, fewer than the "
                f"{least} stages of parallel.pipeline={pipeline}: {consequence}; "
                f"raise training.global_batch to {least * training.micro_batch * data}, "
                "or lower training.micro_batch, the number of processes or parallel.pipeline"
            )
        if parallel.schedule == "interleaved" and accumulation % pipeline:
            sequences = training.micro_batch * data * pipeline
            raise InputError(
                f"training.global_batch={training.global_batch} makes {accumulation} "
                f"micro-batches on each of {data} data ranks, and parallel.schedule=interleaved "
                f"needs a multiple of parallel.pipeline={pipeline}; use training.global_batch "
                f"{nearest_multiples(training.global_batch, sequences)}"
                ", or parallel.schedule=1f1b"
            )
        return topology

    @property
    def stages(self) -> int:
        """Number of contiguous parts into which the layers are cut."""
        return self.pipeline * (1 if self.schedule == "1f1b" else 2)

    @property
    def least_evaluated(self) -> int:
        """The fewest micro-batches of an evaluation. DualPipeV needs one for each stage."""
        return self.stages if self.schedule == "dualpipev" else 1

    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank. With DualPipeV it also has the mirrored one from the end.
        With the interleaved schedule it also has one of the second half."""
        if self.schedule == "dualpipev":
            return pipeline_rank, self.stages - 1 - pipeline_rank
        if self.schedule == "interleaved":
            return pipeline_rank, self.pipeline + pipeline_rank
        return (pipeline_rank,)

    def in_flight(self, pipeline_rank: int) -> tuple[int, ...]:
        """For each of `stages_of`: micro-batches whose activations are in memory at the rank's
        peak.

        With DualPipeV the two add up to 2 * pipeline + 1, by DeepSpeed's schedule.
        """
        if self.schedule == "dualpipev":
            return self.stages - pipeline_rank, pipeline_rank + 1
        if self.schedule == "interleaved":
            return interleaved.in_flight(self.pipeline, pipeline_rank, self.accumulation)
        return (min(self.pipeline - pipeline_rank, self.accumulation),)

    @property
    def bubble(self) -> float:
        """Share of a step in which a rank waits while the pipeline fills or drains.

        Stages are assumed to cost the same, and a backward pass to cost two forward passes. With p
        pipeline ranks and m micro-batches:

            1F1B        (p - 1) / (m + p - 1)
            DualPipeV   (5 p - 6) / (6 m + 5 p - 6)
            interleaved (p - 1) / (2 m + p - 1)

        The tests derive all by simulating the schedules. DeepSpeed's 1F1B and DualPipeV have
        blocking sends. DualPipe's published bubble is smaller. It delays weight gradients and
        overlaps passes, which DeepSpeed's DualPipeV does not do.
        """
        m = self.accumulation
        p = self.pipeline
        if self.schedule == "dualpipev":
            return (5 * p - 6) / (6 * m + 5 * p - 6)
        if self.schedule == "interleaved":
            return (p - 1) / (2 * m + p - 1)
        return (p - 1) / (m + p - 1)
