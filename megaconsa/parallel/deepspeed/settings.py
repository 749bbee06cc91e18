"""DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from megaconsa.config import TrainingSection
from megaconsa.parallel.topology import Topology


def deepspeed_settings(training: TrainingSection, topology: Topology, bf16: bool) -> dict[str, Any]:
    """The dictionary that deepspeed.initialize takes."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": topology.accumulation,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000},
        # DeepSpeed knows torch's AdamW, but not our subclass.
        "zero_allow_untested_optimizer": True,
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": None,
    }
    if bf16:
        # Without the last two, gradients would accumulate in bf16, and would be rounded to bf16
        # before they are summed over data ranks.
        settings |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return settings
